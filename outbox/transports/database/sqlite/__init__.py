"""What is special of a SQLite file as the broker: its lock, its disk, its place."""
