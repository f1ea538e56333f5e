"""A chunk: the events that one caller publishes together, each with its own fate."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from outbox.errors import BrokerError
from outbox.event import Event
from outbox.report import PublishReport, Rejection, Withdrawn

__all__ = ["Chunk", "Entry", "Fate"]


class Fate(enum.Enum):
    """The final result of an entry; without one, it is still in the backlog."""

    PUBLISHED = "published"
    PARKED = "parked"
    IGNORED = "ignored"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"


class Entry:
    """One event of a chunk, in the publisher.

    Attributes:
        event: the event to publish.
        parked_as: the event published instead because this one is unroutable, or None.
        delayed_as: the event published instead until this one is due, or None.
        chunk: the chunk it belongs to.
        frames: its encoded form, made in the caller's thread; empty if the transport needs none.
        fate: its fate; None until it is final.
        reason: the reason for a fate that needs one.
        kept: whether its chunk was reported before its fate was known; it stays in the publisher.
        attempts: how often the broker has nacked it.
    """

    __slots__ = (
        "attempts",
        "chunk",
        "delayed_as",
        "event",
        "fate",
        "frames",
        "kept",
        "parked_as",
        "reason",
    )

    def __init__(self, event: Event, chunk: Chunk, frames: bytes) -> None:
        self.event = event
        self.parked_as: Event | None = None
        self.delayed_as: Event | None = None
        self.chunk = chunk
        self.frames = frames
        self.fate: Fate | None = None
        self.reason = ""
        self.kept = False
        self.attempts = 0

    @property
    def sent_as(self) -> Event:
        """The event in the frames."""
        return self.parked_as or self.delayed_as or self.event


class Chunk:
    """Events in order, and the future of their report.

    Not thread-safe: the lock of its backlog guards it.

    Attributes:
        entries: one entry per event, in the order given.
        keep: whether what is not confirmed stays in the publisher; False to withdraw it.
        reported: the report, once there is one. From then on thread-safe, as are ``on_reported``
            and ``future`` always.
        waiting: the number of entries that are neither kept nor have a fate; at 0 the chunk is
            reported.
        error: the reason why entries are kept or withdrawn.
        submitted_at: the time of submission, by the backlog's clock.
        took: seconds until all entries had a fate; None if the chunk was reported before that.
    """

    __slots__ = (
        "_future",
        "_listeners",
        "entries",
        "error",
        "keep",
        "reported",
        "submitted_at",
        "took",
        "waiting",
    )

    def __init__(
        self, events: Sequence[Event], *, keep: bool = True, frames: Sequence[bytes] | None = None
    ) -> None:
        encoded = frames if frames is not None else [b""] * len(events)
        self.entries = [
            Entry(event, self, data) for event, data in zip(events, encoded, strict=True)
        ]
        self.keep = keep
        self.reported: PublishReport | None = None
        self._listeners: list[Callable[[PublishReport], object]] = []
        self._future: Future[PublishReport] | None = None
        self.waiting = len(self.entries)
        self.error: BrokerError | None = None
        self.submitted_at = 0.0
        self.took: float | None = None

    @property
    def future(self) -> Future[PublishReport]:
        """The future of the report, which never gets an exception.

        Created at the first access: a listener alone is cheaper.
        """
        future = self._future
        if future is None:
            future = self._future = Future()
            self.on_reported(partial(_resolve, future))
        return future

    def on_reported(self, listener: Callable[[PublishReport], object]) -> None:
        """Call ``listener`` once with the report, at once if there is one.

        It is called on this thread or on that which reports, and must neither wait nor raise.
        """
        self._listeners.append(listener)
        if self.reported is not None:
            self._notify(self.reported)

    def resolve(self, report: PublishReport) -> None:
        """Set ``report``, and call the listeners."""
        self.reported = report
        self._notify(report)

    def _notify(self, report: PublishReport) -> None:
        # Two threads may be here at once; only one of them takes each listener out.
        while self._listeners:
            try:
                listener = self._listeners.pop(0)
            except IndexError:
                break
            listener(report)

    def report(self) -> PublishReport:
        """Return the present fate of every event; those without one count as kept."""
        published = tuple([entry.event for entry in self.entries if entry.fate is Fate.PUBLISHED])
        if len(published) == len(self.entries):
            return PublishReport(published=published, error=self.error)
        by_fate: dict[Fate | None, list[Entry]] = {}
        for entry in self.entries:
            by_fate.setdefault(entry.fate, []).append(entry)

        def events(fate: Fate | None) -> tuple[Event, ...]:
            return tuple(entry.event for entry in by_fate.get(fate, ()))

        return PublishReport(
            published=published,
            kept=events(None),
            parked=events(Fate.PARKED),
            ignored=events(Fate.IGNORED),
            rejected=tuple(
                (Rejection if entry.fate is Fate.REJECTED else Withdrawn)(entry.event, entry.reason)
                for entry in self.entries
                if entry.fate in (Fate.REJECTED, Fate.WITHDRAWN)
            ),
            error=self.error,
        )


def _resolve(future: Future[PublishReport], report: PublishReport) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(report)
