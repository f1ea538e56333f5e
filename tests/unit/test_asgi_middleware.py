"""The ASGI middleware with plain callables, with Starlette and with FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import fastapi
import pytest
import starlette.testclient
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from outbox import (
    AutoPublishingEventCollector,
    CollectorClosed,
    EventCollector,
    Publisher,
    auto_publishing,
    enqueue_event,
)
from outbox.middleware.asgi import OutboxMiddleware
from outbox.testing import CollectedEvents
from tests.transports import SlowTransport

HTTP = {"type": "http", "method": "GET", "path": "/", "headers": []}


def published(collected: CollectedEvents) -> list[Any]:
    return [event.payload for event in collected.published]


async def nothing() -> Any:
    return {"type": "http.request"}


async def call(app: Any, **scope: Any) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await OutboxMiddleware(app)({**HTTP, **scope}, nothing, send)
    return sent


async def respond(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one line that outbox logged, which reports no loss."""
    [record] = [one for one in caplog.records if one.name.startswith("outbox")]
    assert record.levelno == logging.WARNING
    return record.getMessage()


def get(app: Any, path: str = "/") -> Any:
    client = starlette.testclient.TestClient(app, raise_server_exceptions=False)
    return client.get(path)


@pytest.mark.hazard("E3")
def test_the_events_are_published_after_the_application_has_returned(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event("endpoint", "t")
        await respond(send)
        assert published(collected_events) == []
        enqueue_event("after the last byte", "t")

    asyncio.run(call(app))
    assert published(collected_events) == ["endpoint", "after the last byte"]


@pytest.mark.hazard("D2", "E4")
@pytest.mark.parametrize("status", [400, 404, 500])
def test_an_unsuccessful_status_drops_the_events_and_names_them(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send, status)

    asyncio.run(call(app))
    assert published(collected_events) == []
    [record] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert collected_events.cleared[0].id in record.getMessage()


def test_an_application_that_sends_no_response_has_not_succeeded(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")

    asyncio.run(call(app))
    assert published(collected_events) == []


@pytest.mark.hazard("E4", "E11")
@pytest.mark.parametrize(
    "raised",
    [
        ValueError("alone"),
        ExceptionGroup("several", [ValueError(1), KeyError(2)]),
        BaseExceptionGroup("worse", [ValueError(1), GeneratorExit()]),
        WebSocketDisconnect(),  # is a failure where there is no WebSocket
    ],
    ids=repr,
)
def test_an_exception_drops_the_events_and_propagates_as_the_same_object(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    raised: BaseException,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)
        raise raised

    with pytest.raises(type(raised)) as caught:
        asyncio.run(call(app))
    assert caught.value is raised
    assert published(collected_events) == []
    assert type(raised).__name__ in only_warning(caplog)


@pytest.mark.hazard("D10")
def test_a_middleware_wrapped_twice_publishes_once(collected_events: CollectedEvents) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)

    asyncio.run(call(OutboxMiddleware(app)))
    assert published(collected_events) == [1]


@pytest.mark.parametrize("end", ["500", "raise"])
def test_of_two_wrapped_middlewares_the_outer_one_decides(
    collected_events: CollectedEvents, end: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)

    async def between(scope: Any, receive: Any, send: Any) -> None:
        async def drop(message: Any) -> None: ...

        await OutboxMiddleware(app)(scope, receive, drop)
        assert published(collected_events) == []
        if end == "raise":
            raise ValueError
        await respond(send, 500)

    with contextlib.suppress(ValueError):
        asyncio.run(call(between))
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == [1]


def test_a_requests_collector_is_current_until_its_end_and_no_longer(
    collected_events: CollectedEvents,
) -> None:
    inside: list[EventCollector] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        inside.append(EventCollector.current())
        await respond(send)

    async def main() -> None:
        before = EventCollector.current()
        await call(app)
        assert EventCollector.current() is before
        assert inside[0] is not before

    asyncio.run(main())


def starlette_app(**options: Any) -> Starlette:
    async def endpoint(request: Request) -> Response:
        enqueue_event("endpoint", "t")
        return JSONResponse({}, background=BackgroundTask(lambda: enqueue_event("task", "t")))

    def sync(request: Request) -> Response:
        enqueue_event("sync", "t")
        with auto_publishing() as block:
            enqueue_event("joined", "t")
        assert block.joined
        return JSONResponse({})

    async def stream(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            for n in range(3):
                enqueue_event(n, "t")
                yield b"x"

        return StreamingResponse(chunks())

    async def file(request: Request) -> Response:
        enqueue_event("file", "t")
        task = BackgroundTask(lambda: enqueue_event("task", "t"))
        return FileResponse(__file__, background=task)

    async def threads(request: Request) -> Response:
        async def work(n: int) -> None:
            await anyio.to_thread.run_sync(lambda: [enqueue_event(n, "t") for _ in range(100)])

        async with anyio.create_task_group() as group:
            for n in range(8):
                group.start_soon(work, n)
        return JSONResponse({})

    async def boom(request: Request) -> Response:
        enqueue_event("boom", "t")
        raise ValueError

    return Starlette(
        routes=[
            Route("/endpoint", endpoint),
            Route("/sync", sync),
            Route("/stream", stream),
            Route("/file", file),
            Route("/threads", threads),
            Route("/boom", boom),
        ],
        **options,
    )


class Base(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response


@pytest.mark.hazard("E1", "E2")
@pytest.mark.parametrize("placing", ["around", "added", "base inside", "base outside"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/endpoint", ["endpoint", "task"]),
        ("/sync", ["sync", "joined"]),
        ("/stream", [0, 1, 2]),
        ("/file", ["file", "task"]),
        ("/threads", [n for n in range(8) for _ in range(100)]),
        ("/boom", []),
    ],
)
def test_starlettes_endpoints_threads_tasks_and_streams_are_collected(
    collected_events: CollectedEvents, placing: str, path: str, expected: list[Any]
) -> None:
    app = starlette_app()
    if placing == "base inside":
        app.add_middleware(Base)
    if placing != "around":
        app.add_middleware(OutboxMiddleware)
    if placing == "base outside":
        app.add_middleware(Base)
    response = get(OutboxMiddleware(app) if placing == "around" else app, path)
    assert response.status_code == (500 if path == "/boom" else 200)
    found = published(collected_events)
    assert (sorted(found) if path == "/threads" else found) == expected


def test_a_file_sent_by_path_ends_the_request_like_any_other_body(
    collected_events: CollectedEvents,
) -> None:
    extensions: dict[str, Any] = {"http.response.pathsend": {}}
    start, pathsend = asyncio.run(call(starlette_app(), path="/file", extensions=extensions))
    assert start["status"] == 200
    assert pathsend == {"type": "http.response.pathsend", "path": __file__}
    assert published(collected_events) == ["file", "task"]


@pytest.mark.parametrize("more", [True, False])
def test_a_body_may_end_with_the_zero_copy_extension(
    collected_events: CollectedEvents, more: bool
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"header", "more_body": True})
        await send({"type": "http.response.zerocopysend", "file": 0, "more_body": more})
        enqueue_event(0, "x")

    asyncio.run(call(app))
    assert len(collected_events.published) == (0 if more else 1)


def fastapi_app(commit: Any) -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    async def transaction() -> AsyncIterator[None]:
        yield
        await commit()

    async def block() -> AsyncIterator[AutoPublishingEventCollector]:
        async with auto_publishing() as found:
            yield found

    def sync_block() -> Iterator[AutoPublishingEventCollector]:
        with auto_publishing() as found:
            yield found

    @app.get("/transaction", dependencies=[fastapi.Depends(transaction)])
    async def with_transaction() -> dict[str, str]:
        enqueue_event("transaction", "t")
        return {}

    @app.get("/block", dependencies=[fastapi.Depends(block)])
    async def with_block() -> dict[str, str]:
        enqueue_event("block", "t")
        return {}

    @app.get("/sync-block")
    def with_sync_block(
        found: AutoPublishingEventCollector = fastapi.Depends(sync_block),  # noqa: B008
    ) -> dict[str, str]:
        found.enqueue_event("sync block", "t")
        return {}

    return app


@pytest.mark.hazard("E3")
def test_events_are_published_after_a_commit_that_follows_the_response(
    collected_events: CollectedEvents,
) -> None:
    async def commit() -> None:
        assert published(collected_events) == []

    app = OutboxMiddleware(fastapi_app(commit))
    assert get(app, "/transaction").status_code == 200
    assert published(collected_events) == ["transaction"]


@pytest.mark.hazard("E3")
def test_a_commit_that_fails_after_the_response_publishes_nothing(
    collected_events: CollectedEvents,
) -> None:
    async def commit() -> None:
        raise ValueError("deferred constraint")

    get(OutboxMiddleware(fastapi_app(commit)), "/transaction")
    assert published(collected_events) == []


def test_a_disconnect_that_rolls_the_transaction_back_publishes_nothing(
    collected_events: CollectedEvents,
) -> None:
    """Servers of ASGI 2.4 say by an exception that the client has gone."""
    ends: list[str] = []

    async def transaction() -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            ends.append("rolled back")
            raise
        ends.append("committed")

    app = fastapi.FastAPI()

    @app.get("/", dependencies=[fastapi.Depends(transaction)])
    async def stream() -> StreamingResponse:
        enqueue_event("in the transaction", "t")
        return StreamingResponse(iter([b"x"]))

    async def send(message: Any) -> None:
        raise BrokenPipeError

    scope = {**HTTP, "asgi": {"version": "3.0", "spec_version": "2.4"}, "query_string": b""}
    with pytest.raises(ClientDisconnect):
        asyncio.run(OutboxMiddleware(app)(scope, nothing, send))
    assert ends == ["rolled back"]
    assert published(collected_events) == []


@pytest.mark.hazard("E10")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("path", "payload"), [("/block", "block"), ("/sync-block", "sync block")])
def test_a_block_can_be_a_fastapi_dependency(
    collected_events: CollectedEvents, wrapped: bool, path: str, payload: str
) -> None:
    app: Any = fastapi_app(None)
    assert get(OutboxMiddleware(app) if wrapped else app, path).status_code == 200
    assert published(collected_events) == [payload]


@pytest.fixture
def slow() -> Publisher:
    publisher = Publisher("memory://")
    publisher._own = SlowTransport()
    return publisher


@pytest.mark.hazard("E6")
@pytest.mark.parametrize("how", ["task", "scope"])
def test_a_cancellation_during_publishing_ends_only_the_wait(slow: Publisher, how: str) -> None:
    transport = slow._own
    assert isinstance(transport, SlowTransport)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)

    async def send(message: Any) -> None: ...

    middleware = OutboxMiddleware(app, publisher=slow)

    async def main() -> None:
        if how == "task":
            task = asyncio.create_task(middleware(dict(HTTP), nothing, send))
            await asyncio.sleep(0.05)
            task.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with anyio.move_on_after(0.05) as cancelled:
                await middleware(dict(HTTP), nothing, send)
            assert cancelled.cancelled_caught

    asyncio.run(main())
    [chunk] = transport.chunks
    assert [entry.event.payload for entry in chunk.entries] == [1]
    assert not chunk.future.cancelled()


def test_publishing_needs_no_thread_from_the_loops_pool(slow: Publisher) -> None:
    transport = slow._own
    assert isinstance(transport, SlowTransport)
    free = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)

    async def send(message: Any) -> None: ...

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, free.wait)
        task = asyncio.create_task(OutboxMiddleware(app, publisher=slow)(dict(HTTP), nothing, send))
        while not transport.submitted.is_set():
            assert not task.done()
            await asyncio.sleep(0)
        transport.release(transport.chunks[0])
        await task
        assert not busy.done()
        free.set()
        await busy

    try:
        asyncio.run(asyncio.wait_for(main(), 10))
    finally:
        free.set()


@pytest.mark.hazard("E8")
def test_a_task_that_outlives_its_request_is_refused(collected_events: CollectedEvents) -> None:
    late: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            await asyncio.sleep(0.01)
            enqueue_event("late", "t")

        late.append(asyncio.create_task(work()))
        await respond(send)

    async def main() -> None:
        await call(app)
        with pytest.raises(CollectorClosed):
            await late[0]

    asyncio.run(main())


def test_a_publisher_that_fails_never_fails_the_response(
    caplog: pytest.LogCaptureFixture,
) -> None:
    publisher = Publisher("memory://")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        publisher.close()
        await respond(send)

    async def send(message: Any) -> None: ...

    asyncio.run(OutboxMiddleware(app, publisher=publisher)(dict(HTTP), nothing, send))
    assert "could not publish" in caplog.text


def test_what_counts_as_success_is_configurable(collected_events: CollectedEvents) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(scope["path"], "t")
        await respond(send, int(scope["path"]))

    async def send(message: Any) -> None: ...

    middleware = OutboxMiddleware(app, is_success=lambda status: status == 404)
    for path in ("200", "404"):
        asyncio.run(middleware({**HTTP, "path": path}, nothing, send))
    assert published(collected_events) == ["404"]


@pytest.mark.hazard("E9")
def test_a_background_task_that_fails_fails_its_request(collected_events: CollectedEvents) -> None:
    def boom() -> None:
        raise ValueError

    async def endpoint(request: Request) -> Response:
        enqueue_event("endpoint", "t")
        return JSONResponse({}, background=BackgroundTask(boom))

    app = OutboxMiddleware(Starlette(routes=[Route("/", endpoint)]))
    assert get(app).status_code == 200
    assert published(collected_events) == []


def test_a_request_that_the_server_cancels_drops_its_events(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(call(app))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == [1]
    assert "CancelledError" in only_warning(caplog)


@pytest.mark.hazard("E6")
def test_a_cancellation_just_before_publishing_does_not_prevent_it(slow: Publisher) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def send(message: Any) -> None: ...

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(OutboxMiddleware(app, publisher=slow)(dict(HTTP), nothing, send))
    transport = slow._own
    assert isinstance(transport, SlowTransport)
    assert len(transport.chunks) == 1


def test_a_retried_request_with_the_same_scope_is_collected_again(
    collected_events: CollectedEvents,
) -> None:
    async def fails_once(scope: Any, receive: Any, send: Any) -> None:
        scope["attempt"] = scope.get("attempt", 0) + 1
        enqueue_event(scope["attempt"], "t")
        if scope["attempt"] == 1:
            raise ValueError
        await respond(send)

    async def send(message: Any) -> None: ...

    async def main() -> None:
        scope, app = dict(HTTP), OutboxMiddleware(fails_once)
        with pytest.raises(ValueError):
            await app(scope, nothing, send)
        await app(scope, nothing, send)

    asyncio.run(main())
    assert published(collected_events) == [2]


def test_a_block_that_never_ends_does_not_hold_back_the_request(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event("request", "t")
        await auto_publishing().__aenter__()
        await respond(send)

    asyncio.run(call(app))
    assert published(collected_events) == ["request"]


# ------------------------------------------------------------------------------ WebSocket


def websocket_app(collected: CollectedEvents, end: str) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        with pytest.warns(RuntimeWarning, match="waits until this connection has ended") as caught:
            enqueue_event("outside", "t")
        assert [warning.filename for warning in caught] == [__file__]
        enqueue_event("outside, too", "t")  # warnings are errors here
        with contextlib.suppress(*([WebSocketDisconnect] if end == "caught" else [])):
            while True:
                message = await websocket.receive_text()
                async with auto_publishing() as block:
                    enqueue_event(message, "t")
                assert not block.joined
                await websocket.send_json(published(collected))
                if end == "boom":
                    raise ValueError

    return OutboxMiddleware(Starlette(routes=[WebSocketRoute("/", endpoint)]))


@pytest.mark.hazard("E12")
@pytest.mark.parametrize("end", ["caught", "disconnect", "boom"])
def test_a_block_per_message_publishes_at_once_and_other_events_when_the_connection_ends(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    client = starlette.testclient.TestClient(websocket_app(collected_events, end))
    with contextlib.suppress(ValueError, WebSocketDisconnect), client.websocket_connect("/") as ws:
        ws.send_text("one")
        assert ws.receive_json() == ["one"]
        if end != "boom":
            ws.send_text("two")
            assert ws.receive_json() == ["one", "two"]
    outside = ["outside", "outside, too"]
    if end == "caught":
        assert published(collected_events) == ["one", "two", *outside]
    else:  # an exception has gone through the code that enqueued them
        assert published(collected_events) == (["one"] if end == "boom" else ["one", "two"])
        assert [event.payload for event in collected_events.cleared] == outside
        assert collected_events.cleared[0].id in only_warning(caplog)


def test_messages_in_blocks_leave_nothing_behind_in_the_connection(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for n in range(100):
            async with auto_publishing():
                enqueue_event(n, "t")
            assert len(EventCollector.current()) == 0
        with pytest.raises(ValueError):
            async with auto_publishing():
                enqueue_event("dropped", "t")
                raise ValueError

    asyncio.run(call(app, type="websocket"))
    assert published(collected_events) == list(range(100))


@pytest.mark.hazard("E5", "E11", "E12")
@pytest.mark.parametrize(
    "end",
    [
        WebSocketDisconnect(),
        ExceptionGroup("tasks", [WebSocketDisconnect(), WebSocketDisconnect()]),
        BrokenPipeError("the client has gone"),
        asyncio.CancelledError("the server shuts down"),
    ],
    ids=lambda end: type(end).__name__,
)
def test_an_exception_that_ends_a_connection_drops_what_was_enqueued_outside_of_blocks(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, end: BaseException
) -> None:
    """It has gone through the transaction in which they were enqueued, if there was one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with auto_publishing():
            enqueue_event("in a block", "t")
        with pytest.warns(RuntimeWarning):
            enqueue_event("outside", "t")
        raise end

    with pytest.raises(type(end)):
        asyncio.run(call(app, type="websocket"))
    assert published(collected_events) == ["in a block"]
    assert [event.payload for event in collected_events.cleared] == ["outside"]
    assert type(end).__name__ in only_warning(caplog)


def test_a_scope_of_another_protocol_passes_through(collected_events: CollectedEvents) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))
        async with auto_publishing() as block:
            enqueue_event(1, "t")
        assert not block.joined

    async def send(message: Any) -> None: ...

    scope = {"type": "channel", "channel": "thumbnails"}
    asyncio.run(OutboxMiddleware(app)(scope, nothing, send))
    assert seen == [({"type": "channel", "channel": "thumbnails"}, nothing, send)]
    assert published(collected_events) == [1]


# ------------------------------------------------------------------------------ lifespan


@pytest.mark.hazard("E12")
def test_events_of_startup_and_shutdown_are_published(collected_events: CollectedEvents) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        enqueue_event("startup", "t")
        yield
        enqueue_event("shutdown", "t")

    app = OutboxMiddleware(starlette_app(lifespan=lifespan))
    with starlette.testclient.TestClient(app) as client:
        assert published(collected_events) == ["startup"]
        client.get("/sync")
    assert published(collected_events) == ["startup", "sync", "joined", "shutdown"]


class Drained(SlowTransport):
    """Counts how often it is drained."""

    drained = 0

    def drain(self, timeout: float) -> bool:
        self.drained += 1
        return True


def live(app: Any, transport: Drained) -> list[str]:
    """Take an application through its life; return what it answered."""
    publisher = Publisher("memory://")
    publisher._own = transport
    messages = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> Any:
        return {"type": next(messages)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(OutboxMiddleware(app, publisher=publisher)({"type": "lifespan"}, receive, send))
    return sent


@pytest.mark.hazard("E7")
@pytest.mark.parametrize("how", ["raises", "returns"])
def test_the_publisher_is_drained_at_shutdown_without_a_lifespan(
    how: str,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http" or how == "returns"

    transport = Drained()
    assert live(app, transport) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert transport.drained == 1


@pytest.mark.hazard("E7")
def test_the_publisher_is_drained_even_if_the_shutdown_fails() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": ""})

    transport = Drained()
    assert live(app, transport) == ["lifespan.startup.complete", "lifespan.shutdown.failed"]
    assert transport.drained == 1


def test_a_startup_that_fails_stays_a_failure(collected_events: CollectedEvents) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event("startup", "t")
        await receive()
        raise ValueError("no database")

    with pytest.raises(ValueError, match="no database"):
        live(app, Drained())
    assert published(collected_events) == []


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no database"), KeyError("DATABASE_URL"), OSError(111, "refused"), SystemExit(3)],
    ids=repr,
)
def test_an_error_at_the_beginning_of_a_lifespan_reaches_the_server(error: BaseException) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        live(app, Drained())
    assert caught.value is error


@pytest.mark.hazard("E7")
@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        NotImplementedError(),
        KeyError("path"),
        ValueError("Django can only handle ASGI/HTTP connections, not lifespan."),
    ],
    ids=repr,
)
def test_an_application_that_does_not_know_lifespans_is_started(error: Exception) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    transport = Drained()
    assert live(app, transport) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert transport.drained == 1


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
def test_the_events_of_a_phase_that_fails_are_dropped_and_said_to_be(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if phase == "shutdown":
            await send({"type": "lifespan.startup.complete"})
            await receive()
        enqueue_event(phase, "t")
        await send({"type": f"lifespan.{phase}.failed", "message": ""})

    live(app, Drained())
    assert published(collected_events) == []
    assert f"dropped because the {phase} failed: " in only_warning(caplog)


def test_what_waits_for_the_end_of_a_lifespan_warns_once_it_is_running(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        enqueue_event("startup", "t")
        await send({"type": "lifespan.startup.complete"})
        with pytest.warns(RuntimeWarning, match="waits until the server shuts down") as caught:
            enqueue_event("running", "t")
        assert [warning.filename for warning in caught] == [__file__]
        async with auto_publishing():
            enqueue_event("in a block", "t")
        assert published(collected_events) == ["startup", "in a block"]
        await receive()
        enqueue_event("shutdown", "t")
        await send({"type": "lifespan.shutdown.complete"})

    live(app, Drained())
    assert published(collected_events) == ["startup", "in a block", "running", "shutdown"]


# ------------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("base", [False, True], ids=["plain", "BaseHTTPMiddleware"])
@pytest.mark.parametrize("at", ["yield", "await", "before the first part"])
def test_a_stream_that_a_disconnect_cancels_publishes_nothing(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, base: bool, at: str
) -> None:
    """Before ASGI 2.4, Starlette cancels the body and returns as if nothing had happened."""
    gone = asyncio.Event()
    ends: list[str] = []

    async def stream(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            enqueue_event("in the transaction", "t")
            try:
                if at == "before the first part":
                    gone.set()
                    await asyncio.sleep(10)
                yield b"x"
                if at == "await":
                    gone.set()
                    await asyncio.sleep(10)
                yield b"x"
            except BaseException as error:
                ends.append(type(error).__name__)
                raise

        return StreamingResponse(body())

    app = Starlette(routes=[Route("/", stream)])
    if base:
        app.add_middleware(Base)

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body") and at == "yield":
            gone.set()
            await asyncio.sleep(10)

    scope = {**HTTP, "asgi": {"version": "3.0", "spec_version": "2.3"}, "query_string": b""}

    async def main() -> None:
        with contextlib.suppress(ClientDisconnect, asyncio.CancelledError):
            await OutboxMiddleware(app)(scope, receive, send)

    asyncio.run(asyncio.wait_for(main(), 8))
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == ["in the transaction"]
    assert only_warning(caplog)


def test_a_disconnect_that_the_application_does_not_look_for_changes_nothing(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"  # before its response
        enqueue_event(1, "t")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        assert (await receive())["type"] == "http.disconnect"  # after it

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    asyncio.run(OutboxMiddleware(app)(dict(HTTP), receive, send))
    assert published(collected_events) == [1]


def test_an_event_stream_warns_that_its_events_wait_for_its_end(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event("endpoint", "t")
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with auto_publishing():  # joins
            with pytest.warns(RuntimeWarning, match="independent=True"):
                enqueue_event("tick", "t")
        async with auto_publishing(independent=True):
            enqueue_event("at once", "t")
        assert published(collected_events) == ["at once"]
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(call(app))
    assert published(collected_events) == ["at once", "endpoint", "tick"]


# ------------------------------------------------------------------------------ statuses


@pytest.mark.parametrize(
    ("status", "is_success"),
    [
        (100, True),
        (103, True),
        (200, True),
        (206, True),
        (304, True),
        (399, True),
        (400, False),
        (499, False),
        (599, False),
        (600, False),
        (99, False),
        (0, False),
        (-1, False),
        ("200", False),
        (None, False),
    ],
)
def test_only_a_known_status_below_400_is_a_success(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    status: Any,
    is_success: bool,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    asyncio.run(call(app))
    assert published(collected_events) == ([1] if is_success else [])
    if not is_success:
        assert ("not known" if status is None else repr(status)) in only_warning(caplog)


def test_a_rule_that_raises_fails_the_request_and_not_the_response(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    def is_success(status: int) -> bool:
        raise ValueError("the rule")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event(1, "t")
        await respond(send)

    async def send(message: Any) -> None: ...

    asyncio.run(OutboxMiddleware(app, is_success=is_success)(dict(HTTP), nothing, send))
    assert published(collected_events) == []
    assert "is_success(200) raised" in caplog.text


def test_memory_does_not_grow_over_a_connection_that_is_kept_alive(
    collected_events: CollectedEvents,
) -> None:
    """A server may run each request in a copy of the context of the one before."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        requests.append(weakref.ref(EventCollector.current()))
        await respond(send)
        contexts.append(contextvars.copy_context())  # as a loop does for a socket's reader

    async def main() -> None:
        for _ in range(50):
            task = asyncio.create_task(call(app), context=contexts[-1])
            await task
            del contexts[:-1]

    requests: list[weakref.ref[EventCollector]] = []
    contexts = [contextvars.copy_context()]
    asyncio.run(main())
    gc.collect()
    assert [request for request in requests if request() is not None] == []


def test_concurrent_requests_do_not_see_each_others_events(
    collected_events: CollectedEvents,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        n = int(scope["path"])
        enqueue_event(n, "t")
        await asyncio.sleep(0.001)
        assert [event.payload for event in EventCollector.current().events] == [n]
        await respond(send, 500 if n % 2 else 200)

    async def main() -> None:
        await asyncio.gather(*(call(app, path=str(n)) for n in range(50)))

    asyncio.run(main())
    assert sorted(published(collected_events)) == list(range(0, 50, 2))
