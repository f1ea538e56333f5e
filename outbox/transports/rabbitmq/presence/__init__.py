"""What a process announces of itself over a connection that publishes."""
