"""The command ``outbox-consume``: arguments, worker processes, limits and reloading."""
