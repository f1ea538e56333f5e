"""The life of a message, from its delivery to its settlement."""
