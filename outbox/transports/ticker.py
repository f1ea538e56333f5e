"""The protocol of a ticker: it publishes the calls of recurring tasks at their times."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Ticker"]


class Ticker(Protocol):
    """Publishes one event for each time of each of its tasks, in competition with other workers'.

    Thread-safe. It works on a separate thread, so that it waits for none of a worker's.
    """

    def start(self) -> None:
        """Start in the background, and go on until :meth:`stop`.

        Raises:
            UsageError: a thread can't work in this process.
        """
        ...

    def stop(self) -> None:
        """Leave the tasks to other workers, within 3 seconds. Also before the start, or again."""
        ...
