"""What ``outbox`` exits with."""

SUCCESS = 0
"""Done as asked."""

INCOMPLETE = 1
"""Done in part or not at all: what was not done is told, and is still in its queue."""

USAGE = 2
"""The command line or the URL is not right, or the broker has no such queue."""

BROKER = 3
"""The broker cannot be reached, or was lost on the way; nothing is lost with it."""

INTERRUPTED = 130
"""Ended by Ctrl-C, 128 and the number of the signal, as shells have it."""
