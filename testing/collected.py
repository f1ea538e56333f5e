"""What a test asks of the events that its code collected, and what it has happen to them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import EllipsisType
from typing import Any, Literal, TypedDict, Unpack, overload

from outbox import BrokerError, Event, Publisher
from outbox.configuration import publisher_if_any
from outbox.consumers import Consumer
from outbox.testing.delivering import Delivered, Deliverer
from outbox.testing.matching import Wanted, describe
from outbox.testing.recorder import Recorder

__all__ = ["CollectedEvents", "Criteria", "Matches"]

_SHOWN = 10


class Criteria(TypedDict, total=False):
    """What else can be asked of an event; see :class:`outbox.testing.matching.Wanted`."""

    headers: Mapping[str, Any] | None
    key: str | EllipsisType | None
    priority: int | EllipsisType | None
    exchange: str | EllipsisType
    delay: float | datetime.timedelta | EllipsisType | None
    deliver_at: datetime.datetime | EllipsisType | None
    tolerance: float


class Matches(tuple[Event, ...]):
    """Several events that match, in their order."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name in Event.__dataclass_fields__ or name == "payload":
            raise AssertionError(
                f"{len(self)} events match, so there is no one {name}: narrow the assertion, "
                "say times=1, or take one of them"
            )
        raise AttributeError(name)


class CollectedEvents:
    """Everything the code under test enqueued, and what became of it.

    It has taken the place of every publisher for one test: nothing reaches a broker. Payloads have
    been through the real serializer. Thread-safe.

    Attributes:
        strict: whether the test fails in the end if an event was published that no assertion has
            spoken of.
    """

    def __init__(self, recorder: Recorder, *, strict: bool = False) -> None:
        """Answer from what ``recorder`` has recorded; the fixture does this."""
        self._recorder = recorder
        self._spoken_of: set[int] = set()
        self._deliverer = Deliverer(lambda: self._recorder.published, self._publisher)
        self.strict = strict

    # ---------------------------------------------------------------------------- the states

    @property
    def published(self) -> tuple[Event, ...]:
        """What was published, in that order."""
        return self._recorder.published

    @property
    def cleared(self) -> tuple[Event, ...]:
        """What was dropped by a failure or by ``clear_events()``, in that order."""
        return self._recorder.dropped

    @property
    def pending(self) -> tuple[Event, ...]:
        """What was enqueued and neither published nor dropped yet, in that order."""
        return self._recorder.pending

    @property
    def kept(self) -> tuple[Event, ...]:
        """What a publisher keeps, since the test has the broker away, in that order."""
        return self._recorder.kept

    @property
    def stored(self) -> tuple[Event, ...]:
        """What was stored in a transaction of the application's database, in that order."""
        return self._recorder.stored

    @property
    def parked(self) -> tuple[Event, ...]:
        """What was parked, since the test has no queue for it, in that order."""
        return self._recorder.parked

    def __repr__(self) -> str:
        told = [f"{len(events)} {state}" for state, events in self._states().items() if events]
        return f"<CollectedEvents {', '.join(told) or 'none'}>"

    # ------------------------------------------------------------------------- assertions

    @overload
    def assert_published(  # type: ignore[overload-overlap]  # 1 is an int, and means one event
        self,
        target: str,
        payload: Any = ...,
        *,
        times: Literal[1] | None = ...,
        **criteria: Unpack[Criteria],
    ) -> Event: ...

    @overload
    def assert_published(
        self, target: str, payload: Any = ..., *, times: int, **criteria: Unpack[Criteria]
    ) -> Matches: ...

    def assert_published(
        self,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        """Assert that a matching event was published, and return it.

        Args:
            target: the routing key or a topic pattern (``*`` one word, ``#`` any number).
            payload: what the decoded payload must be. Of objects only the members given are looked
                at, at every depth; a compiled regular expression stands for any text that it is
                found in, a function for what it is true of, and anything with ``==`` for what it
                equals.
            times: how many events must match; by default at least one.
            **criteria: ``headers`` that must be there, compared likewise; ``key``, ``priority``,
                ``exchange``; ``delay`` in seconds or ``deliver_at``, to the ``tolerance`` (1 s).

        Returns:
            The event; or all that match, in order, if there are several or ``times`` is not 1.

        Raises:
            AssertionError: tells what was there instead, nearest first.
        """
        __tracebackhide__ = True
        return self._assert("published", Wanted(target, payload, **criteria), times)

    def assert_pending(
        self,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        """Assert that a matching event waits for its unit of work; see ``assert_published``."""
        __tracebackhide__ = True
        return self._assert("pending", Wanted(target, payload, **criteria), times)

    def assert_cleared(
        self,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        """Assert that a matching event was dropped; see ``assert_published``."""
        __tracebackhide__ = True
        return self._assert("cleared", Wanted(target, payload, **criteria), times)

    def assert_kept(
        self,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        """Assert that a matching event is kept by a publisher; see ``assert_published``."""
        __tracebackhide__ = True
        return self._assert("kept", Wanted(target, payload, **criteria), times)

    def assert_stored(
        self,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        """Assert that a matching event was stored in a transaction; see ``assert_published``."""
        __tracebackhide__ = True
        return self._assert("stored", Wanted(target, payload, **criteria), times)

    def assert_not_published(
        self, target: str, payload: Any = ..., **criteria: Unpack[Criteria]
    ) -> None:
        """Assert that no matching event was published; the arguments as in ``assert_published``.

        Raises:
            AssertionError: tells which ones were.
        """
        __tracebackhide__ = True
        wanted = Wanted(target, payload, **criteria)
        found = [event for event in self.published if wanted.accepts(event)]
        if found:
            raise AssertionError(
                f"expected no published event to {wanted}, "
                f"found {len(found)}\n{_lines('published', found)}"
            )

    def assert_nothing_published(self) -> None:
        """Assert that no event was published.

        Raises:
            AssertionError: tells which ones were.
        """
        __tracebackhide__ = True
        if self.published:
            raise AssertionError(
                f"expected no published event, found {len(self.published)}\n"
                + _lines("published", self.published)
            )

    def assert_nothing_else_published(self) -> None:
        """Assert that every published event was spoken of by an assertion before.

        Raises:
            AssertionError: tells which ones were not.
        """
        __tracebackhide__ = True
        others = [event for event in self.published if id(event) not in self._spoken_of]
        if others:
            raise AssertionError(
                f"expected nothing else, found {len(others)} more published event(s)\n"
                + _lines("published, and no assertion has spoken of", others)
            )

    def assert_published_in_order(self, *targets: str) -> Matches:
        """Assert that events to these targets or patterns were published one after the other.

        Others may come in between.

        Returns:
            The events, one for each target.

        Raises:
            AssertionError: tells the order in which they were published.
        """
        __tracebackhide__ = True
        found: list[Event] = []
        following: Iterator[Event] = iter(self.published)
        for target in targets:
            wanted = Wanted(target)
            event = next((one for one in following if wanted.accepts(one)), None)
            if event is None:
                after = f" after {found[-1].target!r}" if found else ""
                order = ", ".join(repr(one.target) for one in self.published) or "nothing"
                raise AssertionError(f"no event to {target!r}{after}; published were {order}")
            found.append(event)
        self._spoken_of.update(map(id, found))
        return Matches(found)

    # --------------------------------------------------------------- transactions pretended

    def commit(self) -> tuple[Event, ...]:
        """Have everything that is pending or stored published, as if its work had succeeded.

        For code whose transaction a test never commits.

        Returns:
            What was published by it.
        """
        events = (*self.pending, *self.stored)
        self._recorder.publish_all(events)
        return events

    def rollback(self) -> tuple[Event, ...]:
        """Have everything that is pending or stored dropped, as if its work had failed.

        Returns:
            What was dropped by it.
        """
        events = (*self.pending, *self.stored)
        self._recorder.cleared(events)
        return events

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Drop what is enqueued in the block and still pending or stored, if the block raises."""
        before = {id(event) for event in (*self.pending, *self.stored)}
        try:
            yield
        except BaseException:
            events = (*self.pending, *self.stored)
            self._recorder.cleared([one for one in events if id(one) not in before])
            raise

    # ------------------------------------------------------------------------- failures

    def fail_publish(
        self, after: int = 0, error: BrokerError | None = None
    ) -> AbstractContextManager[None]:
        """Return a block in which ``after`` events are confirmed and no more: the rest is kept.

        When the block ends, the broker is back, and what was kept is published. In a consumer,
        where nothing is kept, ``publish()`` raises.

        Args:
            after: how many events the broker still confirms.
            error: what the reports say; by default that the connection was lost.
        """
        return self._recorder.failing(after, error)

    def broker_down(self) -> AbstractContextManager[None]:
        """Return a block in which the broker is away: everything is kept until its end."""
        return self._recorder.failing(0, None)

    def unroutable(self, target: str) -> AbstractContextManager[None]:
        """Return a block in which no queue is bound for ``target``, a key or a pattern."""
        return self._recorder.unroutable(target)

    def crash_after_confirm(self) -> AbstractContextManager[None]:
        """Return a block in which the process dies right after the broker has confirmed a chunk.

        ``outbox.testing.SimulatedCrash`` is raised where the code publishes: no ``Exception``.
        """
        return self._recorder.crashing()

    # ------------------------------------------------------------------------- consumers

    def deliver(
        self, *consumers: type[Consumer] | Consumer, raise_errors: bool = True
    ) -> list[Delivered]:
        """Have ``consumers`` process what was published for them and not delivered to them yet.

        Each message goes through its real life: decoded from its bytes, in a context of its own,
        its follow-on events published, a failure among the dead letters.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
            raise_errors: raise what a handler raises, once its outcome is settled.

        Returns:
            What was delivered, in order, each with its outcome and follow-on events.
        """
        return self._deliverer.deliver(consumers, raise_errors=raise_errors)

    def deliver_all(
        self, *consumers: type[Consumer] | Consumer, raise_errors: bool = True
    ) -> list[Delivered]:
        """Deliver again and again, follow-on events too, until nothing is left to deliver.

        Raises:
            AssertionError: there is no end to it.
        """
        __tracebackhide__ = True
        return self._deliverer.deliver_all(consumers, raise_errors=raise_errors)

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        **options: Any,
    ) -> Delivered:
        """Have one consumer process one message, and return what became of it.

        Args:
            consumer: a class or an instance.
            payload: of the message; it goes through the real serializer.
            raise_errors: raise what the handler raises.
            **options: ``target`` (by default the consumer's queue), and those of
                ``enqueue_event()``.
        """
        return self._deliverer.perform(consumer, payload, options, raise_errors=raise_errors)

    # -------------------------------------------------------------------------- the rest

    def check_strict(self) -> None:
        """At the end of the test: see that every published event was spoken of, if strict."""
        __tracebackhide__ = True
        if self.strict:
            self.assert_nothing_else_published()

    def _publisher(self) -> Publisher:
        return publisher_if_any() or Publisher("memory://")

    def _states(self) -> dict[str, tuple[Event, ...]]:
        return {
            "published": self.published,
            "pending": self.pending,
            "cleared": self.cleared,
            "kept": self.kept,
            "stored": self.stored,
            "parked": self.parked,
        }

    def _assert(self, state: str, wanted: Wanted, times: int | None) -> Event | Matches:
        __tracebackhide__ = True
        states = self._states()
        found = Matches(event for event in states[state] if wanted.accepts(event))
        if not found if times is None else len(found) != times:
            number = "at least 1" if times is None else str(times)
            raise AssertionError(
                f"expected {number} {state} event(s) to {wanted}, found {len(found)}\n"
                + _there(states, state, wanted, found)
            )
        self._spoken_of.update(map(id, found))
        return found[0] if len(found) == 1 else found


_TOLD: dict[str, str] = {
    "pending": "pending (not published yet)",
    "cleared": "cleared (dropped)",
    "kept": "kept (the broker was away)",
    "stored": "stored (in a transaction)",
    "parked": "parked (no queue was bound)",
}


def _there(
    states: Mapping[str, Sequence[Event]], asked: str, wanted: Wanted, found: Sequence[Event]
) -> str:
    """Tell what there is, the nearest to what was wanted first, and how it differs."""
    order = [asked, *(state for state in states if state != asked)]
    told = []
    for state in order:
        nearest = sorted(states[state], key=wanted.distance)
        if nearest:
            told.append(_lines(_TOLD.get(state, state), nearest))
    others = [event for event in states[asked] if event not in found]
    if others and not found:
        difference = wanted.difference(min(others, key=wanted.distance))
        if difference:
            told.append(f"wanted (-) and nearest (+):\n{difference}")
    return "\n".join(told) or "nothing was enqueued at all"


def _lines(state: str, events: Sequence[Event]) -> str:
    lines = [f"{state}:"]
    for event in events[:_SHOWN]:
        headers = f" headers {describe(dict(event.headers))}" if event.headers else ""
        lines.append(f"  {event.target!r} {describe(event.payload)}{headers}")
    if len(events) > _SHOWN:
        lines.append(f"  and {len(events) - _SHOWN} more")
    return "\n".join(lines)
