"""Which process this is, and what becomes of it in a fork."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable

__all__ = ["after_fork", "pid"]

pid = os.getpid()
"""The id of this process, also in a forked child, without asking the system each time."""

_hooks: list[Callable[[], None]] = []


def after_fork(function: Callable[[], None]) -> None:
    """Have ``function`` called in every forked child, in the order of these calls.

    It may be called twice in one child.
    """
    _hooks.append(function)


def _forked() -> None:
    global pid
    pid = os.getpid()
    for hook in _hooks:
        hook()


def _follow_uwsgi() -> None:
    """Have uWSGI's forks noticed: unless told to, it does not run Python's own hooks."""
    uwsgi = sys.modules["uwsgi"]
    with contextlib.suppress(Exception):  # it wants a master process, and says so by raising
        importlib.import_module("uwsgidecorators").postfork(_forked)
        return
    before = getattr(uwsgi, "post_fork_hook", None)

    def hook() -> None:
        if before is not None:
            before()
        _forked()

    setattr(uwsgi, "post_fork_hook", hook)  # noqa: B010  the module has no types


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
if "uwsgi" in sys.modules:
    _follow_uwsgi()
