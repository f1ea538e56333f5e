"""What a test asks of the events that its code collected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from outbox import Event
from outbox.testing.recorder import Recorder
from outbox.topics import matches

__all__ = ["CollectedEvents", "Matches"]

_SHOWN = 10
_WIDTH = 300


class Matches(tuple[Event, ...]):
    """Several events that match, in the order in which they were published."""

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
    """

    def __init__(self, recorder: Recorder) -> None:
        """Answer from what ``recorder`` has recorded; the fixture does this."""
        self._recorder = recorder

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

    def __repr__(self) -> str:
        return (
            f"<CollectedEvents {len(self.published)} published, {len(self.cleared)} cleared, "
            f"{len(self.pending)} pending>"
        )

    @overload
    def assert_published(  # type: ignore[overload-overlap]  # 1 is an int, and means one event
        self,
        target: str,
        payload: Any = ...,
        *,
        headers: Mapping[str, Any] | None = ...,
        times: Literal[1] | None = ...,
    ) -> Event: ...

    @overload
    def assert_published(
        self,
        target: str,
        payload: Any = ...,
        *,
        headers: Mapping[str, Any] | None = ...,
        times: int,
    ) -> Matches: ...

    def assert_published(
        self,
        target: str,
        payload: Any = ...,
        *,
        headers: Mapping[str, Any] | None = None,
        times: int | None = None,
    ) -> Event | Matches:
        """Assert that a matching event was published, and return it.

        Args:
            target: the routing key or a topic pattern (``*`` one word, ``#`` any number).
            payload: what the decoded payload must be; of an object only the members given are
                looked at, at every depth; anything with ``==`` may stand for a value.
            headers: headers that must be there, compared likewise.
            times: how many events must match; by default at least one.

        Returns:
            The event; or all that match, in order, if there are several or ``times`` is not 1.

        Raises:
            AssertionError: tells what was there instead, nearest first.
        """
        __tracebackhide__ = True
        found = Matches(
            event for event in self.published if self._match(event, target, payload, headers)
        )
        if not found if times is None else len(found) != times:
            wanted = "at least 1" if times is None else str(times)
            raise AssertionError(
                f"expected {wanted} published event(s) to {target!r}"
                f"{_with(payload, headers)}, found {len(found)}\n{self._there(target, payload)}"
            )
        return found[0] if len(found) == 1 else found

    def assert_not_published(
        self,
        target: str,
        payload: Any = ...,
        *,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        """Assert that no matching event was published; the arguments as in ``assert_published``.

        Raises:
            AssertionError: tells which ones were.
        """
        __tracebackhide__ = True
        found = [event for event in self.published if self._match(event, target, payload, headers)]
        if found:
            raise AssertionError(
                f"expected no published event to {target!r}{_with(payload, headers)}, "
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

    @staticmethod
    def _match(event: Event, target: str, payload: Any, headers: Mapping[str, Any] | None) -> bool:
        return (
            matches(target, event.target)
            and (payload is ... or _contains(event.payload, payload))
            and (headers is None or _contains(dict(event.headers), headers))
        )

    def _there(self, target: str, payload: Any) -> str:
        """Tell what there is, the nearest to what was wanted first."""

        def distance(event: Event) -> tuple[float, float]:
            alike = 1.0 if matches(target, event.target) else _alike(target, event.target)
            if payload is ...:
                return -alike, 0.0
            return -alike, -_alike(_text(payload), _text(event.payload))

        states = {
            "published": self.published,
            "pending (not published yet)": self.pending,
            "cleared (dropped)": self.cleared,
        }
        told = [
            _lines(state, sorted(events, key=distance))
            for state, events in states.items()
            if events
        ]
        return "\n".join(told) or "nothing was enqueued at all"


def _contains(actual: Any, wanted: Any) -> bool:
    """Return whether ``actual`` is ``wanted``, members of objects that are not named aside."""
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and all(
            name in actual and _contains(actual[name], value) for name, value in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(actual, Sequence)
            and not isinstance(actual, str | bytes)
            and len(actual) == len(wanted)
            and all(map(_contains, actual, wanted))
        )
    return bool(wanted == actual)


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _with(payload: Any, headers: Mapping[str, Any] | None) -> str:
    wanted = "" if payload is ... else f" with {_text(payload)}"
    return wanted + ("" if headers is None else f" and headers {_text(headers)}")


def _lines(state: str, events: Sequence[Event]) -> str:
    lines = [f"{state}:"]
    for event in events[:_SHOWN]:
        headers = f" headers {_text(dict(event.headers))}" if event.headers else ""
        lines.append(f"  {event.target!r} {_text(event.payload)}{headers}")
    if len(events) > _SHOWN:
        lines.append(f"  and {len(events) - _SHOWN} more")
    return "\n".join(lines)


def _text(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
