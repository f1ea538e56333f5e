"""The protocol of what processes leave in a broker of themselves, to be read by others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

__all__ = ["PresenceRecord", "PresenceRecords"]


class PresenceRecord(NamedTuple):
    """What a process has announced last.

    Attributes:
        announcement: the text.
        ago: the seconds since then, by the clock of the broker; at least 0.
    """

    announcement: str
    ago: float


class PresenceRecords(Protocol):
    """The records of processes, one for each. For one thread.

    Attributes:
        every: the seconds between two announcements of a process, on average.
    """

    every: ClassVar[float]

    def write(self, process: str, announcement: str) -> None:
        """Replace the record of a process, and drop those of processes that are long silent.

        Args:
            process: a text that no other process has, of at most 32 characters.
            announcement: what it announces, at most 4 KiB.

        Raises:
            BrokerError: the broker can't be used now.
        """
        ...

    def read(self) -> Sequence[PresenceRecord]:
        """Return all records, in no order.

        Raises:
            BrokerError: the broker can't be reached.
        """
        ...
