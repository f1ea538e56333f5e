"""The proving ground: faults on purpose, and a ledger of what became of every event."""
