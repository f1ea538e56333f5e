"""The programs under test: each runs in a separate process, and uses outbox as any user would."""
