"""The exit codes of ``outbox`` and ``outbox-consume``: one set, each number with one meaning."""

SUCCESS = 0
"""Done, or stopped as requested: every message is settled, or was held and will be redelivered."""

UNFINISHED = 1
"""Done in part: the output names what is left. Unfinished messages are redelivered.

Or a check, such as ``outbox doctor``, has found something, which the output names.
"""

USAGE = 2
"""The command line, a URL, a module, a consumer, a queue or a table cannot be used."""

KILLED = 3
"""A second signal stopped ``outbox-consume`` at once."""

RECYCLED = 4
"""Internal, from a worker process to its parent: replace this process.

The command as a whole never exits with it.
"""

FLAPPING = 5
"""The service was given up: its processes ended again and again without ever being ready."""

NOT_READY = 6
"""A service was not ready within its start timeout; the one that it was to replace goes on."""

UNAVAILABLE = 7
"""The broker or the database cannot be reached, or the connection was lost."""

IN_HAND = 8
"""``outbox migrate-transport`` has moved what it may: workers have other messages in hand."""

INTERRUPTED = 130
"""Ctrl-C ended ``outbox``: 128 plus the number of the signal, as in shells."""
