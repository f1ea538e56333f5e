"""A worker that starts again when a source file changes."""

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

_LOOK_EVERY = 200  # milliseconds between two looks at the modules outside the watched folders
_POLL = 0.2  # seconds within which a signal is noticed while there is no worker


def run_reloading(work: Callable[[], int], stop: Stop, timeout: float) -> int:
    """Run ``work`` until a source file changes.

    A worker that cannot start, since a file is wrong, waits for the next change.

    Args:
        work: runs the worker until ``stop`` is asked, and returns its exit code.
        stop: is asked when a file has changed; begun here when the worker cannot start.
        timeout: seconds for the worker to end after a change; then the process exits at once.

    Returns:
        An exit code: ``RECYCLED`` when a file has changed.

    Raises:
        MissingExtra: watchfiles is not installed.
    """
    watcher = _Watcher(stop, timeout)
    code = exit_codes.SUCCESS
    try:
        try:
            code = work()
        except BaseException:  # whatever the application's modules raise
            logger.exception("the worker cannot run")
        if not stop.asked and code != exit_codes.RECYCLED:
            logger.warning("waiting for a source file to change")
            stop.begin()
            while not stop.asked:
                watcher.changed.wait(_POLL)
    finally:
        watcher.close()
    return exit_codes.RECYCLED if watcher.changed.is_set() else code


class _Watcher:
    """A thread that asks for a stop when a source file changes.

    The worker keeps the main thread: an application may handle signals.

    Attributes:
        changed: set when a file has changed.
    """

    def __init__(self, stop: Stop, timeout: float) -> None:
        """Start watching: a change after this call is noticed."""
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
        # Every batch, filtered by nothing, is a chance to look at the other modules. watchfiles
        # logs each, at INFO: also a log in the working directory, which would then never end.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        self._batches = watchfiles.watch(
            *_folders(),
            watch_filter=None,
            stop_event=self._ended,
            rust_timeout=_LOOK_EVERY,
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
            logger.error("changes of source files are not noticed: %s", error)
            return
        finally:
            self._watching.set()
        if path is None:
            return
        logger.info("%s has changed: starting again", path)
        self.changed.set()
        self._stop.ask()
        if not self._ended.wait(self._timeout):
            os._exit(exit_codes.RECYCLED)

    def _next_changed(self) -> str | None:
        """Wait for a change; return the file, or None at the end."""
        times: dict[str, float] = {}
        for changes in self._batches:
            paths = [path for change, path in changes if self._is_source(change, path)]
            path = paths[0] if paths else _newer_module(times)
            if path is not None:
                return path
            self._watching.set()
        return None


def _folders() -> list[str]:
    """Return the working directory and the folders that Python imports from, but not its own."""
    own = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    imported_from = {path for path in sys.path if os.path.isdir(path) and not path.startswith(own)}
    return sorted({os.getcwd(), *imported_from})


def _newer_module(times: dict[str, float]) -> str | None:
    """Return the file of an imported module that has changed since ``times`` first had it."""
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
