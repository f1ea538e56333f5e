"""What operators see of the stored events."""
