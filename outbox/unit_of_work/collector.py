"""The collector: the handle through which code enqueues events in a unit of work."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import sys
import threading
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import Token
from typing import Any, TypedDict, Unpack

from outbox import configuration, sinks
from outbox.backlog.chunk import Chunk
from outbox.backlog.notifier import ids
from outbox.errors import CollectorClosed, UsageError
from outbox.event import Event, Headers, MakeId, Unroutable, add_headers, make_event, set_headers
from outbox.header_values import check_address
from outbox.messages.cloud_events import headers_with_attributes
from outbox.messages.expiry import headers_with_expiry
from outbox.observer import seam
from outbox.publisher import Publisher
from outbox.report import PublishFailed, PublishReport
from outbox.sinks import BOUND, Bound, Sink
from outbox.system import process
from outbox.telemetry import tracing
from outbox.unit_of_work.origin import Origin, application_frame, warn_at
from outbox.unit_of_work.unit_of_work import Buffer, SavepointBuffer, Scope, UnitOfWork

__all__ = [
    "EventCollector",
    "EventOptions",
    "clear_events",
    "enqueue_event",
    "publish",
    "publish_async",
    "sink_of",
]


logger = logging.getLogger("outbox.collector")

_NOTHING = PublishReport()

_console: EventCollector | None = None
"""A console's collector, current where no unit is open: consoles may not keep a context."""

_at_console: EventCollector | None = None
"""The collector of a console's main thread outside of any unit, for the same reason."""


def set_console(collector: EventCollector | None) -> None:
    """Make ``collector`` current wherever no unit of work is open; None ends this."""
    global _console
    _console = collector


class EventOptions(TypedDict, total=False):
    """The keyword arguments of :meth:`EventCollector.enqueue_event`."""

    headers: Headers | None
    key: str | None
    priority: int | None
    delay: float | datetime.timedelta | None
    deliver_at: datetime.datetime | None
    ttl: float | datetime.timedelta | None
    id: str | uuid.UUID | None
    exchange: str | None
    unroutable: Unroutable | None
    session: Any
    connection: Any
    using: str | Bound | None


class EventCollector:
    """The handle to the events of one unit of work: a request, a block or a message.

    Thread-safe; tasks and threads that inherit the context share it. It belongs to the process
    that made it: in a forked child ``current()`` returns a new collector.
    """

    __slots__ = ("__weakref__", "_buffer", "_unit")

    is_lazy = False
    """Whether it is of no unit of work: nothing publishes its events at the end."""

    def __init__(
        self,
        *,
        publisher: Publisher | None = None,
        autoflush: bool = False,
        max_events: int | None = None,
        max_bytes: int | None = None,
        make_id: MakeId | None = None,
    ) -> None:
        """Create an empty collector, which is current only inside ``EventCollector.use(it)``.

        Args:
            publisher: the publisher of its events; the default is the process's.
            autoflush: True to publish each event as it is enqueued, for interactive use. On a
                running event loop it is submitted without waiting.
            max_events: the limit in events; the default is the publisher's setting (100,000).
            max_bytes: the limit in bytes of all bodies and headers; the default is the publisher's
                (64 MiB).
            make_id: the function that makes the ids of follow-on events; such events are never
                kept: ``publish()`` raises if the broker does not confirm them.
        """
        self._unit = UnitOfWork(publisher, None, False, autoflush, max_events, max_bytes, make_id)
        self._buffer = Buffer(self._unit)

    @classmethod
    def current(cls) -> EventCollector:
        """Return the collector of the unit of work that is open here.

        Outside any unit of work, create a collector for this thread or context, on which the
        application must call ``publish()``.
        """
        scope = Scope.innermost()
        collector: EventCollector | None = None
        if scope is not None:
            collector = scope.collector()
            if collector is None:
                collector = cls._of_scope_without(Scope.present())
        if collector is not None:
            if collector._unit.pid == process.pid and collector._is_current():
                return collector
        elif _console is not None and _console._unit.pid == process.pid and not _console.closed:
            return _console
        elif (
            _at_console is not None
            and _at_console._unit.pid == process.pid
            and _at_console._is_current()
            and threading.current_thread() is threading.main_thread()
        ):
            return _at_console
        return _LazyCollector.enter()

    @staticmethod
    def _of_scope_without(scope: Scope | None) -> EventCollector | None:
        """Return the collector of ``scope``, or a new handle to its unit, which has ended."""
        if scope is None:
            return None
        collector: EventCollector | None = scope.collector()
        if collector is None:  # this task or thread outlives it
            collector = EventCollector()
            collector._unit, collector._buffer = scope.buffer.unit, scope.buffer
        return collector

    @classmethod
    @contextmanager
    def use(cls, collector: EventCollector) -> Iterator[EventCollector]:
        """Make ``collector`` current for a ``with`` block; the caller publishes its events."""
        collector._unit.observer = seam.observer
        token = Scope.enter(collector, collector._buffer)
        try:
            yield collector
        finally:
            Scope.leave(token)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of the innermost buffer, in the order they were enqueued."""
        return tuple(self._innermost().events)

    @property
    def autoflush(self) -> bool:
        """Whether each event of the unit of work is published as it is enqueued."""
        return self._unit.autoflush

    @autoflush.setter
    def autoflush(self, value: bool) -> None:
        self._unit.autoflush = value

    @property
    def closed(self) -> bool:
        """Whether the unit of work has ended."""
        return self._buffer.closed

    @property
    def publisher(self) -> Publisher:
        """The publisher of the events.

        Raises:
            NotConfigured: the process has no publisher.
        """
        unit = self._unit
        return unit.publisher or unit.provided or configuration.default_publisher(unit.observer)

    def __len__(self) -> int:
        return len(self._innermost().events)

    def __bool__(self) -> bool:
        return True  # even without events

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} event(s)"
        return f"<{type(self).__name__} {state}>"

    def enqueue_event(
        self,
        payload: Any,
        target: str,
        *,
        headers: Headers | None = None,
        key: str | None = None,
        priority: int | None = None,
        delay: float | datetime.timedelta | None = None,
        deliver_at: datetime.datetime | None = None,
        ttl: float | datetime.timedelta | None = None,
        id: str | uuid.UUID | None = None,
        exchange: str | None = None,
        unroutable: Unroutable | None = None,
        session: Any = BOUND,
        connection: Any = None,
        using: str | Bound | None = BOUND,
    ) -> Event:
        """Serialise ``payload`` now, and collect the event until the unit of work has succeeded.

        With ``session`` or ``connection``, or in a transaction of a session that was given to
        ``outbox.sql.bind()``, the event is stored instead: it is a row of that transaction, with
        which it commits or rolls back.

        Args:
            payload: what the serializer can carry; by default see
                :class:`outbox.serializer.JSONSerializer`. Changing it later has no effect.
            target: the routing key, 1 to 255 bytes in UTF-8, without NUL like ``key`` and ``id``.
            headers: names of at most 255 bytes to str, bytes, bool, int of 64 bits, None, and
                lists and dicts of these, at most 32 deep; float, UUID, Decimal and dates become
                strings. Names that RabbitMQ or outbox acts on are refused. They win over those
                that the setting ``headers`` adds.
            key: at most 255 bytes; events with the same key belong together.
            priority: 0 to 255.
            delay: the time from now until it may be delivered, in seconds or as a timedelta.
            deliver_at: the instant from which it may be delivered; aware.
            ttl: the time after which no consumer begins it any more, in seconds or as a timedelta,
                more than 0; from now, or from when it may be delivered.
            id: at most 255 bytes; the default is a new UUIDv7.
            exchange: the exchange; the default is the publisher's ``exchange``.
            unroutable: what to do when no queue is bound for it; the default is the publisher's.
            session: a ``Session``, ``scoped_session`` or ``AsyncSession`` of SQLAlchemy. None: the
                event is not stored, also where a session was bound.
            connection: a ``Connection`` of SQLAlchemy.
            using: with ``outbox.django`` the alias of the database to store it in; the default is
                the setting ``STORE``. None: the event belongs to no transaction, and is published
                at once, as with ``autoflush``.

        Returns:
            The event, with its id.

        Raises:
            InvalidEvent: the event cannot be carried. Nothing was collected.
            CollectorFull: a limit is reached; or this is the first event of its buffer, and the
                publisher keeps ``max_kept`` events.
            CollectorClosed: the unit of work has ended, or belongs to another process.
            NotConfigured: the process has no publisher, and the event is not stored.
            UsageError: the event cannot be stored with ``session`` or ``connection``.
            MissingExtra: SQLAlchemy, which storing needs, is not installed.
        """
        sink: sinks.Sink | None = None
        if session is not BOUND or connection is not None or using is not BOUND:
            sink = sink_of(session, connection, using)
        elif sinks.bound is not None or sinks.sink_using is not None:
            sink = _bound_sink()
        unit = self._unit
        publisher: Publisher | None
        if sink is None:
            publisher = unit.publisher or configuration.default_publisher(unit.observer)
            settings = publisher.settings
        else:
            publisher = unit.publisher or configuration.publisher_if_any()
            settings = (
                configuration.settings_to_store() if publisher is None else publisher.settings
            )
        if unit.pid != process.pid and sink is None:
            raise CollectorClosed(
                f"this collector belongs to the process {unit.pid}; "
                "in a forked child use enqueue_event() or EventCollector.current()"
            )
        if exchange is None:
            exchange = settings.exchange
        elif exchange != "":
            check_address("exchange", exchange)
        if settings.headers:
            headers = add_headers(settings.headers, headers)
        tracer = tracing.seam.tracer
        make = make_event if tracer is None else functools.partial(tracer.make_event, settings)
        event = make(  # by position: keywords are slower, and this is the hot path
            settings.serializer,
            settings.max_body_bytes,
            unit.make_id,
            payload,
            target,
            exchange,
            headers,
            key,
            priority,
            delay,
            deliver_at,
            id,
            unroutable,
        )
        if ttl is not None:
            set_headers(event, headers_with_expiry(event, ttl))
        if settings.envelope != "outbox":
            set_headers(event, headers_with_attributes(event, settings.envelope, settings.source))
        if sink is not None:
            is_stored = sink(event, publisher)
            observer = unit.observer or seam.observer
            if observer is not None and is_stored:
                observer.stored_in_transaction(event)
        elif publisher is not None:
            if using is None:
                EventCollector(publisher=publisher, autoflush=True)._collect(event, publisher)
            else:
                self._collect(event, publisher)
        return event

    def _collect(self, event: Event, publisher: Publisher) -> None:
        buffer = self._innermost()
        observer = self._unit.observer or seam.observer
        if event.deliver_at is not None:
            publisher.check_carries(event, observer)
        if self._unit.caution is not None:
            self._warn_of_waiting(self._unit.caution)
        if configuration.provider is not None and self._unit.publisher is None:
            self._unit.note_provided(configuration.provided_publisher())
        if not buffer.events:
            publisher.make_ready(observer)
        buffer.append(event, publisher.settings.max_events, publisher.settings.max_bytes)
        if observer is not None:
            observer.enqueued(event)
        if self._unit.autoflush:
            self._flush(buffer)

    def publish(self) -> PublishReport:
        """Publish the events of the innermost buffer as one chunk, and wait for the confirms.

        Returns:
            The fate of every event. While the broker is unavailable, the publisher keeps and
            retries the events, out of reach of any rollback; this is reported and logged, not
            raised.

        Raises:
            UsageError: on a running event loop (use ``publish_async()``). Nothing has changed.
            PublishFailed: in a consumer, where nothing is kept: what the broker did not confirm
                is withdrawn.
        """
        return self._publish(self._innermost())

    def _publish(self, buffer: Buffer) -> PublishReport:
        if not buffer.events:
            return _NOTHING
        publisher = self.publisher
        publisher.check_may_wait()
        chunk = self._hand_over(buffer, publisher)
        return self._checked(chunk, publisher.wait_for(chunk))

    async def publish_async(self) -> PublishReport:
        """Publish the events of the innermost buffer, and await the confirms; see ``publish()``.

        Cancelling the task ends only the wait: the events have left the collector.
        """
        return await self._publish_async(self._innermost())

    async def _publish_async(self, buffer: Buffer) -> PublishReport:
        if not buffer.events:
            return _NOTHING
        publisher = self.publisher
        chunk = self._hand_over(buffer, publisher)
        return self._checked(chunk, await publisher.wait_for_async(chunk))

    def submit(self) -> Future[PublishReport]:
        """Hand the events of the innermost buffer to the publisher, without waiting.

        Returns:
            The future of the report; see :meth:`outbox.Publisher.submit`.

        Raises:
            UsageError: the publisher is closed. Nothing has changed.
        """
        return self._hand_over(self._innermost(), self.publisher).future

    def clear_events(self) -> tuple[Event, ...]:
        """Drop the events of the innermost buffer, and return them."""
        taken: list[Event] = []
        self._innermost().take(taken)
        return self._drop(taken)

    def savepoint(self) -> AbstractContextManager[EventCollector]:
        """Return a ``with`` block whose events are dropped if it raises.

        Savepoints nest; those of concurrent tasks don't see each other's events.

        Raises:
            CollectorClosed: at its end, if its unit of work has ended in between (in a task that
                outlived it). Its events are dropped, and named in the log.
        """
        return self._savepoint()

    @contextmanager
    def _savepoint(self) -> Iterator[EventCollector]:
        buffer = SavepointBuffer(self._unit, self._innermost())
        before = Scope.present()
        token: Token[Scope | None] | None = None
        try:
            token = Scope.enter(self, buffer)
            yield self
        except BaseException:
            self._drop(buffer.close())
            raise
        else:
            if not buffer.merge():
                dropped = self._drop(buffer.close())
                if dropped:
                    logger.error("a savepoint outlived its unit of work; dropped: %s", ids(dropped))
                    raise CollectorClosed(
                        f"{len(dropped)} event(s) of a savepoint were dropped, since its unit of "
                        "work had ended before it (a task or thread that outlived its request, "
                        "block or message?); give such work its own auto_publishing() block"
                    )
        finally:
            if token is None:  # interrupted on the way back from entering
                Scope.resume(before)
            else:
                Scope.leave(token)

    def _innermost(self) -> Buffer:
        """Return the innermost buffer of this context that is this collector's or nested in it."""
        own = self._buffer
        present = Scope.innermost()
        if present is not None and present.buffer is own:  # nearly always
            return own
        present = Scope.present()
        while present is not None:
            buffer: Buffer | None = present.buffer
            while buffer is not None:
                if buffer is own:
                    return present.buffer
                buffer = buffer.parent
            present = present.outer
        return own

    def _hand_over(self, buffer: Buffer, publisher: Publisher) -> Chunk:
        """Submit the events of ``buffer``; if that fails, put them back."""
        unit = self._unit
        events: list[Event] = []
        chunk = None
        try:
            buffer.take(events)
            chunk = publisher.prepare(events, keep=unit.keeps, observer=unit.observer)
            publisher.hand_in(chunk, unit.observer)
        except BaseException:
            if events and (chunk is None or chunk.revoke()):
                buffer.put_back(events)
            raise
        return chunk

    def _checked(self, chunk: Chunk, report: PublishReport) -> PublishReport:
        if chunk.keep or report.ok:
            return report
        failure = PublishFailed(report)
        failure.is_of_message = self._unit.is_of_message
        raise failure from report.error

    def _drop(self, events: list[Event]) -> tuple[Event, ...]:
        if events:
            observer = self._unit.observer or seam.observer
            if observer is not None:
                observer.cleared(events)
            unit = self._unit
            if unit.dropped is not None:
                unit.dropped.extend([event.id for event in events])
            publisher = unit.publisher or unit.provided or configuration.configured_publisher()
            if publisher is not None:
                publisher.note_cleared(events)
        return tuple(events)

    def _flush(self, buffer: Buffer) -> None:
        """Publish now, or submit where waiting is not possible."""
        if not buffer.events:  # taken by the end of the unit
            return
        publisher = self.publisher
        try:
            publisher.check_may_wait()
        except UsageError:
            self._hand_over(buffer, publisher)
        else:
            self._publish(buffer)

    def _warn_of_waiting(self, caution: str) -> None:
        # Before anything is collected: a filter may turn the warning into an exception.
        frame = application_frame()
        warn_at(caution, frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
        self._unit.caution = None

    def _is_current(self) -> bool:
        return True


class _LazyCollector(EventCollector):
    """A collector for code outside any unit of work, on which the application calls ``publish()``.

    Nothing publishes its events at the end: events that are lost with it are logged, with the line
    that enqueued them, and so are those that one job leaves to the next on the same thread. It
    isn't current under another test's observer.
    """

    __slots__ = ("_origin", "_watched")

    is_lazy = True

    def __init__(self) -> None:
        super().__init__()
        self._unit.observer = seam.observer
        self._origin: list[Origin] = []
        self._watched = False

    @classmethod
    def enter(cls) -> _LazyCollector:
        """Create a collector that is current in this context from now on."""
        global _at_console
        collector = cls()
        Scope.begin(collector, collector._buffer)
        if hasattr(sys, "ps1") and threading.current_thread() is threading.main_thread():
            _at_console = collector
        return collector

    def _collect(self, event: Event, publisher: Publisher) -> None:
        if not self._unit.autoflush:
            if self._unit.total:
                self._check_origin()
            else:
                self._origin[:] = [Origin()]
        if not self._watched:
            weakref.finalize(self, _log_unpublished, self._buffer, self._origin)
            self._watched = True
        super()._collect(event, publisher)

    def _hand_over(self, buffer: Buffer, publisher: Publisher) -> Chunk:
        self._check_origin()
        return super()._hand_over(buffer, publisher)

    def _check_origin(self) -> None:
        """Warn if events wait here that other work, which has ended, has not published."""
        present = Scope.present()
        if present is None or present.collector() is not self:
            return  # named explicitly: what waits in it is meant
        for origin in self._origin:
            if self._unit.total and origin.has_ended():
                frame = application_frame()
                warn_at(
                    f"{self._unit.total} event(s) wait that were enqueued outside of any unit of "
                    f"work, the first at {origin.filename}:{origin.line}, by a job that has ended "
                    "without publishing them; they are published with those of this one: call "
                    "publish() or clear_events() at the end of each job, or use auto_publishing()",
                    frame.f_code.co_filename,
                    frame.f_lineno,
                    frame.f_globals,
                )
                self._origin[:] = [Origin()]

    def _is_current(self) -> bool:
        return self._unit.observer is seam.observer


def _log_unpublished(buffer: Buffer, origins: list[Origin]) -> None:
    # Events that a test observes, or that a forked child inherits from its parent, are not lost.
    if buffer.events and buffer.unit.pid == process.pid and buffer.unit.observer is None:
        where = ""
        for origin in origins:
            where = f" at {origin.filename}:{origin.line}"
            with contextlib.suppress(Exception):  # turned into an exception, nothing could catch it
                origin.warn(
                    "an event was enqueued outside of any unit of work and never published: call "
                    "publish(), or use auto_publishing() or the middleware"
                )
        with contextlib.suppress(Exception):  # the interpreter may be shutting down
            logger.error(
                "%d event(s) lost: enqueued outside of any unit of work%s and never published: %s",
                len(buffer.events),
                where,
                ", ".join(repr(event.id) for event in buffer.events),
            )
        buffer.close()


def enqueue_event(payload: Any, target: str, **options: Unpack[EventOptions]) -> Event:
    """Enqueue an event in the current collector; see :meth:`EventCollector.enqueue_event`.

    Outside any unit of work, call ``publish()`` afterwards: events that never are published are
    logged, with the line that enqueued the first of them.
    """
    return EventCollector.current().enqueue_event(payload, target, **options)


def publish() -> PublishReport:
    """Publish the events of the current collector; see :meth:`EventCollector.publish`."""
    return EventCollector.current().publish()


async def publish_async() -> PublishReport:
    """Publish the events of the current collector; see :meth:`EventCollector.publish_async`."""
    return await EventCollector.current().publish_async()


def clear_events() -> tuple[Event, ...]:
    """Drop the events of the current collector; see :meth:`EventCollector.clear_events`."""
    return EventCollector.current().clear_events()


def sink_of(session: Any, connection: Any, using: str | Bound | None = BOUND) -> Sink | None:
    """Return the sink that stores events in the transaction of one of these.

    It is None where the session's transaction is over, and for None instead of a session or an
    alias.

    Raises:
        UsageError: two are given, or events cannot be stored with the given one.
        MissingExtra: SQLAlchemy is not installed.
    """
    if (session is not BOUND) + (connection is not None) + (using is not BOUND) > 1:
        raise UsageError("give only one of session, connection and using")
    if using is not BOUND:
        if using is None:
            return None
        if sinks.sink_using is None:
            raise UsageError(
                f"using={using!r} names a database of Django's, but outbox.django is not set up: "
                "add it to INSTALLED_APPS and call django.setup(); for SQLAlchemy give session"
            )
        return sinks.sink_using(using)
    if session is None:
        return None
    from outbox.sql.transaction import sink_of_connection, sink_of_session

    return sink_of_session(session) if connection is None else sink_of_connection(connection)


def _bound_sink() -> Sink | None:
    sink = None if sinks.bound is None else sinks.bound()
    if sink is None and sinks.sink_using is not None:
        sink = sinks.sink_using(BOUND)
    return sink
