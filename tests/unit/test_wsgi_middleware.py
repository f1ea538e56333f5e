"""The WSGI middleware with plain callables and with Flask."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import itertools
import logging
import re
import wsgiref.handlers
import wsgiref.util
import wsgiref.validate
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO, TextIOWrapper
from typing import Any

import flask
import pytest
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import Client

from outbox import (
    CollectorClosed,
    EventCollector,
    Publisher,
    auto_publishing,
    enqueue_event,
)
from outbox.middleware.wsgi import OutboxMiddleware
from outbox.testing import CollectedEvents
from tests.bodies import BODIES

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def published(collected: CollectedEvents) -> list[Any]:
    return [event.payload for event in collected.published]


class Server:
    """Calls an application step by step, as a server does."""

    def __init__(self, app: App, **options: Any) -> None:
        self.environ: dict[str, Any] = {}
        wsgiref.util.setup_testing_defaults(self.environ)
        self.environ["wsgi.file_wrapper"] = wsgiref.util.FileWrapper
        self.statuses: list[str] = []
        self.exc_infos: list[Any] = []
        self.written: list[bytes] = []
        self._app = OutboxMiddleware(app, **options)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self.statuses.append(status)
        self.exc_infos.append(exc_info)
        return self.written.append

    def call(self) -> Any:
        return self._app(self.environ, self.start_response)

    def serve(self) -> bytes:
        body = self.call()
        try:
            return b"".join(body)
        finally:
            if hasattr(body, "close"):
                body.close()


class Body:
    """An iterable whose close() is counted."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks = iter(chunks)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks)
        made: bytes = chunk() if callable(chunk) else chunk
        return made

    def close(self) -> None:
        self.closed += 1


def enqueuing(payload: Any, chunk: bytes = b"x") -> Callable[[], bytes]:
    def make() -> bytes:
        enqueue_event(payload, "t")
        return chunk

    return make


def raising(error: type[BaseException] = ValueError) -> bytes:
    raise error("in the middle")


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one line that was logged, which reports no loss."""
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    return record.getMessage()


def app_of(
    body: Any, status: str = "200 OK", headers: Iterable[tuple[str, str]] = (), enqueue: bool = True
) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if enqueue:
            enqueue_event("app", "t")
        start_response(status, list(headers))
        return body  # type: ignore[no-any-return]

    return app


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "302 Found", "399 Odd"])
def test_a_successful_request_is_published(collected_events: CollectedEvents, status: str) -> None:
    assert Server(app_of([b"ok"], status)).serve() == b"ok"
    assert published(collected_events) == ["app"]


@pytest.mark.hazard("D2")
@pytest.mark.parametrize("status", ["400 Bad", "404 Not Found", "500 Oops"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_unsuccessful_status_drops_the_events_and_names_them(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    status: str,
    streamed: bool,
) -> None:
    Server(app_of(Body([b"ok"]) if streamed else [b"ok"], status)).serve()
    assert published(collected_events) == []
    [record] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert collected_events.cleared[0].id in record.getMessage()
    assert status[:3] in record.getMessage()


@pytest.mark.hazard("D3")
def test_what_counts_as_success_is_configurable(collected_events: CollectedEvents) -> None:
    Server(app_of([b""], "404 Not Found"), is_success=lambda status: status == 404).serve()
    Server(app_of([b""], "200 OK"), is_success=lambda status: status == 404).serve()
    assert len(collected_events.published) == len(collected_events.cleared) == 1


@pytest.mark.hazard("D8", "D11")
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_exception_drops_the_events_and_the_next_request_has_only_its_own(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    def fails(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enqueue_event("lost", "t")
        raise error

    with pytest.raises(error):
        Server(fails).serve()
    warning = only_warning(caplog)
    assert error.__name__ in warning
    assert collected_events.cleared[0].id in warning
    Server(app_of([b"ok"])).serve()
    assert published(collected_events) == ["app"]


def test_a_body_abandoned_by_its_server_leaves_nothing_to_the_next_request(
    collected_events: CollectedEvents,
) -> None:
    abandoned = Server(app_of(Body([enqueuing("abandoned")] * 2))).call()
    next(abandoned)
    enqueue_event("between", "t")
    assert [event.payload for event in EventCollector.current().clear_events()] == ["between"]
    Server(app_of(Body([enqueuing("next")]))).serve()
    assert published(collected_events) == ["app", "next"]
    abandoned.close()


@pytest.mark.hazard("D5")
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("200 OK", [("Content-Length", "1")]),
        ("204 No Content", []),
        ("304 Not Modified", []),
    ],
)
def test_a_complete_response_is_published_before_its_first_byte(
    collected_events: CollectedEvents, status: str, headers: list[tuple[str, str]]
) -> None:
    body = Server(app_of(Body([enqueuing("body")]), status, headers)).call()
    assert published(collected_events) == ["app"]
    next(iter(body))
    assert published(collected_events) == ["app"]
    body.close()
    assert published(collected_events) == ["app", "body"]


@pytest.mark.hazard("D6")
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_or_tuple_is_published_at_once_and_returned_untouched(
    collected_events: CollectedEvents, kind: Any
) -> None:
    body = kind([b"a", b"b"])
    assert Server(app_of(body)).call() is body
    assert published(collected_events) == ["app"]


@pytest.mark.hazard("D6")
def test_a_file_is_returned_as_the_servers_own_wrapper(collected_events: CollectedEvents) -> None:
    body = wsgiref.util.FileWrapper(BytesIO(b"file"))
    assert Server(app_of(body)).call() is body
    assert published(collected_events) == ["app"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_file_is_returned_unchanged_if_the_servers_wrapper_is_a_function(
    collected_events: CollectedEvents, depth: int
) -> None:
    file = BytesIO(b"file")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        enqueue_event("app", "t")
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](file, 8192)

    server = Server(OutboxMiddleware(app) if depth == 2 else app)
    server.environ["wsgi.file_wrapper"] = lambda made, _size: made  # as uWSGI's
    assert server.call() is file
    assert published(collected_events) == ["app"]
    assert server.call() is file  # tried again with the same environ


@pytest.mark.hazard("D6")
def test_a_wrapped_body_keeps_its_length(collected_events: CollectedEvents) -> None:
    class Sized(Body):
        def __len__(self) -> int:
            return 1

    assert len(Server(app_of(Sized([b"x"]))).call()) == 1
    assert not hasattr(Server(app_of(Body([b"x"]))).call(), "__len__")


@pytest.mark.hazard("D4")
def test_a_stream_is_published_when_it_is_exhausted(collected_events: CollectedEvents) -> None:
    body = Server(app_of(Body([enqueuing(1), enqueuing(2)]))).call()
    assert [next(body), next(body)] == [b"x", b"x"]
    assert published(collected_events) == []
    with pytest.raises(StopIteration):
        next(body)
    assert published(collected_events) == ["app", 1, 2]


@pytest.mark.hazard("D4")
def test_a_client_that_disconnects_does_not_undo_the_work(
    collected_events: CollectedEvents,
) -> None:
    inner = Body([enqueuing(1), enqueuing(2), enqueuing(3)])
    body = Server(app_of(inner)).call()
    next(body)
    next(body)
    body.close()
    assert published(collected_events) == ["app", 1, 2]
    assert inner.closed == 1


class Session:
    """A transaction around the steps of a body."""

    def __init__(self) -> None:
        self.end = ""

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.end = "rolled back"
            raise
        self.end = "committed"


class Closing:
    """An iterator of a framework's, which passes close() on."""

    def __init__(self, body: Any) -> None:
        self._next = functools.partial(next, iter(body))
        self._callbacks = [body.close]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk: bytes = self._next()
        return chunk

    def close(self) -> None:
        for callback in self._callbacks:
            callback()


class Iterable_:
    """A body whose ``__iter__`` is a generator function."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        yield from self.body


@pytest.mark.hazard("D4")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda body: body,
        Closing,
        Iterable_,
        lambda body: Closing(Closing(body)),
        lambda body: map(bytes, body),
        lambda body: (chunk for chunk in body),
        lambda body: itertools.chain([b"first"], body),
    ],
    ids=["generator", "object", "iterable", "two objects", "map", "generator of it", "chain"],
)
def test_a_disconnect_that_ends_a_generator_in_its_transaction_publishes_nothing(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture, wrap: Any
) -> None:
    session = Session()

    def chunks() -> Iterator[bytes]:
        with session.begin():
            for n in range(3):
                enqueue_event(n, "t")
                yield b"x"

    body = Server(app_of(wrap(chunks()), enqueue=False)).call()
    next(body)
    next(body)
    body.close()
    del body
    gc.collect()
    assert session.end == "rolled back"
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared][:1] == [0]
    assert "the client has disconnected" in only_warning(caplog)


@pytest.mark.hazard("D4")
def test_a_generator_that_has_ended_or_not_begun_is_not_interrupted_by_close(
    collected_events: CollectedEvents,
) -> None:
    session = Session()

    def chunks() -> Iterator[bytes]:
        with session.begin():
            enqueue_event("body", "t")
            yield b"x"

    Server(app_of(chunks())).call().close()
    assert session.end == ""
    assert published(collected_events) == ["app"]
    Server(app_of(chunks(), enqueue=False)).serve()
    assert session.end == "committed"
    assert published(collected_events) == ["app", "body"]


def test_what_is_published_before_the_first_byte_stays_published_when_the_body_is_interrupted(
    collected_events: CollectedEvents,
) -> None:
    def chunks() -> Iterator[bytes]:
        enqueue_event("body", "t")
        yield b"x"
        yield b"y"

    body = Server(app_of(chunks(), headers=[("Content-Length", "2")])).call()
    next(body)
    body.close()
    assert published(collected_events) == ["app"]
    assert [event.payload for event in collected_events.cleared] == ["body"]


@pytest.mark.parametrize(
    ("status", "is_success"),
    [
        ("100 Continue", True),
        ("101 Switching Protocols", True),
        ("103 Early Hints", True),
        ("200", True),
        ("304 Not Modified", True),
        ("400 Bad", False),
        ("499 Client Closed Request", False),
        ("599 x", False),
        ("600 x", False),
        ("999 x", False),
        ("099 x", False),
        ("OK", False),
        ("2xx OK", False),
        ("\u0662\u0660\u0660 digits", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("kind", [list, Body])
def test_only_a_known_status_below_400_is_a_success(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    status: str,
    is_success: bool,
    kind: Any,
) -> None:
    assert Server(app_of(kind([b"ok"]), status)).serve() == b"ok"
    assert published(collected_events) == (["app"] if is_success else [])
    if not is_success:
        assert "the response's status is" in only_warning(caplog)


@pytest.mark.hazard("D4")
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_middle_of_a_stream_drops_all(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    inner = Body([enqueuing(1), enqueuing(2), functools.partial(raising, error)])
    with pytest.raises(error, match="in the middle"):
        Server(app_of(inner)).serve()
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == ["app", 1, 2]
    assert inner.closed == 1
    assert error.__name__ in only_warning(caplog)


def test_events_that_a_failed_stream_enqueues_while_closing_are_dropped(
    collected_events: CollectedEvents,
) -> None:
    class Closing(Body):
        def close(self) -> None:
            enqueue_event("closing", "t")

    with pytest.raises(ValueError):
        Server(app_of(Closing([enqueuing(1), raising]))).serve()
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == ["app", 1, "closing"]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_exception_while_closing_drops_unpublished_events(
    collected_events: CollectedEvents,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    class Closing(Body):
        def close(self) -> None:
            raise error

    with pytest.raises(error):
        Server(app_of(Closing([enqueuing(1)]))).call().close()
    assert published(collected_events) == []
    assert error.__name__ in only_warning(caplog)


@pytest.mark.hazard("D5")
def test_events_enqueued_while_closing_are_published_unless_closing_fails(
    collected_events: CollectedEvents,
) -> None:
    class Closing(Body):
        def close(self) -> None:
            super().close()
            enqueue_event("closing", "t")
            if fail:
                raise ValueError

    fail = False
    Server(app_of(Closing([b"x"]))).serve()
    assert published(collected_events) == ["app", "closing"]
    fail = True
    body = Server(app_of(Closing([b"x"]), enqueue=False)).call()
    with pytest.raises(ValueError):
        body.close()
    assert published(collected_events) == ["app", "closing"]


@pytest.mark.hazard("D7")
def test_closing_twice_closes_the_application_once(collected_events: CollectedEvents) -> None:
    inner = Body([b"x"])
    body = Server(app_of(inner)).call()
    body.close()
    body.close()
    assert inner.closed == 1


@pytest.mark.hazard("D1")
def test_a_generator_that_sets_its_status_late_is_judged_by_it(
    collected_events: CollectedEvents,
) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        enqueue_event(environ["status"], "t")
        start_response(environ["status"], [])
        yield b"x"

    for status in ("200 OK", "500 Oops"):
        server = Server(app)
        server.environ["status"] = status
        server.serve()
    assert published(collected_events) == ["200 OK"]


def test_a_body_that_is_closed_before_its_status_is_known_drops_the_events(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        def chunks() -> Iterator[bytes]:
            start_response("200 OK", [])
            yield b"x"

        enqueue_event(1, "t")
        return chunks()

    Server(app).call().close()
    assert published(collected_events) == []
    assert "not known" in only_warning(caplog)


@pytest.mark.hazard("D1")
def test_the_last_status_counts(collected_events: CollectedEvents) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        enqueue_event(1, "t")
        start_response("200 OK", [])
        start_response("500 Oops", [], exc_info)
        return [b"oops"]

    exc_info = (ValueError, ValueError(), None)
    server = Server(app)
    server.serve()
    assert server.statuses == ["200 OK", "500 Oops"]
    assert server.exc_infos == [None, exc_info]
    assert published(collected_events) == []


@pytest.mark.hazard("D6")
def test_write_still_works(collected_events: CollectedEvents) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"written")
        enqueue_event(1, "t")
        return []

    server = Server(app)
    assert server.serve() == b""
    assert server.written == [b"written"]
    assert published(collected_events) == [1]


@pytest.mark.hazard("D10")
def test_a_middleware_wrapped_twice_publishes_once(collected_events: CollectedEvents) -> None:
    Server(OutboxMiddleware(app_of(Body([enqueuing(1)])))).serve()
    assert published(collected_events) == ["app", 1]


@pytest.mark.parametrize("end", ["500 Oops", "raise"])
def test_of_two_wrapped_middlewares_the_outer_one_decides(
    collected_events: CollectedEvents, end: str
) -> None:
    inner = OutboxMiddleware(app_of([b"ok"]))

    def between(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        inner(environ, lambda *_: lambda _: None)
        assert published(collected_events) == []
        if end == "raise":
            raise ValueError
        start_response(end, [])
        return [b"oops"]

    with contextlib.suppress(ValueError):
        Server(between).serve()
    assert published(collected_events) == []
    assert [event.payload for event in collected_events.cleared] == ["app"]


@pytest.mark.hazard("D10")
def test_a_request_within_a_request_is_a_separate_unit(
    collected_events: CollectedEvents,
) -> None:
    def outer(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        enqueue_event("outer", "t")
        Server(app_of([b"inner"])).serve()
        assert published(collected_events) == ["app"]
        start_response("500 Oops", [])
        return [b""]

    Server(outer).serve()
    assert published(collected_events) == ["app"]


@pytest.mark.hazard("D10")
def test_a_block_in_a_view_joins_the_request(collected_events: CollectedEvents) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        with auto_publishing() as block:
            enqueue_event(1, "t")
        assert block.joined
        assert published(collected_events) == []
        start_response("200 OK", [])
        return [b""]

    Server(app).serve()
    assert published(collected_events) == [1]


@pytest.mark.hazard("D9")
def test_an_application_called_in_one_context_and_closed_in_another_still_publishes(
    collected_events: CollectedEvents,
) -> None:
    body = contextvars.copy_context().run(Server(app_of(Body([enqueuing(1)]))).call)
    assert contextvars.copy_context().run(list, body)
    contextvars.copy_context().run(body.close)
    assert published(collected_events) == ["app", 1]
    assert len(EventCollector.current()) == 0


@pytest.mark.hazard("E8")
def test_an_event_after_the_end_of_the_request_is_refused(
    collected_events: CollectedEvents,
) -> None:
    kept: list[EventCollector] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        kept.append(EventCollector.current())
        start_response("200 OK", [])
        return [b""]

    Server(app).serve()
    with pytest.raises(CollectorClosed):
        kept[0].enqueue_event(1, "t")


@pytest.mark.hazard("D5")
@pytest.mark.parametrize("streamed", [False, True])
def test_a_publisher_that_fails_never_fails_the_response(
    caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    publisher = Publisher("memory://")
    inner = Body([b"ok"])

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enqueue_event(1, "t")
        publisher.close()
        start_response("200 OK", [])
        return inner if streamed else [b"ok"]

    assert Server(app, publisher=publisher).serve() == b"ok"
    *failures, lost = caplog.records
    assert all("could not publish" in one.getMessage() for one in failures)
    assert "lost" in lost.getMessage()
    assert lost.levelno == logging.ERROR
    assert inner.closed == streamed


@pytest.mark.hazard("D7")
def test_the_middleware_passes_both_validators(collected_events: CollectedEvents) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enqueue_event(1, "t")
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return Body([b"o", b"k"])

    for wrapped in (app, LintMiddleware(app)):
        response = Client(LintMiddleware(OutboxMiddleware(wrapped))).get("/")
        assert response.data == b"ok"
    validated = wsgiref.validate.validator(OutboxMiddleware(wsgiref.validate.validator(app)))
    server = Server(app)
    del server.environ["wsgi.file_wrapper"]
    server.environ["QUERY_STRING"] = ""
    body = validated(server.environ, server.start_response)
    assert b"".join(body) == b"ok"
    body.close()  # type: ignore[attr-defined]
    assert published(collected_events) == [1, 1, 1]


def test_an_exception_after_the_status_drops_the_events(collected_events: CollectedEvents) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enqueue_event(1, "t")
        start_response("200 OK", [("Content-Length", "2")])
        raise ValueError

    with pytest.raises(ValueError):
        Server(app).serve()
    assert published(collected_events) == []


def test_the_events_of_a_body_that_is_never_iterated_are_published_at_its_close(
    collected_events: CollectedEvents,
) -> None:
    inner = Body([enqueuing("never")])
    Server(app_of(inner)).call().close()
    assert published(collected_events) == ["app"]
    assert inner.closed == 1


@pytest.mark.hazard("D9")
def test_the_requests_collector_is_current_in_every_step_and_in_close(
    collected_events: CollectedEvents,
) -> None:
    seen: list[EventCollector] = []

    def look() -> bytes:
        seen.append(EventCollector.current())
        return b"x"

    class Closing(Body):
        def close(self) -> None:
            look()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        look()
        start_response("200 OK", [])
        return Closing([look, look])

    Server(app).serve()
    assert len(seen) == 4
    assert len(set(map(id, seen))) == 1
    assert EventCollector.current() is not seen[0]


@pytest.mark.parametrize("moving", [False, True])
def test_a_block_around_a_yield_is_open_in_the_next_step(
    collected_events: CollectedEvents, moving: bool
) -> None:
    def chunks() -> Iterator[bytes]:
        try:
            with auto_publishing():
                enqueue_event("dropped", "t")
                yield b"1"
                enqueue_event("dropped", "t")
                raise ValueError
        except ValueError:
            enqueue_event("after", "t")
        with auto_publishing(independent=True) as block:
            for n in range(2):
                enqueue_event(n, "t")
                yield b"2"
        assert block.report is not None
        assert len(block.report.published) == 2
        enqueue_event("last", "t")
        yield b"3"

    body = Server(app_of(chunks())).call()
    for _ in range(5):
        if moving:  # a server that runs each step in a separate context
            contextvars.copy_context().run(next, body, None)
        else:
            next(body, None)
    body.close()
    assert published(collected_events) == [0, 1, "app", "after", "last"]
    assert [event.payload for event in collected_events.cleared] == ["dropped", "dropped"]


def test_a_block_that_never_ends_does_not_hold_back_the_request(
    collected_events: CollectedEvents,
) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        enqueue_event("request", "t")
        auto_publishing().__enter__()
        start_response("200 OK", [])
        return [b""]

    Server(app).serve()
    assert published(collected_events) == ["request"]


def test_a_retried_request_with_the_same_environ_is_collected_again(
    collected_events: CollectedEvents,
) -> None:
    def fails_once(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["attempt"] = environ.get("attempt", 0) + 1
        enqueue_event(environ["attempt"], "t")
        if environ["attempt"] == 1:
            raise ValueError
        start_response("200 OK", [])
        return [b""]

    server = Server(fails_once)
    with pytest.raises(ValueError):
        server.serve()
    server.serve()
    assert published(collected_events) == [2]


def test_on_a_running_loop_it_publishes_without_waiting(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve() -> bytes:
        return Server(app_of(Body([enqueuing(1)]))).serve()

    assert asyncio.run(serve()) == b"x"
    assert published(collected_events) == ["app", 1]
    assert caplog.messages == []


@pytest.mark.hazard("D7")
@pytest.mark.parametrize("headers", [[], [("Content-Length", "1")]])
@pytest.mark.parametrize("kind", [Body, type("Untouched", (list, Body), {})])
def test_the_body_is_closed_once_when_the_publishing_is_interrupted(
    collected_events: CollectedEvents,
    monkeypatch: pytest.MonkeyPatch,
    headers: list[tuple[str, str]],
    kind: Any,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise SystemExit  # what gunicorn does to a worker that takes too long

    monkeypatch.setattr(Publisher, "wait_for", interrupted)
    inner = kind([b"x"])
    inner.closed = 0
    with pytest.raises(SystemExit):
        Server(app_of(inner, headers=headers)).serve()
    assert inner.closed == 1
    assert published(collected_events) == ["app"]


@pytest.fixture
def flask_client() -> Client:
    app = flask.Flask(__name__)

    @app.get("/ok")
    def ok() -> str:
        enqueue_event("ok", "t")
        return "ok"

    @app.get("/boom")
    def boom() -> str:
        enqueue_event("boom", "t")
        raise ValueError

    @app.get("/stream")
    def stream() -> flask.Response:
        def chunks() -> Iterator[str]:
            for n in range(3):
                enqueue_event(n, "t")
                yield str(n)

        response = flask.Response(flask.stream_with_context(chunks()))
        response.call_on_close(lambda: enqueue_event("closed", "t"))
        return response

    app.wsgi_app = OutboxMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    return Client(app)


@pytest.mark.hazard("D2")
def test_flask_turns_an_exception_into_a_500_and_nothing_is_published(
    flask_client: Client, collected_events: CollectedEvents
) -> None:
    assert flask_client.get("/boom").status_code == 500
    assert published(collected_events) == []
    assert flask_client.get("/ok").data == b"ok"
    assert published(collected_events) == ["ok"]


def test_events_of_a_flask_stream_are_collected_by_its_request(
    flask_client: Client, collected_events: CollectedEvents
) -> None:
    response = flask_client.get("/stream", buffered=True)
    assert response.data == b"012"
    response.close()
    assert published(collected_events) == [0, 1, 2, "closed"]


class Wire(wsgiref.handlers.SimpleHandler):
    """The standard library's server: what it derives from a body shows in its bytes."""

    def sendfile(self) -> bool:
        self.write(b"sent as a file: " + self.result.filelike.read())  # type: ignore[attr-defined]
        return True

    def log_exception(self, exc_info: Any) -> None: ...

    @classmethod
    def bytes_of(cls, app: App, method: str) -> bytes:
        environ: dict[str, Any] = {}
        wsgiref.util.setup_testing_defaults(environ)
        environ["REQUEST_METHOD"] = method
        sent = BytesIO()
        handler = cls(BytesIO(), sent, TextIOWrapper(BytesIO()), environ)
        handler.http_version = "1.1"
        handler.origin_server = True
        handler.server_software = ""
        handler.run(app)
        return re.sub(rb"Date: .*\r\n", b"", sent.getvalue())


@pytest.mark.hazard("D6")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("kind", sorted(BODIES))
def test_a_response_is_the_same_with_and_without_the_middleware(
    collected_events: CollectedEvents, kind: str, method: str
) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enqueue_event("app", "t")
        return BODIES[kind](environ, start_response)

    wrapped = Wire.bytes_of(OutboxMiddleware(app), method)
    assert published(collected_events) == ([] if kind == "raises" else ["app"])
    assert wrapped == Wire.bytes_of(BODIES[kind], method)
    assert wrapped.startswith(b"HTTP/1.1")
