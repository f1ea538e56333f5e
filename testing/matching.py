"""Matches events against a test's criteria, and shows how they differ. No state, no I/O."""

from __future__ import annotations

import datetime
import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any

from outbox import Event, InvalidEvent, UsageError
from outbox.header_values import plain_table
from outbox.messages.headers import ATTEMPT, DEAD_REASON
from outbox.messages.topics import matches
from outbox.serializer import JSONSerializer, Serializer, serializer_for

__all__ = [
    "Undecoded",
    "Wanted",
    "contains",
    "describe",
    "is_copy",
    "is_dead_letter",
    "payload_of",
]

_WIDTH = 300
_DIFF_LINES = 40
_JSON = JSONSerializer()

AsSent = Callable[[Any], Any]
"""A function that returns a value as it arrives once it has been sent; raises if it can't be."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The properties that an event must have; ``...`` allows any.

    Attributes:
        target: the routing key or a topic pattern.
        payload: see :func:`contains`; or a function of the payload.
        headers: the headers that must be present, compared likewise.
        key: the event's key.
        priority: the event's priority.
        exchange: the exchange that it goes to.
        delay: the seconds, or the timedelta, between enqueueing and delivery; None for no delay.
        deliver_at: the time from which it may be delivered; None for at once.
        tolerance: the seconds by which the last two may be off.
    """

    target: str
    payload: Any = ...
    headers: Mapping[str, Any] | None = None
    key: str | EllipsisType | None = ...
    priority: int | EllipsisType | None = ...
    exchange: str | EllipsisType = ...
    delay: float | datetime.timedelta | EllipsisType | None = ...
    deliver_at: datetime.datetime | EllipsisType | None = ...
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse swapped arguments: ``enqueue_event`` takes the payload first."""
        if not isinstance(self.target, str):
            raise TypeError(
                f"the target is {self.target!r:.80}, not a str: assertions take the target first, "
                "then the payload"
            )

    def accepts(self, event: Event) -> bool:
        """Return whether ``event`` has these properties.

        Raises:
            Exception: a function among the criteria raised it.
        """
        return (
            matches(self.target, event.target)
            and (self.payload is ... or self._has_payload(event))
            and (self.headers is None or contains(dict(event.headers), self.headers, _as_header))
            and self.key in (..., event.key)
            and self.priority in (..., event.priority)
            and self.exchange in (..., event.exchange)
            and (self.delay is ... or self._in_time(event, self._after(event)))
            and (self.deliver_at is ... or self._in_time(event, self.deliver_at))
        )

    def distance(self, event: Event) -> tuple[float, ...]:
        """Return a sort key for ``event``: the closer to a match, the smaller."""
        alike = 1.0 if matches(self.target, event.target) else _alike(self.target, event.target)
        if self.payload is ... or callable(self.payload):
            return -alike, 0.0
        return -alike, -_alike(describe(self.payload), describe(payload_of(event)))

    def difference(self, event: Event) -> str:
        """Return a diff from these properties to ``event``; empty if it shows no difference."""
        wanted: dict[str, Any] = {"target": self.target}
        actual: dict[str, Any] = {"target": event.target}
        if matches(self.target, event.target):
            actual["target"] = self.target
        if self.payload is not ... and not callable(self.payload):
            wanted["payload"] = self.payload
            actual["payload"] = _like(payload_of(event), self.payload, _as_payload_of(event))
        if self.headers is not None:
            wanted["headers"] = dict(self.headers)
            actual["headers"] = _like(dict(event.headers), self.headers, _as_header)
        for name in ("key", "priority", "exchange"):
            if getattr(self, name) is not ...:
                wanted[name], actual[name] = getattr(self, name), getattr(event, name)
        for name in ("delay", "deliver_at"):
            if getattr(self, name) is not ...:
                wanted[name] = str(getattr(self, name))
                due = event.deliver_at
                if name == "delay" and due is not None:
                    actual[name] = str((due - event.occurred_at).total_seconds())
                else:
                    actual[name] = str(due)
        diff = difflib.ndiff(_lines(wanted), _lines(actual))
        lines = [line for line in diff if not line.startswith("?")]
        if all(line.startswith("  ") for line in lines):
            return ""
        return "\n".join(lines[:_DIFF_LINES])

    def __str__(self) -> str:
        parts = [repr(self.target)]
        if self.payload is not ...:
            parts.append(f"with {describe(self.payload)}")
        if self.headers is not None:
            parts.append(f"headers {describe(dict(self.headers))}")
        for name in ("key", "priority", "exchange", "delay", "deliver_at"):
            value = getattr(self, name)
            if value is not ...:
                parts.append(f"{name} {value!r}")
        first, *rest = parts
        return first + (" " + " and ".join(rest) if rest else "")

    def _has_payload(self, event: Event) -> bool:
        return contains(payload_of(event), self.payload, _as_payload_of(event))

    def _after(self, event: Event) -> datetime.datetime | None:
        if self.delay is None or isinstance(self.delay, EllipsisType):
            return None
        span = self.delay
        if not isinstance(span, datetime.timedelta):
            span = datetime.timedelta(seconds=span)
        return event.occurred_at + span

    def _in_time(self, event: Event, wanted: datetime.datetime | EllipsisType | None) -> bool:
        if wanted is None or isinstance(wanted, EllipsisType) or event.deliver_at is None:
            return wanted is event.deliver_at
        return abs((event.deliver_at - wanted).total_seconds()) <= self.tolerance


def contains(actual: Any, wanted: Any, as_sent: AsSent | None = None) -> bool:
    """Return whether ``actual`` matches ``wanted``.

    Objects are compared only by the members in ``wanted``, at every depth. A compiled regular
    expression matches any text in which it is found, a function any value that it returns true for,
    and anything with ``==`` what it equals, or what it equals once it has been sent.

    Raises:
        Exception: a function in ``wanted`` raised it.
        TypeError: such a function is a coroutine function, which returns no answer.
    """
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and all(
            name in actual and contains(actual[name], value, as_sent)
            for name, value in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(actual, Sequence)
            and not isinstance(actual, str | bytes)
            and len(actual) == len(wanted)
            and all(map(partial(contains, as_sent=as_sent), actual, wanted))
        )
    if isinstance(wanted, re.Pattern):
        return isinstance(actual, str) and wanted.search(actual) is not None
    if _is_predicate(wanted):
        return _answer(wanted, actual)
    if wanted == actual:
        return True
    if as_sent is None or isinstance(actual, Undecoded):
        return False
    try:
        sent = as_sent(wanted)
    except (TypeError, ValueError, InvalidEvent):  # a stand-in such as unittest.mock.ANY
        return False
    return contains(actual, sent)


def _answer(predicate: Callable[[Any], Any], actual: Any) -> bool:
    answer = predicate(actual)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()  # else it warns that it was never awaited
        raise TypeError(f"{predicate!r} is asynchronous; an expected payload takes plain functions")
    return bool(answer)


def _as_payload_of(event: Event) -> AsSent | None:
    """Return a function that returns a value as it would arrive in an event like this one."""
    serializer = serializer_for(event.content_type)
    return None if serializer is None else partial(_through, serializer)


def _through(serializer: Serializer, value: Any) -> Any:
    return serializer.decode(bytes(serializer.encode(value)))


def _as_header(value: Any) -> Any:
    return plain_table({"value": value}, "headers")[0]["value"]


def is_copy(event: Event) -> bool:
    """Return whether a consumer's failure made ``event``, not the application: see copies.py."""
    return ATTEMPT in event.headers or is_dead_letter(event)


def is_dead_letter(event: Event) -> bool:
    """Return whether ``event`` is a dead letter; applications can't set its headers."""
    return DEAD_REASON in event.headers


def payload_of(event: Event) -> Any:
    """Return the payload of ``event``, or a placeholder if it can't be decoded."""
    try:
        return event.payload
    except (UsageError, ValueError):
        return Undecoded(event)


class Undecoded:
    """The placeholder for a payload that can't be decoded; it equals nothing."""

    def __init__(self, event: Event) -> None:
        self._text = f"<{len(event.body)} bytes of {event.content_type or 'no content type'}>"

    def __repr__(self) -> str:
        return self._text


def describe(value: Any) -> str:
    """Return ``value`` as one line, cut off after 300 characters."""
    try:
        text = json.dumps(
            value, ensure_ascii=False, sort_keys=True, default=partial(_through, _JSON)
        )
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."


def _is_predicate(wanted: Any) -> bool:
    # A callable that defines ==, such as unittest.mock's, is compared as a value.
    equals: Any = type(wanted).__eq__
    return callable(wanted) and equals is object.__eq__


def _alike(text: str, other: str) -> float:
    return difflib.SequenceMatcher(None, text, other, autojunk=False).ratio()


def _like(actual: Any, wanted: Any, as_sent: AsSent | None) -> Any:
    """Reduce ``actual`` to what ``wanted`` compares, so that a diff shows real differences only."""
    if isinstance(wanted, Mapping) and isinstance(actual, Mapping):
        return {
            name: _like(actual[name], value, as_sent)
            for name, value in wanted.items()
            if name in actual
        }
    if isinstance(wanted, list | tuple) and isinstance(actual, list) and len(wanted) == len(actual):
        return [_like(*pair, as_sent) for pair in zip(actual, wanted, strict=True)]
    return wanted if contains(actual, wanted, as_sent) else actual


def _lines(value: Any) -> list[str]:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=2, default=_shown)
    return text.splitlines()


def _shown(value: Any) -> Any:
    """Return ``value`` as it would be sent; its ``repr()`` if it stands for others."""
    try:
        return _through(_JSON, value)
    except (TypeError, ValueError):
        return repr(value)
