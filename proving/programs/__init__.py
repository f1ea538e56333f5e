"""The programs under proof: each runs as a process of its own, and uses outbox as anyone would."""
