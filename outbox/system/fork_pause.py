"""Keeps outbox's threads idle while the process forks.

A child has only the thread that forks. A lock that another thread holds at that moment stays taken
in the child forever, and most of them aren't outbox's: those of the standard streams, of a log
handler, of the memory allocator of a library. So before a fork, each of outbox's threads finishes
what it does, and waits.

The forking thread takes no lock to achieve that: a signal handler may interrupt it at any moment.
Both sides first say what they do and then look at what the other one does, and both give up after
a bounded time.
"""

from __future__ import annotations

import os
import threading
import time

__all__ = ["idle", "register", "unregister", "working"]

_LONGEST = 2.0
"""Seconds that a fork waits for a thread, which may be in a slow hook, and a thread for a fork."""

_STEP = 0.0005

_busy: dict[int, bool] = {}
"""Of each thread, by its identifier: whether it works."""

_fork_began = 0.0
"""When the present fork began; 0 if none is under way."""


def register() -> None:
    """Have forks wait while this thread works; it works from now on. Others are ignored."""
    _busy[threading.get_ident()] = True


def unregister() -> None:
    """Forget this thread, which ends."""
    _busy.pop(threading.get_ident(), None)


def working() -> None:
    """Note that this thread works from now on; if a fork is under way, wait for its end."""
    me = threading.get_ident()
    if me not in _busy:
        return
    _busy[me] = True
    while _fork_began and time.monotonic() - _fork_began < _LONGEST:
        _busy[me] = False
        time.sleep(_STEP)
        _busy[me] = True


def idle() -> None:
    """Note that this thread is about to wait, and holds no lock of others meanwhile."""
    me = threading.get_ident()
    if me in _busy:
        _busy[me] = False


def _before_fork() -> None:
    global _fork_began
    if not _busy:
        return
    _fork_began = began = time.monotonic()
    me = threading.get_ident()
    while any(busy for thread, busy in list(_busy.items()) if thread != me):
        if time.monotonic() - began > _LONGEST:
            return
        time.sleep(_STEP)


def _after_fork_in_parent() -> None:
    global _fork_began
    _fork_began = 0.0


def _after_fork_in_child() -> None:
    global _fork_began
    _fork_began = 0.0
    _busy.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
