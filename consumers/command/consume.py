"""``outbox-consume``: runs consumers until it is stopped."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from outbox import MissingExtra, UsageError, exit_codes
from outbox.consumers import logs
from outbox.consumers.command import supervised_worker, worker_main
from outbox.consumers.command.arguments import limits_of, make_parser
from outbox.consumers.command.framework import Framework
from outbox.consumers.losses.begun_keeper import BegunKeeper
from outbox.service.faces import faces_of
from outbox.service.health.stacks import dump_on_signal
from outbox.service.parent import supervise
from outbox.service.policy_options import has_policy
from outbox.service.state import Face
from outbox.service.supervised import MARGIN
from outbox.system.child_process import Parent
from outbox.system.first_process import leave_work_to_child
from outbox.system.signals import Signals

__all__ = ["main"]

logger = logging.getLogger("outbox.consumer")


def main(
    arguments: Sequence[str] | None = None,
    *,
    prog: str = "outbox-consume",
    framework: Framework | None = None,
) -> int:
    """Run the command and return its exit code, one of ``outbox.exit_codes``.

    Worker processes run the same command line as this process, each in a new interpreter: a program
    that calls ``main`` runs again in each of them, from its beginning. In a container's first
    process, all this happens in a child.

    Args:
        arguments: the command line; the default is that of the process.
        prog: how the command is called, for its help.
        framework: what the project of a framework adds to the command.
    """
    leave_work_to_child()
    parent = Parent.inherited()
    if parent is None:
        dump_on_signal()
    options = make_parser(prog, framework).parse_args(arguments)
    logs.set_up(options.log_level, options.log_format)
    if parent is not None:
        try:
            return supervised_worker.run(options, parent, framework)
        except MissingExtra as error:
            print(f"{prog}: {error}", file=sys.stderr)
            return exit_codes.USAGE
    try:
        faces = _faces(options)
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return exit_codes.USAGE
    if faces or _is_supervised(options):
        return supervise(
            options,
            faces,
            logger=logging.getLogger("outbox.consumer.processes"),
            keeper=_keeper(options),
        )
    return worker_main.run(
        options,
        Signals(second_exits=exit_codes.KILLED),
        on_stopping=lambda: _exit_within(options.shutdown_timeout + MARGIN),
        framework=framework,
    )


def _exit_within(seconds: float) -> None:
    """Force this process to exit if it takes longer, as a parent does with a worker process.

    At its end the interpreter waits for the threads of executors, and so for the function that a
    cancelled ``asyncio.to_thread`` still runs.
    """

    def force_exit() -> None:
        time.sleep(seconds)
        logger.error("shutdown timed out; exiting forcibly")
        os._exit(exit_codes.UNFINISHED)

    threading.Thread(target=force_exit, name="outbox-end", daemon=True).start()


def _keeper(options: argparse.Namespace) -> BegunKeeper | None:
    places = 2 * (options.threads + options.concurrency)
    try:
        return BegunKeeper(options.processes or 1, places)
    except OSError as error:
        logger.warning("no memory to share with the workers, so they can't see losses: %s", error)
        return None


def _faces(options: argparse.Namespace) -> list[Face]:
    """Return what shows the service to the outside.

    Raises:
        UsageError: the id or the address can't be taken, or options contradict each other.
    """
    modules = {consumers.partition(":")[0] for consumers in options.consumers}
    if not modules and (settings := os.environ.get("DJANGO_SETTINGS_MODULE")):
        modules = {settings}
    if options.id is not None and options.reload:
        raise UsageError("--reload is for development, and can't be used with --id")
    return faces_of(options, sorted(modules))


def _is_supervised(options: argparse.Namespace) -> bool:
    return bool(options.processes or options.reload or has_policy(options) or limits_of(options))
