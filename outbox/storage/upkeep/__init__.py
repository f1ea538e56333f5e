"""Besides publishing: rows are counted, kept for a while, and deleted."""
