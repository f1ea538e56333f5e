"""A process under a supervisor, seen from itself: it reports, and stops when its parent dies."""

from __future__ import annotations

import logging
import time
from typing import Any

from outbox.service.lines import LineWriter
from outbox.system.child_process import Parent
from outbox.system.signals import Stop

__all__ = [
    "LEAVE",
    "LEAVING",
    "LOADED",
    "MARGIN",
    "READY",
    "STOPPING",
    "Supervised",
]

LOADED, READY, LEAVING, STOPPING = "loaded", "ready", "leaving", "stopping"
"""The words of a process: it has imported the application; it consumes; it only finishes what runs,
and is to be replaced; it has begun to stop."""

LEAVE = b"leave"
"""The word of its parent: begin nothing more, and end when what runs has ended."""

MARGIN = 10.0
"""Seconds beyond the shutdown timeout after which a stopping process is killed.

They cover closing its connections and draining its publisher, which have timeouts as well.
"""


class Supervised:
    """The link of a process to its supervisor. Thread-safe."""

    def __init__(self, parent: Parent, logger: logging.Logger) -> None:
        """Take over the channel of ``parent`` for the lines of this process."""
        self._parent = parent
        self._logger = logger
        self._writer = LineWriter(parent.channel)

    def say(self, word: str) -> None:
        """Send one of the words above."""
        self._writer.say({"word": word})

    def report(self, **report: Any) -> None:
        """Send a report, which replaces the one before; see ``WorkerState``."""
        self._writer.report(report)

    def stop_with_parent(self, stop: Stop, grace: float) -> None:
        """Request a stop when the parent dies, and exit forcibly ``grace`` seconds later.

        If the parent lets the process leave, request that.
        """

        def stop_gracefully() -> None:
            self._logger.warning("the parent process has died; stopping")
            stop.ask()
            time.sleep(grace)

        def on_word(word: bytes) -> None:
            if word == LEAVE:
                stop.leave()

        self._parent.when_gone(stop_gracefully, on_word)
