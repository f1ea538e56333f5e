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

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import ClassVar

__all__ = ["Pause", "around_fork"]

_LONGEST = 2.0
"""Seconds that a fork waits for a thread, which may be in a slow hook, and a thread for a fork."""

_STEP = 0.0005


class Pause:
    """Where the work of one thread can pause.

    The thread is busy, except in a block ``with pause:``, in which it only waits for work. At the
    end of the block it waits until a fork is over that has begun meanwhile.

    Where waiting isn't a block, the thread sets ``busy`` itself, and calls :meth:`wait` if
    :attr:`forking` is True afterwards.

    Attributes:
        busy: whether the thread works.
        forking: whether the process is about to fork; the same for all threads.
    """

    forking: ClassVar[bool] = False

    def __init__(self) -> None:
        self.busy = True
        self._thread = threading.get_ident()
        _pauses.append(self)

    def __enter__(self) -> None:
        self.busy = False

    def __exit__(self, *_: object) -> None:
        self.busy = True
        if Pause.forking:
            self.wait()

    def end(self) -> None:
        """Forget the thread, which ends."""
        with contextlib.suppress(ValueError):  # in a forked child
            _pauses.remove(self)

    def wait(self) -> None:
        """Wait until the fork is over."""
        began = time.monotonic()
        while Pause.forking and time.monotonic() - began < _LONGEST:
            self.busy = False
            time.sleep(_STEP)
            self.busy = True

    @property
    def delays_fork(self) -> bool:
        """Whether another thread works here."""
        return self.busy and self._thread != threading.get_ident()


_pauses: list[Pause] = []
_around: list[tuple[Callable[[], None], Callable[[], None]]] = []


def around_fork(before: Callable[[], None], after_in_parent: Callable[[], None]) -> None:
    """Have functions called right before each fork, and after it in the parent.

    Unlike those of ``os.register_at_fork``, ``before`` is called when the threads are idle, in
    whichever order modules are imported: so it may take what a thread uses while it works.
    """
    _around.append((before, after_in_parent))


def _before_fork() -> None:
    _have_threads_pause()
    for before, _ in _around:
        before()


def _have_threads_pause() -> None:
    if not _pauses:
        return
    Pause.forking = True
    began = time.monotonic()
    while any(pause.delays_fork for pause in list(_pauses)):
        if time.monotonic() - began > _LONGEST:
            return
        time.sleep(_STEP)


def _after_fork_in_parent() -> None:
    for _, after in _around:
        after()
    Pause.forking = False


def _after_fork_in_child() -> None:
    Pause.forking = False
    _pauses.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
