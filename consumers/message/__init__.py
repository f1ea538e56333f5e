"""The life of one message, from its delivery to its settlement."""
