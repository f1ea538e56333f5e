"""An announcement: what a process says of itself, as JSON. No I/O.

``docs/tap.md`` describes the format. It holds no payload, no id of an event and no URL, and ages
rather than times, since clocks of machines differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ENDED", "MOST_BYTES", "Announcement", "encoded"]

VERSION = 1
MOST_BYTES = 4096
ENDED = "ended"
"""The phase of the last announcement of a process."""

_LONGEST_TEXT = 255
_LONGEST = 1e10  # seconds


@dataclass(frozen=True, slots=True)
class Announcement:
    """A process, as it has announced itself.

    Texts come from outside, and may hold anything that is printed with care.

    Attributes:
        process: a text that no other process has, also on another machine.
        kind: ``worker`` or ``relay``.
        id: the id that its command was given, or None.
        host: the name of its machine.
        pid: its process id, on that machine or in its container.
        app_id: its setting ``app_id``; empty if there is none.
        phase: ``starting``, ``ready``, ``leaving``, ``stopping`` or ``ended``.
        age: the seconds since it was started.
        interval: the seconds between two announcements, on average.
        queues: the queues that it consumes, as far as they fit in.
        more_queues: the number of those that don't.
        threads: the messages of plain consumers that it processes at a time.
        concurrency: the messages of asynchronous consumers that it processes at a time.
        in_flight: the messages that it has begun and not ended.
        late: the handlers that go on after their timeout.
        error: the class of the last error that was logged, or None.
        error_age: the seconds since that error; None without one.
        outbox: the version of outbox.
        python: the version of Python.
        ago: the seconds since it has arrived here.
    """

    process: str
    kind: str
    id: str | None
    host: str
    pid: int
    app_id: str
    phase: str
    age: float
    interval: float
    queues: tuple[str, ...] = ()
    more_queues: int = 0
    threads: int = 0
    concurrency: int = 0
    in_flight: int = 0
    late: int = 0
    error: str | None = None
    error_age: float | None = None
    outbox: str = ""
    python: str = ""
    ago: float = 0.0

    @classmethod
    def parse(cls, body: bytes) -> Announcement | None:
        """Return the announcement in ``body``, or None if that isn't one of a version known here.

        Unknown members are ignored, and those with a value of another type count as missing.
        """
        if len(body) > MOST_BYTES:
            return None
        try:
            values: Any = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict) or values.get("version") != VERSION:
            return None
        error = values.get("error")
        error = error if isinstance(error, dict) else {}
        process, queues = _text(values, "process"), values.get("queues")
        if process is None:
            return None
        return cls(
            process=process,
            kind=_text(values, "kind") or "",
            id=_text(values, "id"),
            host=_text(values, "host") or "",
            pid=_count(values, "pid"),
            app_id=_text(values, "app_id") or "",
            phase=_text(values, "phase") or "",
            age=_seconds(values, "age") or 0.0,
            interval=_seconds(values, "interval") or 0.0,
            queues=tuple(name for name in queues if isinstance(name, str))
            if isinstance(queues, list)
            else (),
            more_queues=_count(values, "more_queues"),
            threads=_count(values, "threads"),
            concurrency=_count(values, "concurrency"),
            in_flight=_count(values, "in_flight"),
            late=_count(values, "late"),
            error=_text(error, "class"),
            error_age=_seconds(error, "age"),
            outbox=_text(values, "outbox") or "",
            python=_text(values, "python") or "",
        )


def encoded(values: Mapping[str, Any], queues: Sequence[str]) -> bytes:
    """Return an announcement of at most 4 KiB, with as many of ``queues`` as fit in.

    Args:
        values: the other members; long texts are cut.
        queues: the names of the queues.
    """
    whole: dict[str, Any] = {"version": VERSION, **{name: _cut(values[name]) for name in values}}
    body = _json({**whole, "queues": list(queues), "more_queues": 0})
    shown = len(queues)
    while len(body) > MOST_BYTES and shown:
        shown = shown * 3 // 4
        more = len(queues) - shown
        body = _json({**whole, "queues": list(queues[:shown]), "more_queues": more})
    return body


def _json(values: Mapping[str, Any]) -> bytes:
    # Texts may hold lone surrogates, such as a host name that isn't UTF-8.
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _cut(value: Any) -> Any:
    return value[:_LONGEST_TEXT] if isinstance(value, str) else value


def _text(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    return value[:_LONGEST_TEXT] if isinstance(value, str) else None


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and value >= 0 else 0


def _seconds(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST:
        return None
    return float(value)
