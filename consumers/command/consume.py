"""``outbox-consume``: runs consumers until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from outbox import MissingExtra, exit_codes
from outbox.consumers import logs
from outbox.consumers.command import supervised_worker, worker_main
from outbox.consumers.command.arguments import limits_of, make_parser
from outbox.consumers.command.supervised_worker import MARGIN
from outbox.consumers.command.supervisor import Supervisor
from outbox.system.child_process import Parent
from outbox.system.signals import Signals

__all__ = ["main"]

logger = logging.getLogger("outbox.consumer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, one of ``outbox.exit_codes``.

    With worker processes those run the same command as this process does, in interpreters of their
    own: a program that calls ``main`` is run again in each, from its beginning.
    """
    parent = Parent.inherited()
    options = make_parser().parse_args(arguments)
    logs.set_up(options.log_level, options.log_format)
    if parent is not None:
        try:
            return supervised_worker.run(options, parent)
        except MissingExtra as error:
            print(f"outbox-consume: {error}", file=sys.stderr)
            return exit_codes.USAGE
    if _is_supervised(options):
        return Supervisor(
            [sys.executable, *sys.orig_argv[1:]],
            options.processes or 1,
            shutdown_timeout=options.shutdown_timeout,
        ).run()
    return worker_main.run(
        options,
        Signals(second_exits=exit_codes.KILLED),
        on_stopping=lambda: _end_within(options.shutdown_timeout + MARGIN),
    )


def _end_within(seconds: float) -> None:
    """End this process by force when it takes longer, as a parent would a worker process.

    An interpreter waits at its end for the threads of executors, and so for whatever a cancelled
    ``asyncio.to_thread`` still does.
    """

    def end() -> None:
        time.sleep(seconds)
        logger.error("it has not ended in time: by force, then")
        os._exit(exit_codes.UNFINISHED)

    threading.Thread(target=end, name="outbox-end", daemon=True).start()


def _is_supervised(options: argparse.Namespace) -> bool:
    return bool(options.processes or options.reload or limits_of(options))
