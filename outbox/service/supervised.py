"""A process under a supervisor, seen from itself: it reports, and stops when its parent dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from outbox.service.health.stacks import dump_for_parent
from outbox.service.lines import LineWriter
from outbox.system import process
from outbox.system.child_process import Parent
from outbox.system.last_error import LastError
from outbox.system.resident_memory import resident_bytes
from outbox.system.signals import Signals, Stop, handle, ignore
from outbox.telemetry import metrics

__all__ = [
    "DUMP",
    "FIRST",
    "LEAVE",
    "LEAVING",
    "LOADED",
    "MARGIN",
    "QUIET",
    "READY",
    "STOPPING",
    "Supervised",
    "SupervisedSignals",
]

LOADED, READY, LEAVING, STOPPING = "loaded", "ready", "leaving", "stopping"
"""The words of a process: it has imported the application; it consumes; it only finishes what runs,
and is to be replaced; it has begun to stop."""

LEAVE, QUIET, DUMP = b"leave", b"quiet", b"dump"
"""The words of its parent: begin nothing more, and end when what runs has ended; begin nothing
more, and stay; write the stacks of the threads and tasks."""

_EVERY = 1.0
"""Seconds between two reports."""
_EVERY_AT_FIRST = 0.1
_AT_FIRST = 30.0
"""Seconds, at most, in which reports come more often, until all links are up: until then a service
is not ready."""

FIRST = "_OUTBOX_FIRST"
"""The variable that only the process in the first slot gets."""

MARGIN = 10.0
"""Seconds beyond the shutdown timeout after which a stopping process is killed.

They cover closing its connections and draining its publisher, which have timeouts as well.
"""


class Supervised:
    """The link of a process to its supervisor. Thread-safe.

    Attributes:
        is_first: whether it is in the first slot of its parent, and so does what one process of the
            service is enough for.
    """

    def __init__(self, parent: Parent, logger: logging.Logger) -> None:
        """Take over the channel of ``parent`` for the lines of this process."""
        self._dump = dump_for_parent()
        _leave_quiet_to_parent()
        self.is_first = bool(os.environ.pop(FIRST, ""))
        self._parent = parent
        self._logger = logger
        self._last_error = LastError()
        self._last_error.listen()
        self._writer = LineWriter(parent.channel)

    def say(self, word: str) -> None:
        """Send one of the words above."""
        self._writer.say({"word": word})

    def report_each_second(self, collect: Callable[[float], Mapping[str, Any]]) -> None:
        """Send a report each second, which replaces the one before, from a thread, until the end.

        The reports are also the pulse of this process: when they stay away, the parent takes it to
        be stuck. They hold these keys, as far as there is something to say:

        - ``counts``: what was counted since the start, as ``metrics.snapshot()`` returns it
        - ``in_flight``, ``late``: the numbers of messages that run, and of handlers beyond their
          timeout
        - ``oldest``: the seconds since the oldest running message has begun; None if there is none
        - ``pulses``: the seconds for which each part has not answered, by its name
        - ``links``: whether each connection is up, by its name
        - ``resident``: the resident memory in bytes
        - ``limits``: the present value and the limit, a pair each, by the limit's name
        - ``error``: the last error that was logged, or None: ``at``, in seconds of Unix time,
          ``logger``, ``class`` of the exception or None, and ``text``, the first line

        The first is sent before this returns.

        Args:
            collect: returns what this kind of process adds to ``counts``, ``resident`` and
                ``error``, given the seconds since the report before.
        """
        began = time.monotonic()

        def whole(seconds: float) -> dict[str, Any]:
            return {
                "counts": metrics.snapshot(),
                "resident": resident_bytes(),
                "error": self._error(),
                **collect(seconds),
            }

        def send(seconds: float) -> bool:
            try:
                report = whole(seconds)
            except Exception:
                self._logger.exception("cannot report to the parent process")
                report = {}
            self._writer.report(report)
            return all(report.get("links", {}).values())

        def run(are_up: bool) -> None:
            before = began
            while True:
                are_up = are_up or before - began > _AT_FIRST
                time.sleep(_EVERY if are_up else _EVERY_AT_FIRST)
                now = time.monotonic()
                are_up |= send(now - before)
                before = now

        threading.Thread(target=run, args=(send(0.0),), name="outbox-pulse", daemon=True).start()

        def report_last() -> None:
            # What was counted in the last second; the base of the parent's sums has it then.
            with contextlib.suppress(Exception):
                self._writer.report(whole(0.0))

        process.at_exit(report_last)

    def _error(self) -> dict[str, Any] | None:
        found = self._last_error.found
        if found is None:
            return None
        return {
            "at": found.at,
            "logger": found.logger,
            "class": found.raised,
            "text": found.text,
        }

    def stop_with_parent(
        self, stop: Stop, grace: float, on_dump: Callable[[], object] = lambda: None
    ) -> None:
        """Request a stop when the parent dies, and exit forcibly ``grace`` seconds later.

        If the parent lets the process leave or be quiet, request that.

        Args:
            stop: the request.
            grace: the seconds.
            on_dump: logs what the process does besides the stacks of its threads; called on a
                thread that is there for that and for the parent's death.
        """

        def stop_gracefully() -> None:
            self._logger.warning("the parent process has died; stopping")
            stop.ask()
            time.sleep(grace)

        def on_word(word: bytes) -> None:
            if word == LEAVE:
                stop.leave()
            elif word == QUIET:
                stop.be_quiet()
            elif word == DUMP:
                self._dump()
                try:
                    on_dump()
                except Exception:
                    self._logger.exception("cannot dump")

        self._parent.when_gone(stop_gracefully, on_word)


class SupervisedSignals(Signals):
    """The signals of a supervised process: SIGHUP is its parent's to handle."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, supervised: Supervised) -> None:
        """Let a signal end the process until ``begin()``: until then there is nothing to finish."""
        super().__init__(second_exits=None)
        self._supervised = supervised
        handle(signal.SIGTERM, signal.SIG_DFL)
        handle(signal.SIGINT, signal.SIG_DFL)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ignore(signal.SIGHUP)

    def begin(self) -> None:
        """Install the signal handlers, and report that the application is imported."""
        super().begin()
        self._supervised.say(LOADED)


def _leave_quiet_to_parent() -> None:
    """Have SIGTSTP, which may be sent to a whole group, quieten the service and suspend nothing."""
    if not os.isatty(0):
        ignore(signal.SIGTSTP)
