"""The protocol of what a broker has of recurring tasks: how commands list and delete it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from outbox.recurring.recurring_task import TickRecord

__all__ = ["TickRecords"]


class TickRecords(Protocol):
    """The records of the recurring tasks of one queue of tasks, by task. For one thread."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def all(self, queue: str) -> Sequence[TickRecord]:
        """Return the records, by name.

        Args:
            queue: the queue that the tasks' calls go to.

        Raises:
            BrokerError: the broker can't be reached.
        """
        ...

    def forget(self, queue: str, name: str) -> bool:
        """Delete the record of a task; return whether there was one.

        A worker that still has the task makes it anew, and counts from then on.

        Raises:
            BrokerError: the broker can't be reached.
        """
        ...
