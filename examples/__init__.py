"""Examples: a small shop, and a demonstration that runs it."""
