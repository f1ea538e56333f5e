"""What requests do before they end, for applications of each ASGI framework alike.

An application adds an endpoint for each of these, and what only its framework has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.types import ASGIApp, Receive, Scope, Send

import outbox.sql
from outbox import CollectorClosed, EventCollector, auto_publishing, enqueue_event
from tests.databases import Base, Order

__all__ = [
    "PLAIN",
    "WITH_SESSION",
    "Framework",
    "OutOfStock",
    "either",
    "session_of_request",
    "store_in_thread",
]

SHOP = os.environ["SHOP_URL"]
ARCHIVE = os.environ["ARCHIVE_URL"]


def _sessions(url: str) -> async_sessionmaker[AsyncSession]:
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    engine.dispose()
    return async_sessionmaker(create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:")))


sessions = _sessions(SHOP)
archive = _sessions(ARCHIVE)
sync_sessions = sessionmaker(create_engine(SHOP))

bound_session: ContextVar[AsyncSession | None] = ContextVar("bound_session", default=None)
outbox.sql.bind(bound_session.get)


async def session_of_request() -> AsyncIterator[AsyncSession]:
    """Yield the session of a request, and commit it if the request succeeds."""
    async with sessions.begin() as session:
        token = bound_session.set(session)
        try:
            yield session
        finally:
            bound_session.reset(token)


class Framework(Protocol):
    """What the frameworks name differently."""

    def respond(
        self, status: int, *, background: Callable[[], Awaitable[None]] | None = None
    ) -> Any: ...

    def stream(self, parts: AsyncIterator[bytes] | Iterator[bytes]) -> Any: ...

    def http_error(self, status: int) -> Exception: ...

    async def in_thread(self, function: Callable[[], object]) -> None: ...


class OutOfStock(Exception):
    """Has a handler that makes a response of it, with the status that it names."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


PLAIN: dict[str, Callable[[Framework], Awaitable[Any]]] = {}
"""Endpoints by their path: their events are collected."""

EndpointWithSession = TypeVar("EndpointWithSession", bound=Callable[..., Awaitable[Any]])
WITH_SESSION: dict[str, Callable[..., Awaitable[Any]]] = {}
"""Endpoints by their path, given a session that is committed if they return."""


def plain(endpoint: Callable[[Framework], Awaitable[Any]]) -> None:
    PLAIN[endpoint.__name__] = endpoint


def with_session(endpoint: EndpointWithSession) -> EndpointWithSession:
    WITH_SESSION[endpoint.__name__] = endpoint
    return endpoint


@plain
async def success(framework: Framework) -> Any:
    enqueue_event({}, "success")
    return framework.respond(201)


@plain
async def returned_409(framework: Framework) -> Any:
    enqueue_event({}, "returned_409")
    return framework.respond(409)


@plain
async def raised_404(framework: Framework) -> Any:
    enqueue_event({}, "raised_404")
    raise framework.http_error(404)


@plain
async def exception(framework: Framework) -> Any:
    enqueue_event({}, "exception")
    raise ValueError


@plain
async def handled_as_200(framework: Framework) -> Any:
    enqueue_event({}, "handled_as_200")
    raise OutOfStock(200)


@plain
async def handled_as_422(framework: Framework) -> Any:
    enqueue_event({}, "handled_as_422")
    raise OutOfStock(422)


@plain
async def caught(framework: Framework) -> Any:
    try:
        enqueue_event({}, "caught")
        raise ValueError
    except ValueError:
        return framework.respond(200)


@plain
async def savepoint(framework: Framework) -> Any:
    enqueue_event({}, "savepoint.around")
    try:
        with EventCollector.current().savepoint():
            enqueue_event({}, "savepoint.inside")
            raise ValueError
    except ValueError:
        return framework.respond(200)


@plain
async def stream(framework: Framework) -> Any:
    async def parts() -> AsyncIterator[bytes]:
        enqueue_event({}, "stream.first")
        yield b"x" * 1000
        enqueue_event({}, "stream.second")
        yield b"x" * 1000

    enqueue_event({}, "stream")
    return framework.stream(parts())


@plain
async def sync_stream(framework: Framework) -> Any:
    def parts() -> Iterator[bytes]:
        enqueue_event({}, "sync_stream.part")
        yield b"x" * 1000

    enqueue_event({}, "sync_stream")
    return framework.stream(parts())


@plain
async def stream_breaks(framework: Framework) -> Any:
    async def parts() -> AsyncIterator[bytes]:
        async with auto_publishing(independent=True):
            enqueue_event({}, "stream_breaks.step")
        enqueue_event({}, "stream_breaks.part")
        yield b"x" * 1000
        raise ValueError

    enqueue_event({}, "stream_breaks")
    return framework.stream(parts())


@plain
async def disconnect(framework: Framework) -> Any:
    async def parts() -> AsyncIterator[bytes]:
        async with auto_publishing(independent=True):
            enqueue_event({}, "disconnect.step")
        enqueue_event({}, "disconnect.part")
        while True:
            yield b"x" * 10_000
            await asyncio.sleep(0.01)

    enqueue_event({}, "disconnect")
    return framework.stream(parts())


@plain
async def background(framework: Framework) -> Any:
    async def task() -> None:
        enqueue_event({}, "background.task")

    enqueue_event({}, "background")
    return framework.respond(200, background=task)


@plain
async def background_fails(framework: Framework) -> Any:
    async def task() -> None:
        async with auto_publishing(independent=True):
            enqueue_event({}, "background_fails.step")
        enqueue_event({}, "background_fails.task")
        raise ValueError

    enqueue_event({}, "background_fails")
    return framework.respond(200, background=task)


_outliving: set[asyncio.Task[None]] = set()


@plain
async def task_after(framework: Framework) -> Any:
    async def outlive() -> None:
        await asyncio.sleep(0.3)
        async with auto_publishing():
            enqueue_event({}, "task_after.block")
        with contextlib.suppress(CollectorClosed):
            enqueue_event({}, "task_after.late")

    enqueue_event({}, "task_after")
    _outliving.add(asyncio.create_task(outlive()))
    return framework.respond(200)


@plain
async def thread(framework: Framework) -> Any:
    await framework.in_thread(lambda: enqueue_event({}, "thread"))
    return framework.respond(200)


@plain
async def commit_is_caught(framework: Framework) -> Any:
    async with sessions() as session:
        session.add_all([Order(name="commit_is_caught"), Order(name="commit_is_caught")])
        enqueue_event({}, "commit_is_caught.stored", session=session)
        enqueue_event({}, "commit_is_caught.collected", session=None)
        try:
            await session.commit()
        except IntegrityError:
            return framework.respond(200)


@plain
async def stored_background(framework: Framework) -> Any:
    async def task() -> None:
        async with sessions.begin() as session:
            session.add(Order(name="stored_background"))
            enqueue_event({}, "stored_background", session=session)
        raise ValueError

    return framework.respond(200, background=task)


@plain
async def stored_stream(framework: Framework) -> Any:
    async def parts() -> AsyncIterator[bytes]:
        for step in ("first", "second"):
            async with sessions.begin() as session:
                session.add(Order(name=f"stored_stream.{step}"))
                enqueue_event({}, f"stored_stream.{step}", session=session)
                yield b"x" * 1000
                if step == "second":
                    raise ValueError

    return framework.stream(parts())


@plain
async def two_databases(framework: Framework) -> Any:
    async with archive.begin() as other:
        enqueue_event({}, "two_databases.archive", session=other)
        try:
            async with sessions.begin() as session:
                session.add(Order(name="two_databases"))
                enqueue_event({}, "two_databases.shop", session=session)
                raise ValueError
        except ValueError:
            return framework.respond(200)


@with_session
async def stored(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="stored"))
    enqueue_event({}, "stored", session=session)
    return framework.respond(201)


@with_session
async def stored_returned_409(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="stored_returned_409"))
    enqueue_event({}, "stored_returned_409.stored", session=session)
    enqueue_event({}, "stored_returned_409.collected", session=None)
    return framework.respond(409)


@with_session
async def stored_raised_404(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="stored_raised_404"))
    enqueue_event({}, "stored_raised_404", session=session)
    raise framework.http_error(404)


@with_session
async def stored_exception(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="stored_exception"))
    enqueue_event({}, "stored_exception", session=session)
    raise ValueError


@with_session
async def stored_savepoint(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="stored_savepoint.around"))
    enqueue_event({}, "stored_savepoint.around", session=session)
    try:
        async with session.begin_nested():
            session.add(Order(name="stored_savepoint.inside"))
            enqueue_event({}, "stored_savepoint.inside", session=session)
            raise ValueError
    except ValueError:
        return framework.respond(200)


@with_session
async def commit_fails(
    framework: Framework, session: AsyncSession, name: str = "commit_fails"
) -> Any:
    session.add_all([Order(name=name), Order(name=name)])
    enqueue_event({}, f"{name}.stored", session=session)
    enqueue_event({}, f"{name}.collected", session=None)
    return framework.respond(201)


@with_session
async def stored_then_background_fails(
    framework: Framework, session: AsyncSession, name: str = "stored_then_background_fails"
) -> Any:
    async def task() -> None:
        raise ValueError

    session.add(Order(name=name))
    enqueue_event({}, f"{name}.stored", session=session)
    enqueue_event({}, f"{name}.collected", session=None)
    return framework.respond(200, background=task)


@with_session
async def bound(framework: Framework, session: AsyncSession) -> Any:
    session.add(Order(name="bound"))
    enqueue_event({}, "bound")
    await framework.in_thread(lambda: enqueue_event({}, "bound.thread"))
    return framework.respond(409)  # which drops what is collected


def either(shop: Any, others: dict[str, Any]) -> ASGIApp:
    """Return an application that serves some paths, and what is below them, by others."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for prefix, other in others.items():
            if scope.get("path", "").startswith(prefix):
                below = scope["path"].removeprefix(prefix) or "/"
                await other({**scope, "path": below, "raw_path": below.encode()}, receive, send)
                return
        await shop(scope, receive, send)

    return app


def store_in_thread() -> None:
    """Use a synchronous session, as in an endpoint that isn't a coroutine function."""
    with sync_sessions.begin() as session:
        session.add(Order(name="sync_endpoint"))
        enqueue_event({}, "sync_endpoint", session=session)
