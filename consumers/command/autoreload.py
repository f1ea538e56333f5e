"""A worker that begins anew when a source file changes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

from outbox import MissingExtra, exit_codes
from outbox.system.signals import Signals, Stop

__all__ = ["run_reloading"]

logger = logging.getLogger("outbox.consumer")

_CHANGED = 3  # what werkzeug exits with
_IN_CHILD = "WERKZEUG_RUN_MAIN"


def run_reloading(work: Callable[[], int], stop: Stop, timeout: float) -> int:
    """Run ``work`` on a thread, and watch the files of all that is imported or could be.

    A worker that cannot begin, since a file is wrong, is not the end: the next change is waited
    for.

    Args:
        work: runs the worker until ``stop`` is asked, and returns its exit code.
        stop: is asked when a file has changed, and when the process is to end.
        timeout: seconds to wait for the worker then.

    Returns:
        An exit code: ``RECYCLED`` when a file has changed.

    Raises:
        MissingExtra: werkzeug is not installed, or another one than is known.
    """
    try:
        from werkzeug._reloader import run_with_reloader
    except ImportError as error:
        raise MissingExtra(f"--reload needs werkzeug 3: {error}") from error
    codes: list[int] = []
    ended = threading.Event()

    def run() -> None:
        os.environ.pop(_IN_CHILD, None)
        try:
            codes.append(work())
        except BaseException:  # whatever the application's modules raise
            logger.exception("the worker cannot run")
        ended.set()
        if codes == [exit_codes.RECYCLED]:
            os.kill(os.getpid(), signal.SIGTERM)  # to be replaced, though no file has changed
        elif not stop.asked:
            logger.warning("waiting for a source file to change")

    # It is the parent that acts on Ctrl-C, and sends SIGTERM: two exceptions, one after the other,
    # would end the stopping.
    signal.signal(signal.SIGINT, lambda *_: None)
    # That parent is ours, which knows how to stop a worker in order: werkzeug's is told that it is
    # there already, and only watches.
    os.environ[_IN_CHILD] = "true"
    changed = False
    try:
        run_with_reloader(run)  # ends on SIGTERM, too
    except SystemExit as end:
        changed = end.code == _CHANGED
    Signals(second_exits=None).begin()
    stop.ask()
    ended.wait(timeout)
    if changed:
        return exit_codes.RECYCLED
    return codes[0] if codes else exit_codes.SUCCESS
