"""An ASGI application: each request is a unit of work that succeeds, fails, streams or breaks."""

from __future__ import annotations

import asyncio
import itertools
import random

from starlette.types import Receive, Scope, Send

from outbox import auto_publishing, configure
from outbox.middleware.asgi import OutboxMiddleware
from proving.programs.late import in_late_task
from proving.programs.unit import Unit, journal

HISTORY = journal("asgi")
CHANCE = random.Random(HISTORY.by)
NUMBERS = itertools.count()

configure()


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise RuntimeError(f"no {scope['type']} here")
    unit = Unit(HISTORY, f"{next(NUMBERS)}", CHANCE)
    unit.enqueue_some()
    way = CHANCE.choice(("ok", "ok", "ok", "stream", "gather", "error", "raise", "break"))
    in_late_task(HISTORY, unit, CHANCE, succeeds=way not in ("error", "raise", "break"))
    match way:
        case "ok":
            unit.commit()
            await respond(send, 200, [b"done"])
        case "error":
            unit.roll_back()
            await respond(send, 500, [b"failed"])
        case "raise":
            unit.roll_back()
            raise RuntimeError("on purpose")
        case "gather":
            await asyncio.gather(
                *(sibling(unit, number) for number in range(3)), return_exceptions=True
            )
            unit.commit()
            await respond(send, 200, [b"done"])
        case _:
            await respond(send, 200, [b"x" * 1000] * 3)
            unit.enqueue()
            if way == "break":
                unit.roll_back()
                raise RuntimeError("on purpose")
            unit.commit()


async def sibling(unit: Unit, number: int) -> None:
    """Run one of several concurrent blocks in a request; the middle one fails."""
    async with auto_publishing():
        inner = Unit(HISTORY, f"{unit.name.partition('/')[2]}/{number}", CHANCE)
        inner.enqueue_some()
        await asyncio.sleep(0.001)
        if number == 1:
            inner.roll_back()
            raise RuntimeError("on purpose")
        inner.commit()


async def respond(send: Send, status: int, chunks: list[bytes]) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


app = OutboxMiddleware(application)
