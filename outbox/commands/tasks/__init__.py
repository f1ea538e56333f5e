"""The command ``outbox tasks``."""
