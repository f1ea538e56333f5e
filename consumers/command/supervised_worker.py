"""A worker process under a supervisor: reports to it, and stops if it dies."""

from __future__ import annotations

import argparse
import logging
import signal
import time

from outbox.consumers.command import worker_main
from outbox.consumers.command.framework import Framework
from outbox.consumers.losses.begun_table import BegunTable
from outbox.system.child_process import Parent
from outbox.system.signals import Signals, Stop, handle, ignore

__all__ = ["LOADED", "MARGIN", "READY", "RETIRE", "RETIRING", "STOPPING", "run", "stop_with"]

logger = logging.getLogger("outbox.consumer")

LOADED, READY, RETIRING, STOPPING = b"l", b"c", b"r", b"s"
"""The reports of a worker process: it has imported the application; it consumes; it only finishes
what runs, and is to be replaced; it has begun to stop."""

RETIRE = b"r"
"""The word of its parent: begin nothing more, and end when what runs has ended."""

MARGIN = 10.0
"""Seconds beyond the shutdown timeout after which a stopping worker process is killed.

They cover closing its connections and draining its publisher, which have timeouts as well.
"""


def run(options: argparse.Namespace, parent: Parent, framework: Framework | None = None) -> int:
    """Run a worker process; return its exit code.

    A repeated signal has no effect on it: a terminal or systemd may signal both the parent and its
    children, to which the parent sends a signal as well. Only the parent kills a worker at once.
    """
    # Until the worker starts there is nothing to finish: a signal ends the process.
    handle(signal.SIGTERM, signal.SIG_DFL)
    handle(signal.SIGINT, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ignore(signal.SIGHUP)  # the parent handles it
    stop = _WorkerSignals(parent)
    stop_with(parent, stop, options.shutdown_timeout + MARGIN)
    begun = BegunTable.inherited()

    def work() -> int:
        return worker_main.run(
            options,
            stop,
            on_ready=lambda: parent.report(READY),
            on_retiring=lambda: parent.report(RETIRING),
            on_stopping=lambda: parent.report(STOPPING),
            begun=begun,
            framework=framework,
        )

    if not options.reload:
        return work()
    from outbox.consumers.command.autoreload import run_reloading

    return run_reloading(work, stop, options.shutdown_timeout + MARGIN)


class _WorkerSignals(Signals):
    """The signals of a worker process: SIGHUP is its parent's to handle."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, parent: Parent) -> None:
        super().__init__(second_exits=None)
        self._parent = parent

    def begin(self) -> None:
        """Install the signal handlers, and report that the application is imported."""
        super().begin()
        self._parent.report(LOADED)


def stop_with(parent: Parent, stop: Stop, grace: float) -> None:
    """Request a stop when the parent dies, and exit forcibly ``grace`` seconds later.

    If the parent lets the process retire, request that.
    """

    def stop_gracefully() -> None:
        logger.warning("the parent process has died; stopping")
        stop.ask()
        time.sleep(grace)

    def on_word(word: bytes) -> None:
        if word == RETIRE:
            stop.retire()

    parent.when_gone(stop_gracefully, on_word)
