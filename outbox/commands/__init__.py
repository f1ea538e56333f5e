"""The command ``outbox``: publishes stored events and manages parked ones."""
