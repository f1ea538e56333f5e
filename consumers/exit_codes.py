"""What ``outbox-consume`` exits with."""

SUCCESS = 0
"""Stopped as asked, with every message settled."""

UNFINISHED = 1
"""Stopped as asked, but some messages did not finish in time; they are delivered again."""

USAGE = 2
"""The command line, a module, a consumer or the broker's topology is not right."""

KILLED = 3
"""Stopped at once, by a second signal."""

RECYCLED = 4
"""Of a worker process, to its parent: it has done enough, and another is to take its place.

The command as a whole never exits with it.
"""
