"""What processes leave of themselves in a database, for others to read."""
