"""Assertions about the events that the code under test enqueued."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, cast, overload

from outbox import Event
from outbox.messages.headers import TASK
from outbox.testing.called import ExpectedCall, criteria_of
from outbox.testing.matching import Wanted, describe, payload_of

__all__ = ["Criteria", "EventAssertions", "Matches", "States"]

_SHOWN = 10


class Criteria(TypedDict, total=False):
    """Further criteria for an event; see :class:`outbox.testing.matching.Wanted`."""

    headers: Mapping[str, Any] | None
    key: str | EllipsisType | None
    priority: int | EllipsisType | None
    exchange: str | EllipsisType
    delay: float | datetime.timedelta | EllipsisType | None
    deliver_at: datetime.datetime | EllipsisType | None
    tolerance: float


class Matches(tuple[Event, ...]):
    """The events that match an assertion, in order."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        __tracebackhide__ = True
        if name in Event.__dataclass_fields__ or name == "payload":
            raise AssertionError(
                f"{len(self)} events match, so there is no single {name}: narrow the assertion, "
                "pass times=1, or pick an event by its index"
            )
        raise AttributeError(name)


class States(Protocol):
    """The events by state, each tuple in order."""

    @property
    def published(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def dropped(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def pending(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def kept(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def stored(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def parked(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def dead_letters(self) -> tuple[Event, ...]: ...  # noqa: D102

    @property
    def lasting(self) -> tuple[Event, ...]: ...  # noqa: D102

    def advice(self, event: Event) -> str: ...  # noqa: D102


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _also(published: _Method, state: str, what: str) -> _Method:
    """Return a method like ``assert_published`` for events in another state."""

    def method(
        self: EventAssertions,
        target: str,
        payload: Any = ...,
        *,
        times: int | None = None,
        **criteria: Unpack[Criteria],
    ) -> Event | Matches:
        __tracebackhide__ = True
        return self._assert(state, _wanted(target, payload, criteria), times)

    method.__name__ = f"assert_{state}"
    method.__qualname__ = f"EventAssertions.{method.__name__}"
    method.__doc__ = f"Assert that a matching event {what}; see ``{published.__name__}``."
    return cast(_Method, method)


class EventAssertions:
    """The events that the code under test enqueued, by state. Thread-safe.

    Attributes:
        strict: whether the test fails at its end if a published event was matched by no assertion.
    """

    def __init__(self, states: States, *, strict: bool = False) -> None:
        """Make assertions about the events in ``states``."""
        self._states = states
        self._matched: set[int] = set()
        self.strict = strict

    # ---------------------------------------------------------------------------- the states

    @property
    def published(self) -> tuple[Event, ...]:
        """The events that the application has published, in order of publishing.

        Dead letters, and copies for the next attempt at a message, are not among them.
        """
        return self._states.published

    @property
    def cleared(self) -> tuple[Event, ...]:
        """The events dropped by a failure or by ``clear_events()``, in order of dropping."""
        return self._states.dropped

    @property
    def pending(self) -> tuple[Event, ...]:
        """The events neither published nor dropped yet, in order of enqueueing."""
        return self._states.pending

    @property
    def kept(self) -> tuple[Event, ...]:
        """The events that a publisher keeps while the broker is unavailable, in order."""
        return self._states.kept

    @property
    def stored(self) -> tuple[Event, ...]:
        """The events stored in the application's transactions, in order of storing."""
        return self._states.stored

    @property
    def parked(self) -> tuple[Event, ...]:
        """The events parked because they were unroutable, in order of parking."""
        return self._states.parked

    @property
    def dead_letters(self) -> tuple[Event, ...]:
        """The messages that consumers have dead-lettered, as they are in ``<queue>.dead``."""
        return self._states.dead_letters

    def __repr__(self) -> str:
        counts = [f"{len(events)} {state}" for state, events in self._all().items() if events]
        return f"<{type(self).__name__} {', '.join(counts) or 'none'}>"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # A test case, with its attributes, is sent to another process when Django's tests run in
        # parallel and a subtest has failed.
        return str, (repr(self),)

    # ------------------------------------------------------------------------- assertions

    def assert_later(
        self,
        call: Callable[..., Any],
        /,
        *args: Any,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Event | Matches:
        """Assert that a task was called later with these arguments, and return its event.

        Args:
            call: a task, function or method, as ``later()`` takes it.
            *args: the arguments, however they were given: by position or by name. ``...`` alone
                stands for any.
            options: the options of the call, such as ``{"delay": 60, "priority": 9}``, and
                ``times``, as in :meth:`assert_published`.
            **kwargs: further arguments.

        Raises:
            AssertionError: it wasn't.
        """
        __tracebackhide__ = True
        expected = ExpectedCall(call, args, kwargs)
        criteria: Any = criteria_of(options or {})
        times = criteria.pop("times", None)
        target = criteria.pop("queue", "#")
        headers = {**(criteria.pop("headers", None) or {}), TASK: expected.name}
        criteria["headers"] = headers
        wanted = _wanted(target, expected, criteria)
        return self._assert("published", wanted, times)

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
            target: the routing key or a topic pattern (``*`` one word, ``#`` any number); a dead
                letter matches only the full name of its queue, ``"<queue>.dead"``.
            payload: the expected payload, compared with the decoded one. Objects are compared only
                by the members given, at every depth; a compiled regular expression matches any text
                that it is found in, a function any value that it returns true for, and anything
                with ``==`` what it equals, as it is or as the serializer sends it: a UUID, a
                Decimal or a dataclass matches what was made of it.
            times: the number of events that must match; by default at least one.
            **criteria: ``headers`` that the event must have, compared likewise; ``key``,
                ``priority``, ``exchange``; ``delay`` in seconds or ``deliver_at``, within the
                ``tolerance`` (1 s).

        Returns:
            The event if exactly one matches; otherwise all that match, in order.

        Raises:
            AssertionError: too few or too many match; the message lists the events, closest first.
            Exception: a function in ``payload`` or ``headers`` raised it, and too few or too many
                of the other events match.
        """
        __tracebackhide__ = True
        return self._assert("published", _wanted(target, payload, criteria), times)

    assert_pending = _also(assert_published, "pending", "waits for its unit of work")
    assert_cleared = _also(assert_published, "cleared", "was dropped")
    assert_kept = _also(assert_published, "kept", "is kept by a publisher")
    assert_stored = _also(assert_published, "stored", "was stored in a transaction")
    assert_enqueued = _also(
        assert_published, "enqueued", "was published, or is in a transaction that was not undone"
    )

    def assert_not_published(
        self, target: str, payload: Any = ..., **criteria: Unpack[Criteria]
    ) -> None:
        """Assert that no matching event was published; for arguments see ``assert_published``.

        Raises:
            AssertionError: the message lists the matching events.
            Exception: a function in ``payload`` or ``headers`` raised it.
        """
        __tracebackhide__ = True
        self._assert_none("published", _wanted(target, payload, criteria))

    def assert_not_enqueued(
        self, target: str, payload: Any = ..., **criteria: Unpack[Criteria]
    ) -> None:
        """Assert that no matching event was published or is in a transaction.

        For arguments see ``assert_published``.

        Raises:
            AssertionError: the message lists the matching events.
            Exception: a function in ``payload`` or ``headers`` raised it.
        """
        __tracebackhide__ = True
        self._assert_none("enqueued", _wanted(target, payload, criteria))

    def assert_nothing_published(self) -> None:
        """Assert that no event was published.

        Raises:
            AssertionError: the message lists the published events.
        """
        __tracebackhide__ = True
        _assert_empty("published", self.published)

    def assert_nothing_enqueued(self) -> None:
        """Assert that no event was published or is in a transaction.

        Raises:
            AssertionError: the message lists the events.
        """
        __tracebackhide__ = True
        _assert_empty("enqueued", self._states.lasting)

    def assert_nothing_else_published(self) -> None:
        """Assert that every published event was matched by an earlier assertion.

        Raises:
            AssertionError: the message lists the others.
        """
        __tracebackhide__ = True
        others = [event for event in self.published if id(event) not in self._matched]
        if others:
            raise AssertionError(
                f"expected every published event to match an assertion, but {len(others)} did not\n"
                + _lines("published, but not matched", others)
            )

    def assert_published_in_order(self, *targets: str) -> Matches:
        """Assert that events to these targets or patterns were published in this order.

        Other events may come in between.

        Returns:
            The events, one for each target.

        Raises:
            AssertionError: the message shows the actual order.
        """
        __tracebackhide__ = True
        for _ in self._looks():
            published = self.published
            matching = _in_order(published, targets)
            if len(matching) == len(targets):
                break
        else:
            after = f" after {matching[-1].target!r}" if matching else ""
            order = ", ".join(repr(event.target) for event in published) or "nothing"
            missing = targets[len(matching)]
            raise AssertionError(
                f"expected a published event to {missing!r}{after}; published in order: {order}"
            )
        self._matched.update(map(id, matching))
        return Matches(matching)

    def check_strict(self) -> None:
        """Assert at the end of a strict test that every published event was matched."""
        __tracebackhide__ = True
        if self.strict:
            self.assert_nothing_else_published()

    def _looks(self) -> Iterator[None]:
        """Yield before each look for the events of an assertion, at least once."""
        yield

    def _all(self) -> dict[str, tuple[Event, ...]]:
        return {
            "published": self.published,
            "pending": self.pending,
            "cleared": self.cleared,
            "kept": self.kept,
            "stored": self.stored,
            "parked": self.parked,
            "dead-lettered": self.dead_letters,
        }

    def _where_to_look(self, state: str, wanted: Wanted) -> tuple[Event, ...]:
        """Return the events in ``state``, and the dead letters if ``wanted`` names their queue."""
        events = self._states.lasting if state == "enqueued" else self._all()[state]
        if state not in ("published", "enqueued"):
            return events
        return events + tuple(one for one in self.dead_letters if one.target == wanted.target)

    def _assert_none(self, state: str, wanted: Wanted) -> None:
        __tracebackhide__ = True
        matching, error = _sorted_out(self._where_to_look(state, wanted), wanted)
        if matching:
            raise AssertionError(
                f"expected no {state} event to {wanted}, "
                f"found {len(matching)}\n{_lines(state, matching)}"
            )
        if error is not None:
            raise error

    def _assert(self, state: str, wanted: Wanted, times: int | None) -> Event | Matches:
        __tracebackhide__ = True
        for _ in self._looks():
            matching, error = _sorted_out(self._where_to_look(state, wanted), wanted)
            if matching if times is None else len(matching) == times:
                break
        else:
            if error is not None:
                raise error
            number = "at least 1" if times is None else times
            noun = "event" if times in (None, 1) else "events"
            raise AssertionError(
                f"expected {number} {state} {noun} to {wanted}, found {len(matching)}\n"
                + _overview(self._all(), state, wanted, matching)
                + (self._advice(wanted) if state == "published" else "")
            )
        self._matched.update(map(id, matching))
        return matching[0] if len(matching) == 1 else matching

    def _advice(self, wanted: Wanted) -> str:
        """Return how the wanted event, if it is in a transaction, will be published."""
        waiting, _ = _sorted_out([*self.stored, *self.pending], wanted)
        for advice in filter(None, map(self._states.advice, waiting)):
            return f"\n{advice}. assert_enqueued() accepts the event as it is"
        return ""


def _assert_empty(state: str, events: Sequence[Event]) -> None:
    __tracebackhide__ = True
    if events:
        raise AssertionError(
            f"expected no {state} event, found {len(events)}\n" + _lines(state, events)
        )


_TITLES: dict[str, str] = {
    "pending": "pending (not published yet)",
    "cleared": "cleared (dropped)",
    "kept": "kept (the broker is unavailable)",
    "stored": "stored (in a transaction)",
    "parked": "parked (unroutable)",
}


def _wanted(target: str, payload: Any, criteria: Criteria) -> Wanted:
    __tracebackhide__ = True
    for name in criteria:
        if name not in Criteria.__annotations__:
            names = [*Criteria.__annotations__, "times"]
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"
            raise TypeError(f"{name!r} is not a criterion of an assertion; {hint}")
    return Wanted(target, payload, **criteria)


def _sorted_out(events: Sequence[Event], wanted: Wanted) -> tuple[Matches, Exception | None]:
    """Return the events that match, and the first error of a function among the criteria.

    The function may have been written for the matching events alone; so its error for another one
    only counts if the assertion isn't decided by those that match.
    """
    matching, first_error = [], None
    for event in events:
        try:
            if wanted.accepts(event):
                matching.append(event)
        except Exception as error:
            error.add_note(f"raised by a function of the assertion, for {event!r}")
            first_error = first_error or error
    return Matches(matching), first_error


def _in_order(events: Sequence[Event], targets: Sequence[str]) -> list[Event]:
    """Return an event for each target, in order, up to the first target without one."""
    matching: list[Event] = []
    following = iter(events)
    for target in targets:
        wanted = Wanted(target)
        event = next(filter(wanted.accepts, following), None)
        if event is None:
            break
        matching.append(event)
    return matching


def _overview(
    states: Mapping[str, Sequence[Event]], asked: str, wanted: Wanted, matching: Sequence[Event]
) -> str:
    """List the events by state, the closest first, and show how the closest one differs."""
    looked_at = ["published", "stored"] if asked == "enqueued" else [asked]
    order = [*looked_at, *(state for state in states if state not in looked_at)]
    parts = []
    for state in order:
        events = sorted(states[state], key=wanted.distance)
        if events:
            parts.append(_lines(_TITLES.get(state, state), events))
    others = [event for state in looked_at for event in states[state] if event not in matching]
    if others and not matching:
        difference = wanted.difference(min(others, key=wanted.distance))
        if difference:
            parts.append(f"wanted (-) and closest (+):\n{difference}")
    return "\n".join(parts) or "no event was enqueued"


def _lines(state: str, events: Sequence[Event]) -> str:
    lines = [f"{state}:"]
    for event in events[:_SHOWN]:
        headers = f" headers {describe(dict(event.headers))}" if event.headers else ""
        lines.append(f"  {event.target!r} {describe(payload_of(event))}{headers}")
    if len(events) > _SHOWN:
        lines.append(f"  and {len(events) - _SHOWN} more")
    return "\n".join(lines)
