"""A worker process that has a parent.

It inherits two pipes. Nothing is ever written to the first: when it ends, the parent is dead,
however it died, and the worker stops in order. On the second it tells the parent how far it is.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping

from outbox import exit_codes
from outbox.consumers.command import worker_main
from outbox.system.signals import Signals, Stop

__all__ = ["MARGIN", "READY", "STOPPING", "Parent", "environment", "run"]

logger = logging.getLogger("outbox.consumer")

READY, STOPPING = b"r", b"s"
"""What a worker process tells: that it consumes, and that it has begun to stop."""

MARGIN = 10.0
"""Seconds beyond the shutdown timeout after which a worker process that stops is ended by force.

In them it closes its connections and drains its publisher, which are bounded, too.
"""

_VARIABLE = "_OUTBOX_CONSUME_PARENT"


def environment(lifeline: int, status: int) -> Mapping[str, str]:
    """Return what a worker process finds the descriptors of its two pipes in."""
    return {_VARIABLE: f"{lifeline}:{status}"}


class Parent:
    """The parent, as a worker process knows it."""

    def __init__(self, lifeline: int, status: int) -> None:
        """Take over the descriptors; no process that is started from here inherits them."""
        os.set_inheritable(lifeline, False)
        os.set_inheritable(status, False)
        self._lifeline = lifeline
        self._status = status

    @classmethod
    def inherited(cls) -> Parent | None:
        """Return the parent that has started this process as a worker, or None."""
        found = os.environ.pop(_VARIABLE, "")
        if not found:
            return None
        lifeline, _, status = found.partition(":")
        return cls(int(lifeline), int(status))

    def tell(self, what: bytes) -> None:
        """Tell how far the worker is: ``READY`` or ``STOPPING``."""
        with contextlib.suppress(OSError):  # it is dead: that is noticed elsewhere
            os.write(self._status, what)

    def outlived(self, stop: Stop, grace: float) -> None:
        """Ask ``stop`` when the parent dies, and end this process ``grace`` seconds after that."""
        threading.Thread(
            target=self._watch, args=(stop, grace), name="outbox-parent", daemon=True
        ).start()

    def _watch(self, stop: Stop, grace: float) -> None:
        os.read(self._lifeline, 1)
        logger.warning("the parent process is gone: stopping")
        stop.ask()
        time.sleep(grace)
        os._exit(exit_codes.KILLED)


def run(options: argparse.Namespace, parent: Parent) -> int:
    """Run a worker process; return its exit code.

    Signals are idempotent in it: a terminal, or systemd, sends them to the parent and to its
    children, and so does the parent. It is the parent that ends a worker at once.
    """
    # As long as there is nothing to finish.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent's to act on
    stop = Stop() if options.reload else Signals(second_exits=None)
    parent.outlived(stop, options.shutdown_timeout + MARGIN)

    def work() -> int:
        return worker_main.run(
            options,
            stop,
            on_ready=lambda: parent.tell(READY),
            on_stopping=lambda: parent.tell(STOPPING),
        )

    if not options.reload:
        return work()
    from outbox.consumers.command.autoreload import run_reloading

    return run_reloading(work, stop, options.shutdown_timeout + MARGIN)
