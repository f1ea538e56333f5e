"""Decides which failures of a broker or database are worth a log line, for all links to it.

The rules: a line when an outage begins, when its reason changes, and then once a minute, with how
long it has lasted and how many events are kept. Several links to one broker share its outage (a
worker has two), which ends when one of them works again. A relay's database is such a broker, too.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from outbox.system import process

__all__ = ["Outages", "outages"]

_REMINDED_EVERY = 60.0  # seconds
_NUMBERS = re.compile(r"\d+(\.\d+)?")

Kept = Callable[[], int]
"""Returns the number of events that the user of a link keeps."""


@dataclass(slots=True)
class _Outage:
    """An outage; the reasons without numbers, which may differ each time, by host."""

    since: float
    logged_at: float
    reasons: dict[str, str] = field(default_factory=dict)
    links: weakref.WeakKeyDictionary[Any, Kept | None] = field(
        default_factory=weakref.WeakKeyDictionary
    )


class Outages:
    """The present outages of a process. Thread-safe; no I/O."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.forget_all()

    def forget_all(self) -> None:
        """Start afresh, in a forked child."""
        self._lock = threading.Lock()
        self._outages: dict[object, _Outage] = {}

    def failed(
        self, broker: object, host: str, reason: str, link: object, kept: Kept | None
    ) -> str:
        """Note a failure; return the text to log, or "" if it has been said.

        Args:
            broker: what identifies the broker.
            host: the host that failed, one of the broker's.
            reason: why.
            link: the link that failed.
            kept: returns the number of events that the link's user keeps; None if it keeps none.
        """
        now = self._clock()
        plain = _NUMBERS.sub("#", reason)
        with self._lock:
            outage = self._outages.get(broker)
            if outage is None:
                outage = self._outages[broker] = _Outage(now, now)
            outage.links[link] = kept
            is_new = outage.reasons.get(host) != plain
            if not is_new and now - outage.logged_at < _REMINDED_EVERY:
                return ""
            outage.reasons[host] = plain
            outage.logged_at = now
            seconds = now - outage.since
            counts = [count for count in outage.links.values() if count is not None]
        if seconds < 1:
            return reason
        kept_now = f", {sum(count() for count in counts)} event(s) kept" if counts else ""
        return f"{reason}; down for {seconds:.0f} s{kept_now}"

    def ended(self, broker: object) -> float:
        """Note that a link to ``broker`` works; return the seconds of the outage, 0 without one."""
        with self._lock:
            outage = self._outages.pop(broker, None)
        return 0.0 if outage is None else self._clock() - outage.since

    def left(self, broker: object, link: object) -> None:
        """Note that ``link`` has been stopped; without links there is no outage."""
        with self._lock:
            outage = self._outages.get(broker)
            if outage is not None:
                outage.links.pop(link, None)
                if not outage.links:
                    del self._outages[broker]


outages = Outages()
"""The outages of this process."""

process.after_fork(outages.forget_all)
