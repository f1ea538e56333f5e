"""The gate through which messages begin: most side by side, suspects alone.

A *suspect* is a message that was lost with its process, and may be what killed it. It begins when
nothing else runs in its process, and nothing else begins while it runs: if it kills the process
again, no other message loses anything. Three bounds keep it from stopping the others:

- While it waits for those that run to end, nothing begins for at most 30 seconds; then the others
  go on for a minute before it tries again. After ten minutes it begins beside what still runs.
- Once it has run for a minute, the others begin beside it; other suspects wait for their ten
  minutes.
- Between two suspects, messages that were held up begin.

Suspects of which no loss is known, only that the broker has returned them often, run beside each
other where a table would know by the next time which of them was lost: where connections break
often, there may be hundreds.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

__all__ = ["BeginGate", "Suspect"]

_CLOSED = 30.0
_OPEN = 60.0
_LONGEST = 600.0
_ALONE = 60.0

_SETTLED = 0.5
"""Seconds in which nothing runs before a suspect begins: what has just ended is acked meanwhile,
and would be delivered again if the suspect killed the process before that. A broker may take longer
for an ack than for a message."""
_BETWEEN = 0.2
"""Seconds in which messages that were held up may begin between two suspects."""
_JOINED = 2.0
"""Seconds in which suspects that share may join those that run: then the others have their turn."""


class Suspect:
    """A suspect that waits for its turn, or runs.

    Those with fewer losses begin first, since they are less likely to kill the process: as many
    others as possible are done by then.

    Attributes:
        losses: how often it was lost with its process.
        since: the time from which it waits.
        is_harmless: whether it has ended once; it only keeps away from what kills the process.
        shares: whether it may run beside others that share.
    """

    def __init__(
        self, losses: int, since: float, *, is_harmless: bool = False, shares: bool = False
    ) -> None:
        """Create a suspect that waits since ``since``, and was lost ``losses`` times."""
        self.losses = losses
        self.since = since
        self.is_harmless = is_harmless
        self.shares = shares
        self.rank = (losses, random.random())  # in no order that killed the process before


class BeginGate:
    """The messages that run in a process, and the suspects that wait to run alone. Thread-safe.

    Nothing blocks: what may not begin yet has to ask again. The ordinary path takes no lock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an open gate, with nothing running."""
        self._clock = clock
        self._running: list[None] = []  # as a counter: an append or a pop can't be interrupted
        self._is_closed = False
        self._lock = threading.Lock()
        self._waiting: list[Suspect] = []
        self._alone: set[Suspect] = set()
        self._opens_at = 0.0
        self._closes_at = 0.0
        self._joined_until = 0.0
        self._quiet_since: float | None = None
        self._holds_up = False  # whether a message was refused since the gate was closed

    def begin(self) -> bool:
        """Return whether a message may begin; if so, :meth:`end` must follow."""
        # First counted, then checked: a suspect first closes the gate, then looks at the count.
        self._running.append(None)
        if not self._is_closed:
            return True
        self._running.pop()
        self._holds_up = True
        with self._lock:
            if self._is_closed and self._clock() >= self._opens_at:
                self._open(_OPEN)
        return False

    def end(self) -> None:
        """Note that a message has ended."""
        self._running.pop()

    def suspect(self, losses: int, *, is_harmless: bool = False, shares: bool = False) -> Suspect:
        """Return a suspect that waits from now on, until it begins or leaves."""
        waiting = Suspect(losses, self._clock(), is_harmless=is_harmless, shares=shares)
        with self._lock:
            self._waiting.append(waiting)
        return waiting

    def begin_alone(self, suspect: Suspect) -> bool:
        """Return whether ``suspect`` may begin; if so, :meth:`end_alone` must follow."""
        with self._lock:
            now = self._clock()
            is_patient = now < suspect.since + _LONGEST
            if self._may_join(suspect, now):
                self._waiting.remove(suspect)
                self._alone.add(suspect)
                self._running.append(None)
                return True
            if suspect is not min(self._waiting, key=_rank) or (self._alone and is_patient):
                return False
            if not self._is_closed:
                if now < self._closes_at:
                    return False
                self._is_closed = True
                self._holds_up = False
                self._quiet_since = None
                self._opens_at = now + _CLOSED
            if self._running:
                self._quiet_since = None
                if is_patient:
                    if now >= self._opens_at:
                        self._open(_OPEN)
                    return False
            else:
                if self._quiet_since is None:
                    self._quiet_since = now
                if now < self._quiet_since + _SETTLED and not suspect.is_harmless:
                    return False
            self._waiting.remove(suspect)
            self._alone.add(suspect)
            self._opens_at = now + _ALONE
            self._joined_until = now + _JOINED
            self._running.append(None)
            return True

    def end_alone(self, suspect: Suspect) -> None:
        """Note that a suspect that ran has ended."""
        with self._lock:
            self._running.pop()
            self._alone.remove(suspect)
            if self._alone and suspect.shares:
                return
            self._quiet_since = None
            self._opens_at = self._clock() + _CLOSED
            if self._holds_up or not self._waiting:
                self._open(_BETWEEN)

    def leave(self, suspect: Suspect) -> None:
        """Forget a suspect that waits no longer, without having begun."""
        with self._lock:
            self._waiting.remove(suspect)
            if not self._waiting and not self._alone:
                self._open(0.0)

    def _may_join(self, suspect: Suspect, now: float) -> bool:
        return (
            suspect.shares
            and self._is_closed
            and now < self._joined_until
            and bool(self._alone)
            and all(each.shares for each in self._alone)
        )

    def _open(self, seconds: float) -> None:
        self._is_closed = False
        self._closes_at = self._clock() + seconds


def _rank(suspect: Suspect) -> tuple[int, float]:
    return suspect.rank
