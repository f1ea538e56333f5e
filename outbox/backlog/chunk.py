"""A chunk: the events that one caller publishes together, each with its own fate."""

from __future__ import annotations

import _thread
import enum
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from outbox.errors import BrokerError
from outbox.event import Event
from outbox.report import PublishReport, Rejection, Withdrawn

__all__ = ["Chunk", "Entry", "Fate", "Holder", "ReportFuture"]


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
        held: whether it is kept because the broker refuses its address for now; set while it is
            kept.
        attempts: how often the broker has nacked it.
        row: where the spool has written it: the file, and its number there; None if it hasn't.
            Only the spool's thread sets it.
        size: the bytes that it takes, as counted when it was kept; set from then on.
    """

    __slots__ = (
        "attempts",
        "chunk",
        "delayed_as",
        "event",
        "fate",
        "frames",
        "held",
        "kept",
        "parked_as",
        "reason",
        "row",
        "size",
    )

    held: bool
    size: int

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
        self.row: tuple[Any, int] | None = None

    @property
    def sent_as(self) -> Event:
        """The event in the frames."""
        return self.parked_as or self.delayed_as or self.event


class Holder(Protocol):
    """The transport that holds a chunk."""

    @property
    def circuit_open(self) -> bool:
        """Whether chunks are reported at once, because the broker is unavailable."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` now: its caller's timeout is over."""
        ...


class Chunk:
    """Events in order, and the future of their report.

    Two threads work on it: the caller that submits it, and the transport's, which sends it. They
    share no lock, since the caller may be interrupted anywhere: by a signal handler that raises, or
    that publishes itself, or by a finalizer. Instead each decision is made by taking a token out of
    a list, which only one of the two can do.

    Attributes:
        entries: one entry per event, in the order given.
        keep: whether what is not confirmed stays in the publisher; False to withdraw it.
        holder: the transport that it was prepared for; set before it is handed in.
        quiet: whether events that have to be kept are not logged, because it was submitted while
            the publisher wrote a log line or called a hook: a handler that publishes each line
            would be called for ever.
        reported: the report, once there is one. From then on thread-safe, as are ``on_reported``
            and ``future`` always.
        waiting: the number of entries that are neither kept nor have a fate; at 0 the chunk is
            reported.
        error: the reason why entries are kept or withdrawn.
        size: the bytes that the events take.
        submitted_at: the time of submission, by the backlog's clock.
        took: seconds until all entries had a fate; None if the chunk was reported before that.
        trace: what a tracer remembers with it; set by the tracer, if there is one.
    """

    __slots__ = (
        "_future",
        "_listeners",
        "_submissions",
        "_to_report",
        "entries",
        "error",
        "holder",
        "keep",
        "quiet",
        "reported",
        "size",
        "submitted_at",
        "took",
        "trace",
        "waiting",
    )

    holder: Holder
    trace: object

    def __init__(
        self, events: Sequence[Event], *, keep: bool = True, frames: Sequence[bytes] | None = None
    ) -> None:
        encoded = frames if frames is not None else [b""] * len(events)
        self.entries = [
            Entry(event, self, data) for event, data in zip(events, encoded, strict=True)
        ]
        self.size = sum(map(len, encoded))
        self.keep = keep
        self.quiet = False
        self.reported: PublishReport | None = None
        self._submissions = [None]
        self._to_report = [None]
        self._listeners: list[Callable[[PublishReport], object]] = []
        self._future: Future[PublishReport] | None = None
        self.waiting = len(self.entries)
        self.error: BrokerError | None = None
        self.submitted_at = 0.0
        self.took: float | None = None

    def accept(self) -> bool:
        """Decide that the events are submitted; return False if the caller has revoked them."""
        return _take_token(self._submissions)

    def revoke(self) -> bool:
        """Decide that the events are not submitted; return False if they have been accepted.

        For a caller whose handing over was ended by an exception: it then still has the events.
        """
        return _take_token(self._submissions)

    def claim_report(self) -> bool:
        """Return whether it is the caller who must report the chunk, True only once."""
        return _take_token(self._to_report)

    @property
    def claimed(self) -> bool:
        """Whether the chunk is reported, or about to be."""
        return not self._to_report

    @property
    def future(self) -> Future[PublishReport]:
        """The future of the report, which never gets an exception.

        Created at the first access: a listener alone is cheaper.
        """
        future = self._future
        if future is None:
            future = self._future = ReportFuture()
            self.on_reported(partial(_resolve, future))
        return future

    def wait(self, timeout: float) -> PublishReport | None:
        """Wait at most ``timeout`` seconds for the report; return it if there is one.

        An exception that a signal handler raises ends the wait, and leaves nothing locked.
        """
        if self.reported is None:
            waiter = _thread.allocate_lock()
            waiter.acquire()
            self.on_reported(lambda _: waiter.release())
            waiter.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))
        return self.reported

    def on_reported(self, listener: Callable[[PublishReport], object]) -> None:
        """Call ``listener`` once with the report, at once if there is one.

        It is called on this thread or on that which reports, and must neither wait nor raise.
        """
        self._listeners.append(listener)
        if self.reported is not None:
            try:
                self._listeners.remove(listener)
            except ValueError:  # the reporting thread calls it
                return
            listener(self.reported)

    def resolve(self, report: PublishReport) -> None:
        """Set ``report``, and call the listeners."""
        self.reported = report
        listeners = self._listeners
        while listeners:
            try:
                listener = listeners.pop(0)
            except IndexError:  # taken by on_reported()
                break
            listener(report)

    def report(self) -> PublishReport:
        """Return the present fate of every event; those without one count as kept or withdrawn."""
        entries = self.entries
        published = tuple([entry.event for entry in entries if entry.fate is Fate.PUBLISHED])
        if len(published) == len(entries):
            return PublishReport(published=published, error=self.error)
        # Read once: on the caller's thread, the other thread may go on to give fates.
        fates = [(entry, entry.fate) for entry in entries]
        by_fate: dict[Fate | None, list[Event]] = {}
        rejected: list[Rejection] = []
        for entry, fate in fates:
            if fate is Fate.REJECTED:
                rejected.append(Rejection(entry.event, entry.reason))
            elif fate is Fate.WITHDRAWN or (fate is None and not self.keep):
                reason = entry.reason or f"withdrawn: {self.error}"
                rejected.append(Withdrawn(entry.event, reason))
            else:
                by_fate.setdefault(fate, []).append(entry.event)
        return PublishReport(
            published=tuple(by_fate.get(Fate.PUBLISHED, ())),
            kept=tuple(by_fate.get(None, ())),
            parked=tuple(by_fate.get(Fate.PARKED, ())),
            ignored=tuple(by_fate.get(Fate.IGNORED, ())),
            rejected=tuple(rejected),
            error=self.error,
        )


class _Condition(_thread.RLock):  # type: ignore[misc]  # final only in the stubs
    """A condition that an interrupted thread can't leave locked.

    ``threading.Condition`` is entered and left by Python functions, between whose instructions a
    signal handler may raise. The lock underneath is entered and left by one instruction each.
    """

    def __init__(self) -> None:
        self._waiters: list[_thread.LockType] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a notification, at most ``timeout`` seconds; return whether it came."""
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        saved = self._release_save()  # type: ignore[attr-defined]
        try:
            if timeout is None:
                return waiter.acquire()
            return waiter.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))
        finally:
            self._acquire_restore(saved)  # type: ignore[attr-defined]

    def notify_all(self) -> None:
        """Wake all that wait."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()


class ReportFuture(Future[PublishReport]):
    """A future on which a caller may be interrupted: the thread that resolves it is never stuck."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()  # type: ignore[assignment]

    def result(self, timeout: float | None = None) -> PublishReport:
        """Return the report, waiting at most ``timeout`` seconds for it."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return None once there is a report, waiting at most ``timeout`` seconds for it."""
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self.add_done_callback(lambda _: waiter.release())
        seconds = threading.TIMEOUT_MAX if timeout is None else max(timeout, 0.0)
        waiter.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


def _resolve(future: Future[PublishReport], report: PublishReport) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(report)


def _take_token(tokens: list[None]) -> bool:
    try:
        tokens.pop()
    except IndexError:
        return False
    return True
