"""The messages in the queue of a recurring task, and the queues' names. No I/O.

One message is the *schedule*: its text, the time of the next tick, and that of the last one. All
others are *hellos* of workers, with an id. See :mod:`tick_queue` for what becomes of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass
from typing import Any

from outbox.errors import UsageError

__all__ = [
    "HELLO",
    "KNOWN_TASK",
    "SCHEDULE",
    "Hello",
    "Planned",
    "read_message",
    "register_queue",
    "tick_queue_name",
]

HELLO, SCHEDULE, KNOWN_TASK = "outbox.hello", "outbox.schedule", "outbox.recurring"
"""AMQP's ``type`` of the messages: the third is in the register of a queue of tasks."""

_LONGEST = 64 * 1024  # bytes
_LONGEST_NAME = 255  # AMQP 0-9-1: a short string


@dataclass(frozen=True, slots=True)
class Planned:
    """The schedule of a task, as its message has it.

    Attributes:
        text: the text of the schedule.
        next_at: the time of the next tick.
        last_at: the time of the last one, or None.
    """

    text: str
    next_at: datetime.datetime
    last_at: datetime.datetime | None = None

    def ticked(self, tick: datetime.datetime, next_at: datetime.datetime) -> Planned:
        """Return what follows from the tick at a time."""
        return dataclasses.replace(self, last_at=tick, next_at=next_at)

    def merged(self, other: Planned) -> Planned:
        """Return the one that counts of two: the later one, so that no tick is repeated."""
        return max(self, other, key=lambda each: each.next_at)

    def body(self) -> bytes:
        """Return it as the body of a message."""
        last = None if self.last_at is None else self.last_at.isoformat()
        planned = {"schedule": self.text, "next": self.next_at.isoformat(), "last": last}
        return json.dumps(planned).encode()


@dataclass(frozen=True, slots=True)
class Hello:
    """The hello of a worker."""

    id: str

    def body(self) -> bytes:
        """Return it as the body of a message."""
        return json.dumps({"hello": self.id}).encode()


def read_message(body: bytes) -> Planned | Hello | None:
    """Return what a message is; None if it is neither, but what others have put there."""
    if len(body) > _LONGEST:
        return None
    try:
        read: Any = json.loads(body)
        if type(read["hello" if "hello" in read else "schedule"]) is not str:
            return None
        if "hello" in read:
            return Hello(read["hello"])
        last = read.get("last")
        return Planned(
            read["schedule"], _instant(read["next"]), None if last is None else _instant(last)
        )
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None


def _instant(text: str) -> datetime.datetime:
    moment = datetime.datetime.fromisoformat(text)
    if moment.utcoffset() is None or not 1970 <= moment.year < 9000:
        raise ValueError("not a time with an offset")
    return moment.astimezone(datetime.UTC)


def tick_queue_name(queue: str, name: str) -> str:
    """Return the name of the queue of a recurring task.

    Raises:
        UsageError: it is too long.
    """
    full = f"{queue}.every.{name}"
    if len(full.encode()) > _LONGEST_NAME:
        raise UsageError(
            f"the queue {full:.60}... of the recurring task {name:.60} would have a name of more "
            f"than {_LONGEST_NAME} bytes; give the task a shorter one, @task(name=...)"
        )
    return full


def register_queue(queue: str) -> str:
    """Return the name of the queue that names the recurring tasks of ``queue``."""
    return f"{queue}.every"
