"""The unit of work: a request, a block or a message, whose events share one fate.

Its events wait in buffers. A unit has one outermost buffer. A savepoint, and a nested block that
joins, has a child buffer: appended to its parent on success, dropped on failure. All of them share
the unit's limits. A scope says which buffer is current in a context.

A unit ends by closing its buffer, before its events are taken and before anything waits: what was
accepted until then is published or dropped with the unit, and what comes later is refused in the
line that enqueues it. Nothing is ever accepted and then left behind.

There are no locks. A signal handler, or a finalizer, may enqueue, publish or raise in the middle of
these methods, on the very thread that would hold the lock. Instead each change of state is a
straight line: CPython switches threads and runs signal handlers only when a function is entered,
when a loop jumps back, and after a call. So between the first line that reads the state and the
last that changes it, there is no call (one may be the last step) and no loop.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, ClassVar

from outbox.errors import CollectorClosed, CollectorFull, UsageError
from outbox.event import Event, MakeId
from outbox.header_values import CheckedHeaders, plain_table
from outbox.observer import Observer
from outbox.publisher import Publisher
from outbox.system import process

__all__ = ["Buffer", "SavepointBuffer", "Scope", "UnitOfWork"]

logger = logging.getLogger("outbox.collector")

_scope: ContextVar[Scope | None] = ContextVar("outbox_scope", default=None)
_ATTEMPTS = 3
"""How often a line about lost events is logged while signal handlers that raise interrupt it."""


class UnitOfWork:
    """The owner of what all buffers and collectors of a unit share. Thread-safe.

    It doesn't refer to its buffers, which refer to it: a unit is freed as soon as its last
    collector is, without waiting for the garbage collector.

    Attributes:
        publisher: the publisher of its events; None for the process's default publisher.
        provided: the publisher of the application that its present events were enqueued in, if
            that has one and the unit none.
        autoflush: whether to publish each event as it is enqueued.
        publishes_itself: whether it publishes at its end, so that nested blocks join it.
        caution: the warning for its first event, which would wait for long; or None.
        make_id: the function that makes the ids of follow-on events; None outside a message.
        is_of_message: whether its events are a message's, with the publisher of its worker.
        keeps: whether the publisher keeps what the broker hasn't confirmed; otherwise such events
            are withdrawn, and publishing raises.
        observer: the observer installed when the unit began; None to use the present one.
        pid: the id of the process that made it.
        max_events: the limit in events; None for the publisher's setting.
        max_bytes: the limit in bytes of all bodies and headers; None for the publisher's setting.
        dropped: the ids of the last events that were dropped; None if that is not wanted.
        total: the number of events in all its buffers.
        total_size: the bytes of their bodies and headers.
    """

    __slots__ = (
        "autoflush",
        "caution",
        "dropped",
        "is_of_message",
        "keeps",
        "make_id",
        "max_bytes",
        "max_events",
        "observer",
        "pid",
        "provided",
        "publisher",
        "publishes_itself",
        "total",
        "total_size",
    )

    def __init__(
        self,
        publisher: Publisher | None,
        observer: Observer | None,
        publishes_itself: bool = False,
        autoflush: bool = False,
        max_events: int | None = None,
        max_bytes: int | None = None,
        make_id: MakeId | None = None,
    ) -> None:
        """Begin a unit in this process; see the attributes."""
        self.publisher = publisher
        self.provided: Publisher | None = None
        self.observer = observer
        self.publishes_itself = publishes_itself
        self.autoflush = autoflush
        self.caution: str | None = None
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.make_id = make_id
        self.is_of_message = make_id is not None
        self.keeps = make_id is None
        self.pid = process.pid
        self.total = 0
        self.total_size = 0
        self.dropped: deque[str] | None = None

    def note_provided(self, provided: Publisher | None) -> None:
        """Note the application's publisher for a further event: the unit may end elsewhere.

        Raises:
            UsageError: the events that wait here are for another one.
        """
        if not self.total:
            self.provided = provided
        elif provided is not self.provided:
            raise UsageError(
                "the events of one unit of work are for the publishers of two applications; give "
                "each its own, with auto_publishing(independent=True)"
            )

    def follow(self, outer: UnitOfWork) -> None:
        """Inherit publisher and ids from ``outer``, without joining it.

        In an independent block within a message, events are still follow-on events; and the inner
        unit uses the outer one's publisher, unless it has its own.
        """
        self.is_of_message = outer.is_of_message and self.publisher in (None, outer.publisher)
        self.publisher = self.publisher or outer.publisher
        self.make_id = outer.make_id
        self.keeps = outer.make_id is None


def _size_of(event: Event) -> int:
    """Return the bytes that an event takes, with its headers."""
    headers = event.headers
    if type(headers) is CheckedHeaders:
        return len(event.body) + headers.size
    return len(event.body) + (plain_table(headers, "headers")[1] if headers else 0)


class Buffer:
    """Events in the order they were enqueued.

    Safe for threads, for signal handlers and for exceptions that these raise.

    Attributes:
        unit: the unit of work that it belongs to.
        parent: the buffer that it is appended to on success; None for the outermost.
        events: the events, in order.
        count: the number of events.
        size: the bytes of their bodies and headers.
        closed: whether it refuses events; set it to end the unit, before the events are taken.
        abandoned: whether it was closed because its block is gone, see :class:`Scope`.
    """

    __slots__ = ("abandoned", "closed", "count", "events", "parent", "size", "unit")

    def __init__(self, unit: UnitOfWork, parent: Buffer | None = None) -> None:
        self.unit = unit
        self.parent = parent
        self.events: list[Event] = []
        self.count = 0  # kept apart: len() would be a call
        self.size = 0
        self.closed = False
        self.abandoned = False

    @property
    def outermost(self) -> Buffer:
        """The buffer of the whole unit."""
        buffer = self
        while buffer.parent is not None:
            buffer = buffer.parent
        return buffer

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``.

        Args:
            event: the event to add.
            max_events: the limit if the unit has none.
            max_bytes: the limit if the unit has none.

        Raises:
            CollectorClosed: the unit of work, or the savepoint, has ended.
            CollectorFull: the unit has reached a limit.
        """
        unit = self.unit
        size = len(event.body) if not event.headers else _size_of(event)
        if unit.max_events is not None:
            max_events = unit.max_events
        if unit.max_bytes is not None:
            max_bytes = unit.max_bytes
        if self.closed:  # a straight line begins
            raise CollectorClosed(self._why_closed(event))
        if unit.total >= max_events or unit.total_size + size > max_bytes:
            raise CollectorFull(
                f"the collector holds {unit.total} event(s) of {unit.total_size} bytes; its limits "
                f"are max_events={max_events}, max_bytes={max_bytes}; call publish() after each "
                "commit, or raise the limit"
            )
        unit.total += 1
        unit.total_size += size
        self.count += 1
        self.size += size
        self.events.append(event)

    def remove(self, event: Event) -> bool:
        """Remove ``event``; return False if it isn't here any more."""
        size = _size_of(event)
        unit = self.unit
        others = [each for each in self.events if each is not event]
        if len(others) == self.count:
            return False
        if len(others) != self.count - 1:  # another thread has added one; a straight line begins
            return self.remove(event)
        self.events = others
        unit.total -= 1
        unit.total_size -= size
        self.count -= 1
        self.size -= size
        return True

    def take(self, taken: list[Event]) -> None:
        """Move all events to the end of ``taken``.

        The list is the caller's, so that the events are not lost if a signal handler raises on the
        way back.
        """
        unit = self.unit
        empty: list[Event] = []
        events = self.events  # a straight line begins
        self.events = empty
        unit.total -= self.count
        unit.total_size -= self.size
        self.count = 0
        self.size = 0
        taken += events

    def put_back(self, taken: list[Event]) -> None:
        """Put taken events back at the front, beyond the limits and even after ``close()``."""
        unit = self.unit
        count = len(taken)
        size = sum(map(_size_of, taken))
        front = slice(0, 0)
        self.events[front] = taken  # a straight line begins
        unit.total += count
        unit.total_size += size
        self.count += count
        self.size += size

    def close(self) -> list[Event]:
        """Refuse further events; remove and return the present ones."""
        self.closed = True
        taken: list[Event] = []
        if self.events:
            self.take(taken)
        return taken

    def merge(self) -> bool:
        """Close, and append the events to the nearest open buffer above.

        Returns:
            Whether there was one. If not, the unit has ended, and the events are still here.
        """
        self.closed = True
        empty: list[Event] = []
        while True:
            above = self.parent
            while above is not None and above.closed:
                above = above.parent
            if above is None:
                return False
            if not above.closed:  # a straight line begins; it may have been closed by now
                events = self.events
                self.events = empty
                above.events += events
                above.count += self.count
                above.size += self.size
                self.count = 0
                self.size = 0
                return True

    def __del__(self) -> None:
        # A signal handler that raises on entering __exit__, a body that its server never closes.
        # Events that a test observes, or that a forked child inherits, are not lost.
        if not getattr(self, "events", None):  # nearly always; or it was interrupted when made
            return
        unit = self.unit
        if unit.pid != process.pid or unit.observer is not None:
            return
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(Exception):  # the interpreter may be shutting down
                logger.error(
                    "%d event(s) lost: neither published nor dropped when their unit of work was "
                    "abandoned: %s",
                    len(self.events),
                    ", ".join([repr(event.id) for event in self.events]),
                )
                return

    def _why_closed(self, event: Event) -> str:
        return (
            f"the event to {event.target!r} was enqueued after its unit of work had ended "
            "(a task or thread that outlived its request, block or message?); "
            "give such work its own auto_publishing() block"
        )


class SavepointBuffer(Buffer):
    """The buffer of a savepoint, which can't publish once all blocks above have ended.

    If they end while it is open, its events are refused at its end.
    """

    __slots__ = ()

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``; see :meth:`Buffer.append`."""
        above = self.parent
        while above is not None and (above.closed or isinstance(above, SavepointBuffer)):
            above = above.parent
        if above is None:
            raise CollectorClosed(self._why_closed(event))
        super().append(event, max_events, max_bytes)


class Scope:
    """A collector's place in a context: threads and tasks that inherit the context share it.

    If a signal handler raises on entering ``__exit__``, the block never ends, and its scope stays:
    what joined it would wait for ever. But such a block is gone, since the ``with`` statement held
    it. So a scope refers to its collector weakly, and one whose collector went without closing is
    *abandoned*, and passed over.

    Attributes:
        collector: returns the ``EventCollector``, whose module is built on this one, or None.
        buffer: the innermost buffer of its unit of work.
        outer: the scope before it, or None.
        innermost: returns the innermost scope of this context, even if it is abandoned, or None.
        resume: makes an earlier scope the innermost again, for a generator's next step.
    """

    __slots__ = ("_kept", "buffer", "collector", "outer")

    _kept: Any
    innermost: ClassVar[Callable[[], Scope | None]] = _scope.get
    resume: ClassVar[Callable[[Scope | None], Token[Scope | None]]] = _scope.set

    def __init__(self, collector: Any, buffer: Buffer, outer: Scope | None) -> None:
        self.collector: Callable[[], Any] = weakref.ref(collector)
        self.buffer = buffer
        self.outer = outer

    @staticmethod
    def present() -> Scope | None:
        """Return the innermost scope of this context that isn't abandoned, or None."""
        scope = _scope.get()
        while scope is not None and scope.collector() is None and scope._is_abandoned():
            scope = scope.outer
        return scope

    @staticmethod
    def enter(collector: Any, buffer: Buffer) -> Token[Scope | None]:
        """Make ``buffer`` of ``collector`` the innermost of this context."""
        return _scope.set(Scope(collector, buffer, Scope.around()))

    @staticmethod
    def around() -> Scope | None:
        """Return the innermost scope of this context whose buffer is still open.

        A server may run each request in a context that it copied from an earlier one's, for as long
        as a connection is kept alive: a chain of closed scopes would hold all those requests.
        """
        scope = Scope.present()
        while scope is not None and (scope.buffer.closed or scope.collector() is None):
            scope = scope.outer
        return scope

    @staticmethod
    def begin(collector: Any, buffer: Buffer) -> None:
        """Make ``buffer`` of ``collector`` the only one of this context, for its lifetime."""
        scope = Scope(collector, buffer, None)
        scope._kept = collector  # nothing else holds it
        _scope.set(scope)

    def _is_abandoned(self) -> bool:
        return self.buffer.abandoned or not self.buffer.closed

    @staticmethod
    def leave(token: Token[Scope | None]) -> None:
        """Restore the scope that was innermost before ``enter``.

        In another context than that of ``enter`` (a generator entered in one context and closed in
        another, a synchronous dependency between two threads) the token doesn't apply. Then the
        innermost scope goes only if it is closed or directly above the one to restore; at worst, a
        closed buffer remains current, never another unit's.
        """
        try:
            _scope.reset(token)
        except RuntimeError:  # it was left, and interrupted then
            return
        except ValueError:
            scope, before = _scope.get(), token.old_value
            if scope is not None and (
                scope.buffer.closed or (isinstance(before, Scope) and scope.outer is before)
            ):
                _scope.set(scope.outer)
