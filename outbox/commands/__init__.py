"""The command ``outbox``: for those who look after events that have gone astray."""
