"""Requests to stop, by a signal or otherwise, and signal handlers that children don't inherit.

A program that a handler starts, and a child that it forks, react to signals as if outbox weren't
there. ``exec`` keeps an ignored signal ignored, but resets a function to the default: so outbox
ignores signals only with a function. A fork keeps functions, and so a forked child gets back what
they have replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

__all__ = ["BURST", "Signals", "Stop", "handle", "ignore", "note_stop", "set_stop_received"]

BURST = 1.0
"""Seconds after the first signal in which further ones mean the same.

A terminal signals a whole group, whose runner passes the signal on; systemd sends SIGHUP after
SIGTERM; ``timeout`` signals its child and then the group.
"""

stop_received = False
"""Whether a signal has asked this process to stop.

Set as soon as the signal arrives, so before anything that the same signal has ended elsewhere, such
as a program of the same process group, is seen to have ended.
"""

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int

_ours: dict[int, _Handler] = {}
_replaced: dict[int, _Handler] = {}
"""The handlers that a forked child gets back."""


def handle(number: int, handler: _Handler) -> None:
    """Set the handler of a signal in this process, but not in those that it forks.

    Must be called on the main thread. A signal that the process has been started with as ignored is
    handled all the same.
    """
    before = signal.signal(number, handler)
    if before is not None and _ours.get(number) is not before:
        _replaced[number] = before
    _ours[number] = handler


def ignore(number: int) -> None:
    """Have no effect on this process by a signal; programs that it starts aren't deaf to it."""
    handle(number, _do_nothing)
    signal.siginterrupt(number, False)  # the application's libraries must not see it either


def note_stop(number: int) -> None:
    """Only note in ``stop_received`` that a signal has arrived, which another process acts on."""
    handle(number, _note_stop)
    signal.siginterrupt(number, False)


class Stop:
    """A request to stop what runs in this process.

    Attributes:
        asked: whether it was made.
        leaving: whether what runs is to be finished, however long it takes, and nothing begun.
        quiet: whether nothing is to be begun, and the process stays.
    """

    def __init__(self) -> None:
        self.asked = False
        self.leaving = False
        self.quiet = False

    def ask(self) -> None:
        """Request an orderly stop. May be called from anywhere, any number of times."""
        self.asked = True

    def leave(self) -> None:
        """Request that nothing more is begun. May be called from anywhere, any number of times."""
        self.leaving = True

    def be_quiet(self) -> None:
        """Request that nothing is begun and the process stays. May be called from anywhere."""
        self.quiet = True

    def begin(self) -> None:
        """Note that from now on there is something to finish."""


class Signals(Stop):
    """A stop requested by SIGTERM, SIGINT, or SIGHUP unless that is ignored (as under nohup).

    A handler may interrupt anything, even the taking of a lock, so it takes none itself. Until
    ``begin()``, which the main thread must call, signals do what they did before.

    Attributes:
        numbers: the signals.
    """

    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, *, second_exits: int | None) -> None:
        """Create a request that signals make from ``begin()`` on.

        Args:
            second_exits: the code with which a second signal ends the process at once, if it comes
                at least ``BURST`` seconds after the first; None for no effect.
        """
        super().__init__()
        self._second_exits = second_exits
        self._first_at: float | None = None

    def begin(self) -> None:
        """Install the signal handlers."""
        for number in self.numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                handle(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        _note_stop(number, frame)
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        elif self._second_exits is not None and now - self._first_at >= BURST:
            os._exit(self._second_exits)
        self.ask()


def set_stop_received() -> None:
    """Take a signal to have arrived: another process has received it, and says so."""
    global stop_received
    stop_received = True


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _note_stop(_number: int, _frame: FrameType | None) -> None:
    set_stop_received()


_masks: dict[int, set[int]] = {}
"""The signal masks of the threads that are forking."""


def _before_fork() -> None:
    # A signal that reaches the child before _after_fork_in_child() would be lost, and its sender,
    # such as multiprocessing's terminate(), may wait for its effect without a limit.
    if _ours:
        _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _ours)


def _after_fork_in_parent() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    global stop_received
    stop_received = False
    for number, handler in _replaced.items():
        # The application may have set its own handler since.
        if signal.getsignal(number) == _ours[number]:
            with contextlib.suppress(ValueError):  # a fork in a subinterpreter
                signal.signal(number, handler)
    _ours.clear()
    _replaced.clear()
    _after_fork_in_parent()
    _masks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
