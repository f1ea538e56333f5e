"""A worker process that a supervisor has started: it reports to it, and stops when it dies."""

from __future__ import annotations

import argparse
import logging
import signal
import time

from outbox.consumers.command import worker_main
from outbox.system.child_process import Parent
from outbox.system.signals import Signals, Stop

__all__ = ["MARGIN", "READY", "STOPPING", "run", "stop_with"]

logger = logging.getLogger("outbox.consumer")

READY, STOPPING = b"r", b"s"
"""What a worker process reports: that it consumes, and that it has begun to stop."""

MARGIN = 10.0
"""Seconds beyond the shutdown timeout after which a worker process that stops is ended by force.

In them it closes its connections and drains its publisher, which are bounded, too.
"""


def run(options: argparse.Namespace, parent: Parent) -> int:
    """Run a worker process; return its exit code.

    Signals are idempotent in it: a terminal, or systemd, sends them to the parent and to its
    children, and so does the parent. It is the parent that ends a worker at once.
    """
    # As long as there is nothing to finish.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent's to act on
    stop = Signals(second_exits=None)
    stop_with(parent, stop, options.shutdown_timeout + MARGIN)

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


def stop_with(parent: Parent, stop: Stop, grace: float) -> None:
    """Ask ``stop`` when the parent dies, and end this process ``grace`` seconds after that."""

    def stop_in_order() -> None:
        logger.warning("the parent process is gone: stopping")
        stop.ask()
        time.sleep(grace)

    parent.when_gone(stop_in_order)
