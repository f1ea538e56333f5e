"""``outbox migrate-transport``: moves messages from one transport to another."""
