"""Events that are enqueued while their unit of work ends, by threads, tasks and signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from benchmarks import late
from outbox import (
    CollectorClosed,
    Event,
    EventCollector,
    Publisher,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
    publish,
)
from outbox.backlog.chunk import Chunk
from outbox.consumers import Consumer, ReceivedEvent
from outbox.middleware.asgi import OutboxMiddleware as ASGIMiddleware
from outbox.middleware.wsgi import OutboxMiddleware as WSGIMiddleware
from outbox.testing import CollectedEvents
from outbox.unit_of_work.unit_of_work import Buffer, UnitOfWork
from tests.transports import SlowTransport

Slow = SlowTransport


class Instant(SlowTransport):
    """A transport that confirms at once."""

    def hand_in(self, chunk: Chunk) -> None:
        super().hand_in(chunk)
        self.confirm()
        self.chunks.clear()


@pytest.fixture
def waiting() -> Iterator[SlowTransport]:
    transport = SlowTransport()
    publisher = configure("memory://")
    publisher._own = transport
    yield transport
    transport.confirm()


def with_block(body: Callable[[], None]) -> None:
    with auto_publishing():
        body()


def decorated(body: Callable[[], None]) -> None:
    auto_publishing(body)()


def async_block(body: Callable[[], None]) -> None:
    async def main() -> None:
        async with auto_publishing():
            body()

    asyncio.run(main())


def wsgi(body: Callable[[], None], *, complete: bool) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        body()
        start_response("200 OK", [])
        return [b"x"] if complete else iter([b"x"])

    response = WSGIMiddleware(app)({}, lambda *_: None)  # type: ignore[arg-type]
    list(response)
    if not complete:
        response.close()  # type: ignore[attr-defined]


def asgi(body: Callable[[], None], kind: str = "http") -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body()
        if kind == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif kind == "lifespan":
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    async def receive() -> Any:
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None: ...

    with pytest.MonkeyPatch.context() as patched:
        if kind == "websocket":  # its events warn, which is tested elsewhere
            patched.setattr(EventCollector, "_warn_of_waiting", lambda *_: None)
        asyncio.run(ASGIMiddleware(app)({"type": kind}, receive, send))


UNITS = {
    "with": with_block,
    "decorator": decorated,
    "async with": async_block,
    "WSGI": lambda body: wsgi(body, complete=True),
    "ASGI": asgi,
    "WebSocket": lambda body: asgi(body, "websocket"),
    "lifespan": lambda body: asgi(body, "lifespan"),
}


@pytest.mark.hazard("E8")
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_an_event_is_refused_while_its_unit_is_publishing(
    waiting: Slow, unit: Callable[..., None]
) -> None:
    result: list[BaseException | None] = []

    def late() -> None:
        waiting.submitted.wait(5)
        try:
            enqueue_event("late", "t")
        except CollectorClosed as error:
            result.append(error)
        waiting.confirm()

    def body() -> None:
        enqueue_event("first", "t")
        thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
        thread.start()
        threads.append(thread)

    threads: list[threading.Thread] = []
    unit(body)
    threads[0].join()
    assert [event.payload for event in waiting.events] == ["first"]
    assert "after its unit of work had ended" in str(result[0])


@pytest.mark.hazard("E8")
def test_a_block_of_work_that_outlives_its_unit_publishes_its_own_events(
    waiting: Slow,
) -> None:
    def late() -> None:
        waiting.submitted.wait(5)
        threading.Timer(0.05, waiting.confirm).start()
        with auto_publishing() as block:
            enqueue_event("in a block", "t")
        assert not block.joined

    with auto_publishing():
        enqueue_event("first", "t")
        thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
        thread.start()
    thread.join()
    assert [event.payload for event in waiting.events] == ["first", "in a block"]


def test_what_a_wsgi_body_enqueues_until_its_close_is_published(waiting: Slow) -> None:
    """Its first events are published before the first byte, which does not end the unit."""

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            enqueue_event("step", "t")
            waiting.confirm()
            return iter([b"x"])

        def close(self) -> None:
            enqueue_event("close", "t")
            threading.Timer(0.05, waiting.confirm).start()

    def app(environ: Any, start_response: Any) -> Any:
        enqueue_event("app", "t")
        start_response("200 OK", [("Content-Length", "1")])
        threading.Timer(0.05, waiting.confirm).start()
        return Body()

    context = contextvars.copy_context()
    body: Any = context.run(WSGIMiddleware(app), {}, lambda *_: None)  # type: ignore[arg-type]
    assert [event.payload for event in waiting.events] == ["app"]
    assert next(body) == b"x"
    body.close()
    assert [event.payload for event in waiting.events] == ["app", "step", "close"]


def test_publishing_in_the_middle_of_a_unit_does_not_end_it(waiting: Slow) -> None:
    def late() -> None:
        waiting.submitted.wait(5)
        enqueue_event("late", "t")
        waiting.confirm()
        time.sleep(0.05)
        waiting.confirm()

    thread: threading.Thread | None = None
    with auto_publishing():
        enqueue_event("first", "t")
        thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
        thread.start()
        publish()
    thread.join()
    assert [event.payload for event in waiting.events] == ["first", "late"]


@pytest.mark.parametrize("error", [UsageError("refused"), ValueError("a bug")], ids=repr)
@pytest.mark.parametrize("unit", [with_block, async_block, UNITS["WSGI"], asgi])
def test_events_that_cannot_be_handed_over_are_named_at_error(
    waiting: Slow,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    unit: Callable[..., None],
    error: Exception,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    def body() -> None:
        events.append(enqueue_event("first", "t"))

    events: list[Event] = []
    monkeypatch.setattr(Publisher, "hand_in", refuse)
    with contextlib.suppress(type(error)):
        unit(body)
    [lost] = [record for record in caplog.records if "lost at the end" in record.getMessage()]
    assert lost.levelname == "ERROR"
    assert events[0].id in lost.getMessage()


@pytest.mark.hazard("E8")
def test_of_many_late_events_none_is_accepted_and_lost() -> None:
    outcome = late.run(requests=200)
    assert outcome.lost == 0
    assert outcome.accepted + outcome.refused == 200


@pytest.mark.hazard("E8")
@pytest.mark.parametrize("part", ["process", "on_success"])
def test_an_event_of_a_handler_that_has_returned_is_refused(
    collected_events: CollectedEvents, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    contexts: list[contextvars.Context] = []
    refused: list[CollectorClosed] = []

    class Invoicing(Consumer):
        queue = "invoicing"
        auto_publish = True

        def process(self, event: ReceivedEvent) -> None:
            self.work("process")

        def on_success(self, event: ReceivedEvent) -> None:
            self.work("on_success")

        def work(self, name: str) -> None:
            if name == part:
                enqueue_event(name, "t")
                contexts.append(contextvars.copy_context())  # that of a thread which goes on

    hand_in = Publisher.hand_in

    def hand_in_late(publisher: Publisher, chunk: Chunk, observer: Any = None) -> None:
        hand_in(publisher, chunk, observer)
        for context in contexts:
            try:
                context.run(enqueue_event, "late", "t")
            except CollectorClosed as error:
                refused.append(error)

    monkeypatch.setattr(Publisher, "hand_in", hand_in_late)
    assert collected_events.perform(Invoicing, 1).acked
    assert [event.payload for event in collected_events.published] == [part]
    assert len(refused) == 1


# ------------------------------------------------------------------------------ trio
# Not among the development dependencies: eventlet cannot be imported where trio is installed.


@pytest.mark.parametrize("cancelled", [False, True])
def test_on_trio_events_are_published_as_on_asyncio(waiting: Slow, cancelled: bool) -> None:
    trio = pytest.importorskip("trio")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event("request", "t")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def nothing(*_: Any) -> Any: ...

    async def main() -> None:
        with pytest.raises(UsageError, match="event loop"), auto_publishing():
            pytest.fail("entered")
        if not cancelled:
            threading.Timer(0.05, waiting.confirm).start()
        with trio.move_on_after(0.1) as scope:
            async with auto_publishing():
                enqueue_event("block", "t")
        assert scope.cancelled_caught == cancelled
        waiting.confirm()
        threading.Timer(0.05, waiting.confirm).start()
        await ASGIMiddleware(app)({"type": "http"}, nothing, nothing)

    trio.run(main)
    assert [event.payload for event in waiting.events] == ["block", "request"]


def test_on_trio_a_lifespan_ends_and_drains(waiting: Slow) -> None:
    trio = pytest.importorskip("trio")
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def receive() -> Any:
        return {"type": "lifespan"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def main() -> None:
        await ASGIMiddleware(app)({"type": "lifespan"}, receive, send)

    trio.run(main)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# ------------------------------------------------------------------------------ signal handlers


class Interrupted(Exception):
    """What a time limit raises."""


@contextlib.contextmanager
def alarms(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Call ``handler`` at random instants, a signal at a time."""

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        finally:
            if armed:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.001))

    armed = [True]
    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    try:
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_buffers(frame: FrameType | None) -> bool:
    """Return whether ``frame`` is in the unit of work and in nothing that it calls elsewhere."""
    if frame is None or frame.f_code.co_name == "__del__":  # nothing can be raised from there
        return False
    return bool(frame.f_globals.get("__name__", "").startswith("outbox.unit_of_work."))


def some_event(n: int) -> Event:
    return Event(str(n), "t", "", b"12345")


def total_of(*buffers: Buffer) -> tuple[int, int]:
    return (
        sum(len(buffer.events) for buffer in buffers),
        sum(len(event.body) for buffer in buffers for event in buffer.events),
    )


@pytest.mark.parametrize("raising", [False, True])
def test_a_signal_handler_at_any_instant_leaves_the_buffers_and_totals_right(
    raising: bool,
) -> None:
    unit = UnitOfWork(None, None)
    outer = Buffer(unit)
    inner = Buffer(unit, outer)
    gone: list[Event] = []
    made = iter(range(10_000_000))
    limits = 1_000_000, 1_000_000_000
    signals = 0

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal signals
        if not in_buffers(frame):
            return
        signals += 1
        if raising:
            raise Interrupted
        for buffer in (outer, inner):
            if not buffer.closed:
                buffer.append(some_event(next(made)), *limits)
        taken: list[Event] = []
        random.choice([outer, inner]).take(taken)
        if taken and random.random() < 0.5:
            outer.put_back(taken)
        else:
            gone.extend(taken)

    end = time.monotonic() + 1.5
    with alarms(handler):
        while time.monotonic() < end:
            taken: list[Event] = []
            with contextlib.suppress(Interrupted):
                for _ in range(20):
                    outer.append(some_event(next(made)), *limits)
                    inner.append(some_event(next(made)), *limits)
                outer.take(taken)
            if raising:  # what was taken may be back, without being here
                while taken and taken[0] not in outer.events:
                    with contextlib.suppress(Interrupted):
                        outer.put_back(taken)
            else:
                outer.put_back(taken)
            while inner.events or not inner.closed:
                with contextlib.suppress(Interrupted):
                    inner.merge()
            closed = inner
            while inner is closed:
                with contextlib.suppress(Interrupted):
                    inner = Buffer(unit, outer)
            while len(outer.events) > 200:
                with contextlib.suppress(Interrupted):
                    outer.take(gone)
    assert signals > 5
    assert (unit.total, unit.total_size) == total_of(outer, inner)
    assert (outer.count, outer.size) == total_of(outer)
    names = [event.id for event in (*gone, *outer.events, *inner.events)]
    assert len(set(names)) == len(names)
    if not raising:
        assert len(names) == next(made)
    outer.take(gone)
    inner.take(gone)


@pytest.mark.parametrize("kind", ["with", "joined", "savepoint", "WSGI"])
def test_an_exception_of_a_signal_handler_neither_loses_nor_doubles_the_events_of_a_block(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was enqueued and not dropped with its block is published, once."""
    transport = Instant()
    configure("memory://")._own = transport
    signals = 0

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal signals
        if ended and in_buffers(frame):
            signals += 1
            raise Interrupted

    ended = False
    events: list[Event] = []
    end = time.monotonic() + 1.5

    def app(environ: Any, start_response: Any) -> Any:
        nonlocal ended
        start_response("200 OK", [])
        events.append(enqueue_event(1, "t", id=f"{len(events)}"))
        ended = True
        return [b"x"]

    def once() -> None:
        nonlocal ended
        if kind == "WSGI":
            WSGIMiddleware(app)({}, lambda *_: None)  # type: ignore[arg-type]
        elif kind == "joined":
            with auto_publishing():
                with contextlib.suppress(Interrupted), auto_publishing():
                    events.append(enqueue_event(1, "t", id=f"{len(events)}"))
                    ended = True
                ended = False
        else:
            with auto_publishing() as block:
                if kind == "savepoint":
                    with block.savepoint():
                        events.append(enqueue_event(1, "t", id=f"{len(events)}"))
                else:
                    events.append(enqueue_event(1, "t", id=f"{len(events)}"))
                ended = True

    with alarms(handler):
        # On a busy machine few signals come where they interrupt something.
        while time.monotonic() < (end if signals > 5 else end + 20):
            ended = False
            with contextlib.suppress(Interrupted):
                contextvars.copy_context().run(once)
            ended = False
    assert signals > 5
    found = [event.id for event in transport.events]
    assert len(set(found)) == len(found), "doubled"
    missing = {event.id for event in events} - set(found)
    assert not [name for name in missing if f"'{name}'" not in caplog.text], "lost in silence"
    # A block is published unless the signal comes at the very moment of entering its __exit__().
    assert kind == "WSGI" or len(missing) < signals / 2


def test_lost_events_are_logged_although_a_signal_handler_raises_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = Buffer(UnitOfWork(None, None))
    buffer.append(Event("1", "t", "", b"1"), 10, 1000)
    interruptions = 2

    def interrupt(record: logging.LogRecord) -> bool:
        nonlocal interruptions
        interruptions -= 1
        if interruptions >= 0:
            raise Interrupted
        return True

    logger = logging.getLogger("outbox.collector")
    logger.addFilter(interrupt)
    try:
        del buffer
    finally:
        logger.removeFilter(interrupt)
    assert "1 event(s) lost: neither published nor dropped" in caplog.text
    assert "'1'" in caplog.text


@pytest.mark.parametrize("method", ["close", "take"])
def test_a_block_interrupted_again_while_it_drops_its_events_has_logged_them(
    method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(buffer: Buffer, *_: object) -> None:
        buffer.events = []
        raise Interrupted

    def refuse(*_: object) -> None:
        raise UsageError("closed")

    configure("memory://")
    monkeypatch.setattr(EventCollector, "_hand_over", refuse)
    with pytest.raises(Interrupted), auto_publishing():
        event = enqueue_event(1, "t")
        monkeypatch.setattr(Buffer, method, interrupted)
    assert f"1 event(s) lost at the end of a block: {event.id!r}" in caplog.text


def test_a_signal_handler_that_enqueues_joins_the_block_it_interrupts() -> None:
    transport = Instant()
    configure("memory://")._own = transport
    accepted: list[str] = []
    refused = 0

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal refused
        if not in_buffers(frame):
            return
        try:
            name = f"signal {len(accepted)}"
            enqueue_event(1, "t", id=name)
            accepted.append(name)
        except CollectorClosed:
            refused += 1

    n = 0
    end = time.monotonic() + 1.5
    with alarms(handler):
        while time.monotonic() < end:
            with auto_publishing():
                for _ in range(5):
                    n += 1
                    enqueue_event(1, "t", id=f"main {n}")
    publish()  # what a handler enqueued between two blocks
    found = {event.id for event in transport.events}
    assert len(accepted) > 5
    assert found == {*accepted, *(f"main {number + 1}" for number in range(n))}


class TimeLimit(BaseException):
    """What a signal handler raises."""


@contextlib.contextmanager
def interrupted_on_entering(function: Any) -> Iterator[None]:
    """Raise where a signal handler may raise before the first line of ``function``."""

    def trace(frame: FrameType, what: str, _argument: Any) -> None:
        if what == "call" and frame.f_code is function.__code__:
            sys.settrace(before)
            raise TimeLimit

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(TimeLimit):
            yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("function", ["__exit__", "_leave", "_end"])
def test_what_follows_a_block_that_never_ended_is_published(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
    configure("memory://")

    def run() -> None:
        block = auto_publishing()
        block.__enter__()
        enqueue_event(0, "interrupted", id="interrupted")
        with interrupted_on_entering(getattr(type(block), function)):
            block.__exit__(None, None, None)

    run()
    gc.collect()  # Python 3.13 keeps the traced frame in a cycle
    with auto_publishing() as block:
        assert not block.joined
        event = enqueue_event(0, "x")
    assert block.report is not None
    assert block.report.published == (event,)
    event = enqueue_event(0, "x")
    assert publish().published == (event,)
    if function == "__exit__":
        assert "'interrupted'" in caplog.text


def test_a_block_in_a_loop_does_not_join_the_one_before_that_never_ended() -> None:
    configure("memory://")
    reports = []
    for number in range(3):
        entered = auto_publishing()
        entered.__enter__()
        block = entered  # until here the name has held the one before, as ``as block`` does
        enqueue_event(0, "x", id=str(number))
        with auto_publishing() as inner:
            assert inner.joined
        if number == 0:
            with interrupted_on_entering(type(block).__exit__):
                block.__exit__(None, None, None)
            gc.collect()
        else:
            block.__exit__(None, None, None)
            assert block.report is not None
            reports.append([event.id for event in block.report.published])
    assert reports == [["1"], ["2"]]


def test_a_block_that_joined_one_that_is_gone_is_the_outermost() -> None:
    configure("memory://")
    gone = auto_publishing()
    gone.__enter__()
    with interrupted_on_entering(type(gone).__exit__):
        gone.__exit__(None, None, None)
    gc.collect()
    with contextlib.suppress(ValueError), auto_publishing() as block:
        assert block.joined  # as long as anything refers to the one before
        del gone
        enqueue_event(0, "x", id="outer")
        with auto_publishing() as inner:
            enqueue_event(0, "x", id="inner")
        assert inner.joined
        assert inner.report is None
        raise ValueError
    with auto_publishing() as block:
        event = enqueue_event(0, "x")
    assert block.report is not None
    assert block.report.published == (event,)
