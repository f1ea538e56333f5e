"""``--reload``: restarts the worker when a source file changes."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable

from outbox import MissingExtra, exit_codes
from outbox.system.signals import Stop

__all__ = ["run_reloading"]

logger = logging.getLogger("outbox.consumer")

_CHECK_EVERY = 200  # milliseconds between checks of the modules outside the watched folders
_POLL = 0.2  # seconds, at most, until a signal is noticed while no worker runs


def run_reloading(work: Callable[[], int], stop: Stop, timeout: float) -> int:
    """Run ``work`` until a source file changes.

    If the worker cannot start, for example because of a syntax error, wait for the next change.

    Args:
        work: the function that runs the worker until ``stop``, and returns its exit code.
        stop: the stop to request after a change; its ``begin()`` is called if the worker fails.
        timeout: the seconds that the worker has to end after a change; then the process exits.

    Returns:
        The exit code: ``RECYCLED`` if a file has changed.

    Raises:
        MissingExtra: watchfiles is not installed.
    """
    watcher = _Watcher(stop, timeout)
    code = exit_codes.SUCCESS
    try:
        try:
            code = work()
        except BaseException:  # whatever the application's modules raise
            logger.exception("the worker has failed")
        if not stop.asked and code != exit_codes.RECYCLED:
            logger.warning("waiting for a source file to change")
            stop.begin()
            while not stop.asked:
                watcher.changed.wait(_POLL)
    finally:
        watcher.close()
    return exit_codes.RECYCLED if watcher.changed.is_set() else code


class _Watcher:
    """A thread that requests a stop when a source file changes.

    The worker keeps the main thread, since only there can an application handle signals.

    Attributes:
        changed: set when a file has changed.
    """

    def __init__(self, stop: Stop, timeout: float) -> None:
        """Start watching; any change after this call is noticed."""
        try:
            import watchfiles
        except ImportError as error:
            raise MissingExtra(
                "--reload needs watchfiles: pip install 'outbox-events[reload]'"
            ) from error
        self.changed = threading.Event()
        self._stop = stop
        self._timeout = timeout
        self._ended = threading.Event()
        self._watching = threading.Event()
        self._is_source = watchfiles.PythonFilter()
        # Unfiltered, so that every batch, even an empty one, leads to a check of the other modules.
        # watchfiles logs each batch at INFO: a log file in a watched folder would cause the next.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        self._batches = watchfiles.watch(
            *_folders(),
            watch_filter=None,
            stop_event=self._ended,
            rust_timeout=_CHECK_EVERY,
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        threading.Thread(target=self._run, name="outbox-reload", daemon=True).start()
        self._watching.wait()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _run(self) -> None:
        try:
            path = self._next_changed()
        except OSError as error:  # such as too few inotify watches
            logger.error("cannot watch source files; changes will go unnoticed: %s", error)
            return
        finally:
            self._watching.set()
        if path is None:
            return
        logger.info("%s has changed; restarting", path)
        self.changed.set()
        self._stop.ask()
        if not self._ended.wait(self._timeout):
            os._exit(exit_codes.RECYCLED)

    def _next_changed(self) -> str | None:
        """Wait for a change; return the path of the file, or None after ``close()``."""
        times: dict[str, float] = {}
        for changes in self._batches:
            paths = [path for change, path in changes if self._is_source(change, path)]
            path = paths[0] if paths else _newer_module(times)
            if path is not None:
                return path
            self._watching.set()
        return None


def _folders() -> list[str]:
    """Return the working directory, and the folders of ``sys.path`` outside Python's own."""
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    folders = {path for path in sys.path if os.path.isdir(path) and not path.startswith(python)}
    return sorted({os.getcwd(), *folders})


def _newer_module(times: dict[str, float]) -> str | None:
    """Return the file of an imported module that has changed since ``times`` recorded it."""
    for module in list(sys.modules.values()):
        path: str | None = getattr(module, "__file__", None)
        if path is not None:
            try:
                changed_at = os.stat(path).st_mtime
            except OSError:  # it is being replaced, or in an archive
                continue
            if times.setdefault(path, changed_at) != changed_at:
                return path
    return None
