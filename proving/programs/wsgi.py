"""A WSGI application: each request is a unit of work that succeeds, fails, streams or breaks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from outbox import configure
from outbox.middleware.wsgi import OutboxMiddleware
from proving.programs.late import in_late_thread
from proving.programs.unit import Unit, journal

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

HISTORY = journal("wsgi")
CHANCE = random.Random(HISTORY.by)
NUMBERS = itertools.count()

configure()


def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    unit = Unit(HISTORY, f"{next(NUMBERS)}", CHANCE)
    unit.enqueue_some()
    way = CHANCE.choice(("ok", "ok", "ok", "stream", "error", "raise", "break"))
    if way in ("ok", "error", "raise"):
        in_late_thread(HISTORY, unit, CHANCE, succeeds=way == "ok")
    match way:
        case "ok":
            unit.commit()
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"done"]
        case "error":
            unit.roll_back()
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"failed"]
        case "raise":
            unit.roll_back()
            raise RuntimeError("on purpose")
        case _:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return stream(unit, way)


def stream(unit: Unit, way: str) -> Iterator[bytes]:
    try:
        for _ in range(3):
            yield b"x" * 1000
            unit.enqueue()
    except GeneratorExit:  # the client is gone, and the work was not finished
        unit.roll_back()
        raise
    if way == "break":
        unit.roll_back()
        raise RuntimeError("on purpose")
    unit.commit()


app = OutboxMiddleware(application)
