"""The id of this process, and hooks for a fork and for the exit, in every kind of process."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = [
    "PARENTS",
    "after_fork",
    "at_exit",
    "hooked_child",
    "pid",
    "run_at_exit",
    "run_exit_hooks_of",
    "vacate",
]

pid = os.getpid()
"""The id of this process, also in a forked child, without a system call each time."""

_after_fork: list[Callable[[], object]] = []
_at_exit: list[Callable[[], object]] = []


def after_fork(function: Callable[[], object]) -> None:
    """Call ``function`` in every forked child, in the order of registration.

    It may be called twice in a child.
    """
    _after_fork.append(function)


def vacate(descriptor: int) -> None:
    """Let go of a descriptor that a forked child has inherited, and keep its number taken.

    Otherwise whatever is at the other end would take the parent to be there until the child has
    ended, too. Objects of the child may still use, or close, the number.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(OSError):  # closed already
        os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


def at_exit(function: Callable[[], object]) -> None:
    """Call ``function`` when the interpreter exits, before functions registered earlier.

    Like :mod:`atexit`, but also where a process ends without running that: see
    :func:`run_exit_hooks_of` and uWSGI. It may be called twice.
    """
    _at_exit.append(function)
    atexit.register(function)


def run_exit_hooks_of(child: Any, package: str) -> None:
    """Run the exit hooks also at the end of ``child``, which is this process.

    Children of multiprocessing, billiard and Celery end by ``os._exit``, which skips :mod:`atexit`.
    Nothing can be done for other programs that call it, such as RQ's job processes.

    Args:
        child: the current process, of ``package``.
        package: one of :data:`PARENTS`.
    """
    global hooked_child
    hooked_child = child
    util: Any = importlib.import_module(f"{package}.util")
    util.Finalize(None, run_at_exit, exitpriority=_EXIT_PRIORITY)
    celery: Any = sys.modules.get("celery.signals")
    if celery is not None:  # its pool's children skip what billiard's other children run
        celery.worker_process_shutdown.connect(_on_celery_exit, weak=False)


_EXIT_PRIORITY = -100
"""After all else that runs when a child exits, which may still publish."""

PARENTS = ("multiprocessing", "billiard")
"""The packages whose children skip :mod:`atexit`."""

hooked_child: Any = None
"""The child whose end is hooked."""


def _on_celery_exit(**_: object) -> None:
    run_at_exit()


def run_at_exit() -> None:
    """Run the exit hooks, the latest first."""
    for hook in reversed(_at_exit):
        hook()


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
        run_at_exit()


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
