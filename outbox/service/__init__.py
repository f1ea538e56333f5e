"""The parent of worker and relay processes: it runs no application code and opens no connection."""
