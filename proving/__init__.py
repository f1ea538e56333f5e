"""The proving ground: deliberate faults, and a ledger of the fate of every event."""
