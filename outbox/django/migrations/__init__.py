"""The migrations of outbox's tables."""
