"""What ``outbox`` exits with."""

SUCCESS = 0
"""Done as asked."""

INCOMPLETE = 1
"""Done in part or not at all: what was not done is told, and is still in its queue."""

USAGE = 2
"""The command line or a URL is not right, or there is no such queue or table."""

BROKER = 3
"""The broker or the database cannot be reached, or was lost; nothing is lost with it."""

INTERRUPTED = 130
"""Ended by Ctrl-C, 128 and the number of the signal, as shells have it."""
