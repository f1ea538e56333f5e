"""The id of this process, and hooks for a fork and for the exit, also under uWSGI."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["after_fork", "at_exit", "pid"]

pid = os.getpid()
"""The id of this process, also in a forked child, without a system call each time."""

_after_fork: list[Callable[[], object]] = []
_at_exit: list[Callable[[], object]] = []


def after_fork(function: Callable[[], object]) -> None:
    """Call ``function`` in every forked child, in the order of registration.

    It may be called twice in a child.
    """
    _after_fork.append(function)


def at_exit(function: Callable[[], object]) -> None:
    """Call ``function`` when the interpreter exits, before functions registered earlier.

    Like :mod:`atexit`, but also where uWSGI ends a worker without running that. It may be called
    twice.
    """
    _at_exit.append(function)
    atexit.register(function)


def _forked() -> None:
    global pid
    pid = os.getpid()
    for hook in _after_fork:
        hook()


def _follow_uwsgi() -> None:
    """Hook into uWSGI's forks and exits: it does not always run Python's own hooks."""
    uwsgi: Any = sys.modules["uwsgi"]
    _chain(uwsgi, "atexit", lambda: _at_uwsgi_exit(uwsgi))
    with contextlib.suppress(Exception):  # it raises without a master process
        importlib.import_module("uwsgidecorators").postfork(_forked)
        return
    _chain(uwsgi, "post_fork_hook", _forked)


def _at_uwsgi_exit(uwsgi: Any) -> None:
    # uWSGI's own loops end by exit(3), and this option skips the interpreter's teardown. Otherwise
    # Python's exit hooks run a moment later, and the application's may still publish.
    if getattr(uwsgi, "loop", None) or "skip-atexit-teardown" in getattr(uwsgi, "opt", ()):
        for hook in reversed(_at_exit):
            hook()


def _chain(module: Any, name: str, function: Callable[[], object]) -> None:
    """Make a hook of ``module`` call ``function`` too, after what it calls already."""
    before = getattr(module, name, None)

    def hook() -> None:
        if before is not None:
            before()
        function()

    setattr(module, name, hook)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
if "uwsgi" in sys.modules:
    _follow_uwsgi()
