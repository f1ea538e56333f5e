"""How much of a queue to claim ahead, by the pace at which its messages are settled."""

from __future__ import annotations

__all__ = ["Pace"]

_AHEAD = 0.05
"""The seconds of work to claim ahead: more would begin late, when something urgent is due."""
_WINDOW = 0.02
"""The seconds, at least, of one measurement."""


class Pace:
    """The pace of one queue in this worker. For one thread; ``now`` is any monotonic time.

    Attributes:
        limit: how many messages may be held: one for each place, and what all places settle in
            about 50 ms.
    """

    def __init__(self, places: int) -> None:
        """Begin without a measurement: with one message for each of ``places``."""
        self.limit = places
        self._places = places
        self._settled = 0
        self._since: float | None = None

    def note(self, settled: int, held: int, now: float) -> None:
        """Note how many messages were settled, and how many are held from now on."""
        if self._since is None:
            self._since = now if held else None
            return
        self._settled += settled
        seconds = now - self._since
        if self._settled and seconds >= _WINDOW:
            self.limit = self._places + int(_AHEAD * self._settled / seconds)
            self._settled, self._since = 0, now
        if not held:
            # Nothing is done from here on: that says nothing about the pace.
            self._settled, self._since = 0, None
