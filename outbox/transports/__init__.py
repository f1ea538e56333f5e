"""The transports: three protocols, and an implementation for each kind of broker."""
