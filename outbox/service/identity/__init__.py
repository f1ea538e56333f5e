"""A service with an id: its pid file, take-over, and what other processes see of it."""
