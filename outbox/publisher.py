"""The publisher: sends the events of collectors to a broker; one per process."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self, Unpack

from outbox.backlog import waker
from outbox.backlog.backlog import SILENCE
from outbox.backlog.chunk import Chunk
from outbox.backlog.notifier import call_hook, ids
from outbox.backlog.stats import Stats, Tally
from outbox.errors import CollectorFull, InvalidEvent, UsageError
from outbox.event import Event
from outbox.observer import Observer, seam
from outbox.report import PublishReport
from outbox.settings import SettingOverrides, Settings
from outbox.system import process
from outbox.telemetry import sources, tracing
from outbox.telemetry.sources import Samples
from outbox.transports.registry import open_transport
from outbox.transports.transport import Transport
from outbox.url import masked

__all__ = ["Publisher", "refuse_running_loop", "run_exit_hooks_in_child"]

logger = logging.getLogger("outbox.publisher")

_BUSY = 0.05
"""Seconds to wait for the publisher's thread where it reports at once."""

_READ_KEPT = 10_000
"""The events of a spool that ``Publisher.kept`` has at most."""

_LOOK_AGAIN = 0.6  # more than what drain() takes until it hurries
"""Seconds between two looks whether the spool has everything, so that the process can end."""

_WRITING = 60.0
"""Seconds to wait for a write to the spool, and then again."""

_RETIRING = 2.0
"""Seconds to wait until a replaced publisher has moved its events."""

_open_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()
_open_transports: dict[Transport, float] = {}
"""The transports that may hold events, with the seconds to drain them: also those whose publisher
the program has forgotten."""

_inherited: list[Transport] = []


class Publisher:
    """A publisher of chunks, which keeps and retries what the broker has not confirmed.

    A process normally has one, made by :func:`outbox.configure`; more may coexist. It connects at
    the first event, on a background thread. Thread-safe; usable from any event loop, signal handler
    and finalizer; fork-safe: a child starts with nothing kept and with a new connection.

    When the process exits, and in ``close()``, kept events have ``drain_timeout`` seconds to reach
    the broker; then the id of every lost event is logged at ERROR. A publisher to which the program
    no longer refers is closed when all its events have a fate.
    """

    def __init__(self, url: str | None = None, **settings: Unpack[SettingOverrides]) -> None:
        """Create a publisher, without connecting yet.

        Args:
            url: the broker URL; the default is ``OUTBOX_URL``.
            **settings: see :class:`outbox.settings.Settings`; ``OUTBOX_<NAME>`` are the defaults.

        Raises:
            NotConfigured: neither ``url`` nor ``OUTBOX_URL`` is given.
            UsageError: the URL or a setting is invalid; the message names it.
        """
        self.settings = Settings.load(url, settings)
        self._lock = threading.RLock()
        self._own: Transport | None = None
        self._successor: Publisher | None = None
        self._cleared = [0]
        self._open()
        self._closed = False
        self._half_full = False

    def __repr__(self) -> str:
        settings: Settings | None = getattr(self, "settings", None)  # None if they are invalid
        return f"<Publisher {masked(settings.url)}>" if settings else "<Publisher>"

    @property
    def kept(self) -> tuple[Event, ...]:
        """The kept events, in the order they will be sent again.

        With a spool, at most 10,000 of those that are in memory and of this publisher's own on the
        disk, which are read; ``stats().kept`` counts all.
        """
        transport = self._transport()
        kept, spool = transport.kept, transport.backlog.spool
        if spool is None:
            return kept
        return (*kept, *spool.peek(_READ_KEPT - len(kept)))[:_READ_KEPT]

    @property
    def connected(self) -> bool:
        """Whether events can be published now, as far as is known.

        False until the connection that the first event or ``make_ready()`` starts can publish.
        """
        return not self._closed and self._transport().connected

    @property
    def closed(self) -> bool:
        """Whether it was closed; one that ``configure()`` has replaced isn't."""
        return self._closed

    def stats(self) -> Stats:
        """Return the publisher's counters, which are not all read at the same instant."""
        transport = self._transport()
        tally = transport.backlog.tally
        fates = dict(tally.fates)
        kept = transport.kept
        aside, aside_bytes = transport.backlog.aside_size
        return Stats(
            connected=self.connected,
            kept=len(kept) + aside,
            kept_bytes=sum(len(event.body) for event in kept) + aside_bytes,
            ever_kept=tally.ever_kept,
            published=fates.get("published", 0),
            parked=fates.get("parked", 0),
            ignored=fates.get("ignored", 0),
            rejected=fates.get("rejected", 0),
            withdrawn=fates.get("withdrawn", 0),
            nacked=tally.nacked,
            cleared=self._cleared[0],
            connects=tally.connects,
            latency=tally.latency,
        )

    def submit(self, events: Iterable[Event], *, keep: bool = True) -> Future[PublishReport]:
        """Hand ``events`` to the publisher, and return without waiting.

        The future gets the report when every event has a fate or the connection fails, whichever
        comes first; it never gets an exception, and cancelling it does not stop the events. While
        the broker is known to be unavailable, it resolves at once.

        Args:
            events: the events to publish, in this order.
            keep: False to withdraw what is not confirmed when the report is made: it is never sent
                again, and ``rejected`` in the report.

        Raises:
            UsageError: the publisher is closed.
        """
        return self.submit_chunk(tuple(events), keep=keep).future

    def publish(
        self, events: Iterable[Event], *, keep: bool = True, timeout: float | None = None
    ) -> PublishReport:
        """Publish ``events`` as one chunk and wait for the confirms.

        Args:
            events: the events to publish, in this order.
            keep: see :meth:`submit`.
            timeout: seconds to wait; the default is the setting ``timeout``. What is not
                confirmed by then is reported as kept, and the publisher goes on trying.

        Returns:
            The fate of every event. A failure of the broker is reported, not raised.

        Raises:
            UsageError: called on a running event loop (use ``publish_async``), from a hook on the
                publisher's own thread, or after ``close()``. Nothing was submitted.
        """
        self.check_may_wait()
        return self.wait_for(self.submit_chunk(tuple(events), keep=keep), timeout)

    async def publish_async(
        self,
        events: Iterable[Event],
        *,
        keep: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  ends the wait, not the publishing
    ) -> PublishReport:
        """Publish ``events`` as one chunk and await the confirms; see :meth:`publish`.

        The events reach the publisher's thread before the first ``await``: cancelling the task
        ends the wait, not the publishing.

        Raises:
            UsageError: called after ``close()``. Nothing was submitted.
        """
        return await self.wait_for_async(self.submit_chunk(tuple(events), keep=keep), timeout)

    def submit_chunk(
        self, events: Sequence[Event], *, keep: bool, observer: Observer | None = None
    ) -> Chunk:
        """Submit ``events`` as a chunk; see :meth:`submit`.

        Args:
            events: the events to publish, in this order.
            keep: see :meth:`submit`.
            observer: the observer of their unit of work; the default is the installed one.
        """
        chunk = self.prepare(events, keep=keep, observer=observer)
        self.hand_in(chunk, observer)
        return chunk

    def prepare(
        self, events: Sequence[Event], *, keep: bool, observer: Observer | None = None
    ) -> Chunk:
        """Return ``events`` as a chunk, encoded; nothing is submitted yet.

        Raises:
            UsageError: the publisher is closed.
        """
        if self._closed:
            raise UsageError("this publisher is closed; nothing was published")
        return self._transport(observer).prepare(events, keep=keep)

    def hand_in(self, chunk: Chunk, observer: Observer | None = None) -> None:
        """Submit a chunk that was prepared, and return without waiting.

        After an exception, also one of a signal handler, ``chunk.revoke()`` decides whether it was
        submitted.
        """
        run_exit_hooks_in_child()
        tracer = tracing.seam.tracer
        if tracer is None:
            self._transport(observer).hand_in(chunk)
            return
        tracer.sends(chunk, self.settings)
        try:
            self._transport(observer).hand_in(chunk)
        except BaseException:
            tracer.revoked(chunk)
            raise

    def wait_for(self, chunk: Chunk, timeout: float | None = None) -> PublishReport:
        """Wait until ``chunk`` is reported; after ``timeout`` seconds, report it."""
        try:
            for seconds in self._waits(chunk, timeout):
                report = chunk.wait(seconds)
                if report is not None:
                    return report
            chunk.holder.release(chunk)
        except BaseException as error:
            # The process may be killed next (gunicorn does that a second after its SIGABRT), before
            # it has drained: log the ids while that is possible.
            unconfirmed = [entry.event for entry in chunk.entries if entry.fate is None]
            if unconfirmed:
                logger.warning(
                    "%s interrupted publishing; %d event(s) not confirmed yet: %s",
                    type(error).__qualname__,
                    len(unconfirmed),
                    ids(unconfirmed),
                )
            raise
        # Without a report, the transport's thread has claimed it, and is about to set it.
        return chunk.reported or chunk.future.result()

    async def wait_for_async(
        self,
        chunk: Chunk,
        timeout: float | None = None,  # noqa: ASYNC109  ends the wait, not the publishing
    ) -> PublishReport:
        """Await what :meth:`wait_for` waits for."""
        if chunk.reported is None:
            for seconds in self._waits(chunk, timeout):
                if await waker.reported(chunk, seconds):
                    break
            else:
                chunk.holder.release(chunk)
        while chunk.reported is None:  # it is about to be: another thread has claimed it
            await waker.reported(chunk, _WRITING)
        return chunk.reported

    def drain(self, timeout: float | None = None) -> bool:
        """Retry at once, and wait until every event has a fate; return whether all have one.

        Args:
            timeout: seconds to wait; the default is the setting ``drain_timeout``.

        Raises:
            UsageError: called on a running event loop or from a hook.
        """
        self.check_may_wait()
        return self._transport().drain(self._drain_timeout(timeout))

    async def drain_async(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Await what :meth:`drain` waits for."""
        drain = functools.partial(self._transport().drain, self._drain_timeout(timeout))
        trio = waker.running_trio()
        if trio is not None:
            drained: bool = await trio.to_thread.run_sync(drain)
            return drained
        import asyncio

        return await asyncio.to_thread(drain)

    def close(self, timeout: float | None = None) -> tuple[Event, ...]:
        """Drain, disconnect, and return the lost events, which are logged at ERROR.

        What is in the spool isn't lost, and while the broker is unavailable it isn't waited for.
        Closing twice is harmless. Publishing afterwards raises ``UsageError``.

        Args:
            timeout: seconds to drain; the default is the setting ``drain_timeout``.
        """
        own = self._own
        if self._closed or own is None:  # closed, or never used since a fork
            self._closed = True
            return ()
        latest = time.monotonic() + self.settings.drain_timeout
        if not own.on_own_thread:
            _drain_to_close(own, self._drain_timeout(timeout))
        self._closed = True
        lost = _close(own)
        left = latest - time.monotonic()
        if tracing.seam.tracer is not None and left > 0 and not own.on_own_thread:
            tracing.seam.tracer.flush(left)
        return lost

    def retire(self, successor: Publisher) -> None:
        """Move all events to ``successor``, in their order, and what is published here later.

        A caller who waits for the confirms of events goes on waiting. Events that the broker has
        but hasn't confirmed within a second are sent again, so they may arrive twice. Kept events
        move even beyond the successor's ``max_kept``: they have been accepted, and an outage that
        has filled the old publisher may be the reason for another.

        Raises:
            InvalidEvent: ``successor`` cannot carry the kept events; nothing has changed.
        """
        own = self._own_transport()
        for event in own.kept:
            successor.check_carries(event)
        if not self._closed:
            self._successor = successor
            own.retire(successor._own_transport(), _RETIRING)

    @property
    def runs_here(self) -> bool:
        """Whether the caller is a hook or a log handler on the publisher's own thread."""
        return self._transport().on_own_thread

    def check_may_wait(self) -> None:
        """Raise UsageError where waiting for confirms would block an event loop or deadlock."""
        refuse_running_loop()
        if self._transport().on_own_thread:
            raise UsageError("a publisher's hook must not wait for the publisher; use submit()")

    def check_room(self, more_events: int = 0, more_bytes: int = 0) -> None:
        """Raise CollectorFull if the kept events reach a limit: new work must not commit.

        What waits for a broker that doesn't answer counts as kept. Events that the broker refuses
        for now have the same limits, but separately: only what exceeds those counts here, so that
        memory stays bounded. What is in the spool has a separate limit.
        """
        transport = self._transport()
        events, size = transport.waiting_size
        spool = transport.backlog.spool
        if spool is not None:
            if why := spool.why_full():
                raise CollectorFull(f"{why}; nothing was enqueued")
            stored, stored_bytes = spool.stored
            events, size = max(0, events - stored), max(0, size - stored_bytes)
        held_events, held_bytes = transport.backlog.held_size
        settings = self.settings
        events -= min(held_events, settings.max_kept)
        size -= min(held_bytes, settings.max_kept_bytes)
        full = max(
            (events + more_events) / (settings.max_kept or math.inf),
            (size + more_bytes) / (settings.max_kept_bytes or math.inf),
        )
        if full >= 1:
            raise CollectorFull(
                f"{events} event(s) of {size} bytes are kept until the broker is available; "
                f"the limits are max_kept={settings.max_kept}, "
                f"max_kept_bytes={settings.max_kept_bytes}; nothing was enqueued"
            )
        if full < 0.5:
            self._half_full = False
        elif not self._half_full:
            self._half_full = True
            logger.warning("%d event(s) of %d bytes are kept: half of the limit", events, size)

    def check_carries(self, event: Event, observer: Observer | None = None) -> None:
        """Raise InvalidEvent if this publisher's transport cannot deliver ``event`` on time.

        In a test, check also the transport that replaces it, which may be another broker's.
        """
        if event.deliver_at is None:
            return
        for transport in (self._own_transport(), self._transport(observer)):
            if not transport.supports_delay:
                raise InvalidEvent(
                    f"the event to {event.target!r} has a delay, "
                    "which its transport doesn't support"
                )
            longest = transport.longest_delay
            if longest is not None and event.deliver_at - event.occurred_at > longest:
                raise InvalidEvent(
                    f"the event to {event.target!r} is due at {event.deliver_at}, "
                    f"but its transport delays events by {longest.days} days at most"
                )

    def make_ready(self, observer: Observer | None = None) -> None:
        """Start connecting in the background if necessary, and check that there is room.

        Returns at once, also on an event loop: a readiness probe calls it, then looks at
        ``connected``. Thread-safe.

        Args:
            observer: the observer of the unit of work that will publish; the default is the
                installed one.

        Raises:
            CollectorFull: see ``check_room``.
        """
        transport = self._transport(observer)
        transport.start()
        if not transport.settled:
            self.check_room()
        else:
            self._half_full = False

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return the queue of a row that is stored for ``event``: see ``Transport.queue_for``."""
        return self._transport().queue_for(event, engine, options)

    def look_into(self, queues: Collection[str]) -> None:
        """Have workers look into ``queues``, where rows were committed; return at once."""
        self._transport().look_into(queues)

    def announce(self, body: bytes) -> None:
        """Announce this process with ``body``, at most 4 KiB, over the connection that exists.

        Returns at once. It is dropped while that connection can't publish, and by transports that
        have no listeners. Thread-safe.
        """
        self._own_transport().announce(body)

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the thread of the connection: see ``Transport.ping``."""
        return self._own_transport().ping(answer)

    def note_cleared(self, events: Sequence[Event]) -> None:
        """Count dropped events, and call the hook ``on_cleared``."""
        count = len(events)
        self._cleared[0] += count  # one line without a call: a signal handler may be here, too
        call_hook(self.settings.on_cleared, tuple(events))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transport(self, observer: Observer | None = None) -> Transport:
        observer = observer or seam.observer
        return self._own_transport() if observer is None else observer.transport_of(self.settings)

    def _own_transport(self) -> Transport:
        own = self._own
        if own is None:  # the first use in a forked child
            if self._successor is not None:
                return self._replacement()._own_transport()
            with self._lock:
                own = self._own or self._open()
        last = own
        while last.successor is not None:  # configure() was called again
            last = last.successor
        if last is not own:
            own.successor = last  # those between needn't live on
        return last

    def _replacement(self) -> Publisher:
        """Return the latest publisher that has replaced this one, or itself."""
        last = self
        while last._successor is not None:
            last = last._successor
        if last is not self:
            self._successor = last
        return last

    def _open(self) -> Transport:
        own = self._own = open_transport(self.settings)
        _open_publishers.add(self)
        _open_transports[own] = self.settings.drain_timeout
        sources.register(own, functools.partial(_counts, own.backlog.tally, self._cleared), _gauges)
        self._forgotten = weakref.finalize(self, _on_forgotten, own)
        self._forgotten.atexit = False
        return own

    def _leave_to_parent(self) -> None:
        """Leave the parent's connection alone, and start afresh in a forked child."""
        if self._own is not None:
            self._forgotten.detach()
        self._lock = threading.RLock()
        self._own = None
        self._cleared = [0]

    def _waits(self, chunk: Chunk, timeout: float | None) -> Iterator[float]:
        """Yield the seconds to wait for the report of ``chunk``, and to wait again."""
        seconds = self.settings.timeout if timeout is None else timeout
        if chunk.holder.circuit_open:  # it is reported at once, unless the thread is busy
            yield min(seconds, _BUSY)
            return
        first = min(seconds, SILENCE)  # by then others may have found the broker silent
        yield first
        if first < seconds and not chunk.holder.circuit_open:
            yield seconds - first

    def _drain_timeout(self, timeout: float | None) -> float:
        return self.settings.drain_timeout if timeout is None else timeout


def refuse_running_loop() -> None:
    """Raise UsageError on a running event loop, which waiting for confirms would block."""
    if "trio" not in sys.modules or waker.running_trio() is None:
        asyncio: Any = sys.modules.get("asyncio")
        if asyncio is None:  # a program that hasn't imported it runs no loop, and need not pay
            return
        try:
            asyncio.get_running_loop()
        except (RuntimeError, AttributeError):  # no loop; or another thread is still importing it
            return
    raise UsageError(
        "publishing would block the running event loop; "
        "use publish_async(), or async with auto_publishing()"
    )


def _all_ids(events: Iterable[Event]) -> str:
    return ", ".join(repr(event.id) for event in events)


def _counts(tally: Tally, cleared: list[int]) -> Samples:
    """Return what a publisher has counted; see ``outbox.telemetry.metrics``."""
    fates = {**tally.fates, "kept": tally.ever_kept, "cleared": cleared[0]}
    return {
        "outbox_events_collected_total": {(): tally.submitted + cleared[0]},
        "outbox_events_total": {(fate,): count for fate, count in fates.items()},
        "outbox_publish_duration_seconds": {(): (tally.total, *tally.buckets)},
        "outbox_connects_total": {("publisher",): tally.connects},
    }


def _gauges(transport: Transport) -> Samples:
    events, size = transport.backlog.kept_size
    spool = transport.backlog.spool
    oldest = transport.backlog.oldest_kept
    age = 0.0 if oldest is None else time.time() - oldest.occurred_at.timestamp()
    return {
        "outbox_connected": {("publisher",): int(transport.connected)},
        "outbox_events_kept": {(): events},
        "outbox_events_kept_bytes": {(): size},
        "outbox_oldest_kept_age_seconds": {(): max(0.0, age)},
        "outbox_spool_bytes": {(): 0 if spool is None else spool.stored[1]},
    }


def _drain_to_close(transport: Transport, timeout: float) -> None:
    """Drain, but don't wait for a broker that is unavailable once the spool has everything."""
    spool = transport.backlog.spool
    if spool is None:
        transport.drain(timeout)
        return
    deadline = time.monotonic() + timeout
    while not (transport.circuit_open and spool.holds_all):
        left = deadline - time.monotonic()
        if left <= 0 or transport.drain(min(left, _LOOK_AGAIN)):
            return


def _close(transport: Transport) -> tuple[Event, ...]:
    lost = transport.close()
    _open_transports.pop(transport, None)
    if lost:
        logger.error("%d event(s) lost, never confirmed: %s", len(lost), _all_ids(lost))
    return lost


def _on_forgotten(transport: Transport) -> None:
    """Close the transport of a publisher that no longer exists, once its events have a fate."""
    transport.close_when_settled(lambda: _open_transports.pop(transport, None))


def _start_all() -> None:
    """Start the threads of all publishers, which Python refuses once it shuts down."""
    for publisher in list(_open_publishers):
        with contextlib.suppress(Exception):  # what is published later raises it again
            publisher._own_transport().start_now()


def _close_all() -> None:
    for publisher in list(_open_publishers):
        publisher.close()
    for transport, timeout in list(_open_transports.items()):
        _drain_to_close(transport, timeout)
        _close(transport)


def run_exit_hooks_in_child() -> None:
    """Have the exit hooks run if this is a child of multiprocessing or billiard.

    It forgets what was registered before it began, so this is looked at each time.
    """
    for package in process.PARENTS:
        processes: Any = sys.modules.get(f"{package}.process")
        child = None if processes is None else processes.current_process()
        if child is None or child is process.hooked_child:
            continue
        if child._parent_pid is not None:
            process.run_exit_hooks_of(child, package)


def _leave_all_to_parent() -> None:
    _inherited.extend(_open_transports)  # never collected, so that no socket is ever closed
    _open_transports.clear()
    for publisher in list(_open_publishers):
        publisher._leave_to_parent()


process.after_fork(_leave_all_to_parent)
process.at_exit(_close_all)
if sys.version_info >= (3, 12):
    # Exit handlers may still publish, but can no longer start threads.
    with contextlib.suppress(AttributeError, RuntimeError):  # not there; shutting down already
        threading._register_atexit(_start_all)  # type: ignore[attr-defined]
