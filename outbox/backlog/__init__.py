"""What a publisher answers for: events that the broker has not yet confirmed."""
