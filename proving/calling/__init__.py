"""Tasks under test: the script that calls them, and what ``outbox-consume`` runs."""
