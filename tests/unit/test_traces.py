"""The spans of events and messages, and which of them belong together."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import importlib.metadata
import logging
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from outbox import (
    Event,
    EventCollector,
    InvalidEvent,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.consumers import Consumer, Retry, consumer
from outbox.consumers.outcome import REJECT, REQUEUE
from outbox.telemetry import OutboxInstrumentor
from outbox.telemetry.tracing import seam
from tests.places import Place, SQLitePlace, events_for, made, replay, working
from tests.tracing import Traces, attributes_of, id_of, links_of, parent_of
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def uninstrumented() -> Iterator[None]:
    """Nothing is instrumented after the test."""
    yield
    OutboxInstrumentor().uninstrument()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place with empty queues."""
    place = SQLitePlace(str(tmp_path / "queue.db"), "shop")
    for queue in ("orders", "bills", "mails"):
        made(place, queue)
    return place


@pytest.fixture
def traces(place: Place) -> Traces:
    traces = Traces()
    OutboxInstrumentor().instrument(tracer_provider=traces.provider)
    return traces


class Handled(list[Any]):
    """Messages that a handler has got."""


def orders(handled: Handled, **options: Any) -> Consumer:
    @consumer("orders", **options)
    def handle(event: Any) -> Any:
        handled.append(event)
        match event.payload:
            case "fail":
                raise LookupError("no such order")
            case "retry" if event.attempt == 1:
                raise Retry(delay=0)
            case "reject":
                return REJECT
            case "requeue" if len(handled) == 1:
                return REQUEUE
        return None

    return handle


# ------------------------------------------------------------------------------ enqueueing


def test_an_event_carries_the_context_in_which_it_was_enqueued(traces: Traces) -> None:
    configure("memory://")
    with auto_publishing():
        with traces.tracer.start_as_current_span("request") as span:
            event = enqueue_event(1, "a", headers={"n": 1})
        outside = enqueue_event(1, "a")
    carried = span.get_span_context()
    flags = int(carried.trace_flags)
    assert event.headers == {
        "n": 1,
        "traceparent": f"00-{carried.trace_id:032x}-{carried.span_id:016x}-{flags:02x}",
    }
    assert outside.headers == {}
    assert [each.name for each in traces.spans] == ["request", "send outbox"]


def test_a_context_that_the_caller_gives_is_not_changed(traces: Traces) -> None:
    configure("memory://", headers=lambda: {"traceparent": "of the function"})
    with auto_publishing(), traces.tracer.start_as_current_span("request"):
        assert enqueue_event(1, "a", headers={"traceparent": "mine"}).headers == {
            "traceparent": "mine"
        }
        assert enqueue_event(1, "a").headers == {"traceparent": "of the function"}


def test_a_trace_state_is_carried(traces: Traces) -> None:
    configure("memory://")
    remote = trace.SpanContext(
        1, 2, True, trace.TraceFlags(1), trace.TraceState([("vendor", "x"), ("other", "y")])
    )
    parent = trace.set_span_in_context(trace.NonRecordingSpan(remote))
    with auto_publishing():
        with traces.tracer.start_as_current_span("request", context=parent):
            event = enqueue_event(1, "a")
    assert event.headers["tracestate"] == "vendor=x,other=y"


def test_baggage_stays_at_home_unless_it_is_wanted(traces: Traces, place: Place) -> None:
    configure("memory://")
    token = context.attach(baggage.set_baggage("mail", "a@b"))
    try:
        with auto_publishing(), traces.tracer.start_as_current_span("request"):
            assert "baggage" not in enqueue_event(1, "a").headers
        OutboxInstrumentor().uninstrument()
        OutboxInstrumentor().instrument(tracer_provider=traces.provider, propagate_baggage=True)
        with auto_publishing():
            assert enqueue_event(1, "a").headers == {"baggage": "mail=a%40b"}
            for name in ("one", "two", "three"):
                context.attach(baggage.set_baggage(name, "x" * 3500))
            assert len(enqueue_event(1, "a").headers.get("baggage", "")) <= 8192
    finally:
        context.detach(token)
    seen: list[object] = []

    @consumer("orders")
    def handle(event: Any) -> None:
        seen.append(baggage.get_baggage("mail"))

    with place.publisher() as publisher, working(publisher, handle):
        publisher.publish(
            events_for(publisher, ["orders"], exchange="", headers={"baggage": "mail=a%40b"})
        )
        wait_until(lambda: seen, 10)
    assert seen == ["a@b"]


def test_an_event_may_have_a_span_for_itself(traces: Traces) -> None:
    OutboxInstrumentor().uninstrument()
    OutboxInstrumentor().instrument(tracer_provider=traces.provider, create_spans=True)
    configure("memory://")
    with auto_publishing(), traces.tracer.start_as_current_span("request") as request:
        event = enqueue_event(1, "a.7")
        with pytest.raises(InvalidEvent):
            enqueue_event(object(), "a.7")
    created, failed = traces.named("create outbox", 2)
    assert created.kind is SpanKind.PRODUCER
    assert parent_of(created) == (
        request.get_span_context().trace_id,
        request.get_span_context().span_id,
    )
    assert f"{created.context.span_id:016x}" in event.headers["traceparent"]
    assert attributes_of(created) == {
        "messaging.system": "outbox",
        "messaging.operation.name": "create",
        "messaging.operation.type": "create",
        "messaging.destination.name": "outbox:a.7",
        "messaging.rabbitmq.destination.routing_key": "a.7",
        "messaging.message.id": event.id,
    }
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes_of(failed)["error.type"] == "outbox.errors.InvalidEvent"
    assert links_of(traces.one("send outbox")) == [id_of(created)]


# ------------------------------------------------------------------------------ sending


def test_a_chunk_has_one_span(traces: Traces) -> None:
    configure("memory://")
    with traces.tracer.start_as_current_span("other") as other:
        carried = {"traceparent": f"00-{other.get_span_context().trace_id:032x}-{1:016x}-01"}
    with traces.tracer.start_as_current_span("request") as request:
        with auto_publishing():
            for number in range(200):
                enqueue_event(number, "a")
            enqueue_event(0, "b", headers=carried)
            enqueue_event(0, "b", headers={"traceparent": "00-wrong"})
        with auto_publishing():
            event = enqueue_event(1, "a.7")
    batch, single = traces.named("send outbox", 2)
    request_id = request.get_span_context().trace_id, request.get_span_context().span_id
    assert parent_of(batch) == parent_of(single) == request_id
    assert batch.kind is SpanKind.CLIENT
    assert links_of(batch) == [request_id, (other.get_span_context().trace_id, 1)]
    assert attributes_of(batch) == {
        "messaging.system": "outbox",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "outbox",
        "messaging.batch.message_count": 202,
    }
    assert single.kind is SpanKind.PRODUCER
    assert attributes_of(single) == {
        "messaging.system": "outbox",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "outbox:a.7",
        "messaging.rabbitmq.destination.routing_key": "a.7",
        "messaging.message.id": event.id,
    }


def test_a_chunk_for_several_exchanges_names_none(traces: Traces) -> None:
    configure("memory://")
    with auto_publishing():
        enqueue_event(1, "a")
        enqueue_event(1, "a", exchange="")
    assert "messaging.destination.name" not in attributes_of(traces.one("send"))


def test_a_failure_to_publish_is_an_error(traces: Traces) -> None:
    publisher = configure("amqp://127.0.0.1:1/", timeout=0.2, drain_timeout=0)
    with auto_publishing():
        enqueue_event(1, "a")
    span = traces.one("send outbox")
    assert span.status.status_code is StatusCode.ERROR
    attributes = attributes_of(span)
    assert attributes["error.type"] in (
        "outbox.errors.ConnectFailed",
        "outbox.errors.PublishTimeout",
    )
    assert attributes["outbox.kept"] == 1
    assert (attributes["messaging.system"], attributes["server.address"]) == (
        "rabbitmq",
        "127.0.0.1",
    )
    assert attributes["server.port"] == 1
    publisher.close(0)


def test_a_chunk_that_cannot_be_handed_in_has_ended(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = configure("memory://")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publisher._own, "hand_in", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publisher.submit(events_for(publisher, ["a"]))
    assert traces.one("send outbox").status.status_code is StatusCode.ERROR


# ------------------------------------------------------------------------------ processing


def test_an_attempt_belongs_to_the_trace_of_its_event(traces: Traces, place: Place) -> None:
    handled = Handled()
    with place.publisher() as publisher, working(publisher, orders(handled)):
        with traces.tracer.start_as_current_span("request"):
            events = events_for(publisher, ["orders"], exchange="")
            publisher.publish(events)
        span = traces.one("process orders")
    request = traces.one("request")
    assert parent_of(span) == id_of(request)
    assert links_of(span) == [id_of(request)]
    assert span.kind is SpanKind.CONSUMER
    assert span.status.status_code is StatusCode.UNSET
    assert attributes_of(span) == {
        "messaging.system": "outbox",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "orders",
        "messaging.rabbitmq.destination.routing_key": "orders",
        "messaging.message.id": events[0].id,
        "messaging.message.body.size": len(events[0].body),
        "outbox.outcome": "acked",
    }


def payload(publisher: Any, body: str, **options: Any) -> Event:
    collector = EventCollector(publisher=publisher)
    event = collector.enqueue_event(body, "orders", exchange="", **options)
    collector.clear_events()
    return event


@pytest.mark.parametrize(
    ("body", "outcomes", "error"),
    [
        ("fail", ["dead"], "LookupError"),
        ("reject", ["rejected"], "rejected"),
        ("requeue", ["requeued", "acked"], None),
        ("retry", ["retried", "acked"], "outbox.consumers.retry.Retry"),
    ],
)
def test_the_outcome_is_named(
    traces: Traces, place: Place, body: str, outcomes: list[str], error: str | None
) -> None:
    handled = Handled()
    with place.publisher() as publisher, working(publisher, orders(handled), threads=1):
        with traces.tracer.start_as_current_span("request"):
            publisher.publish([payload(publisher, body)], keep=False)
        spans = traces.named("process orders", len(outcomes))
    assert [attributes_of(span)["outbox.outcome"] for span in spans] == outcomes
    assert attributes_of(spans[0]).get("error.type") == error
    is_error = spans[0].status.status_code is StatusCode.ERROR
    assert is_error == (error is not None)
    assert {parent_of(span) for span in spans} == {id_of(traces.one("request"))}
    if body == "retry":
        assert attributes_of(spans[1])["outbox.attempt"] == 2


def test_what_a_message_publishes_hangs_below_it(traces: Traces, place: Place) -> None:
    class Orders(Consumer):
        queue = "orders"
        auto_publish = True

        def process(self, event: Any) -> None:
            with traces.tracer.start_as_current_span("inside"):
                pass
            enqueue_event(1, "bills", exchange="")

        def on_success(self, event: Any) -> None:
            enqueue_event(1, "mails", exchange="")

    with place.publisher() as publisher, working(publisher, Orders()):
        with traces.tracer.start_as_current_span("request"):
            publisher.publish([payload(publisher, "")])
        sends = traces.named("send amq.default", 3)[1:]
    process = traces.one("process orders")
    assert parent_of(traces.one("inside")) == id_of(process)
    assert [parent_of(span) for span in sends] == [id_of(process)] * 2
    assert [links_of(span) for span in sends] == [[id_of(process)]] * 2


def test_a_coroutine_and_its_tasks_run_in_the_span(traces: Traces, place: Place) -> None:
    seen: list[Any] = []

    @consumer("orders")
    async def handle(event: Any) -> None:
        async def of_task() -> None:
            await asyncio.sleep(0)
            seen.append(trace.get_current_span().get_span_context())

        await asyncio.gather(of_task(), asyncio.to_thread(lambda: seen.append(_current())))

    with place.publisher() as publisher, working(publisher, handle, concurrency=4):
        publisher.publish([payload(publisher, str(number)) for number in range(8)])
        spans = traces.named("process orders", 8)
    assert sorted(2 * [span.context.span_id for span in spans]) == sorted(
        each.span_id for each in seen
    )
    assert len({span.context.trace_id for span in spans}) == 8
    assert not any(span.links for span in spans)


def _current() -> Any:
    return trace.get_current_span().get_span_context()


def test_nothing_of_a_span_is_left_on_a_thread_that_goes_on(traces: Traces, place: Place) -> None:
    seen: list[Any] = []

    @consumer("orders")
    def handle(event: Any) -> None:
        seen.append((threading.current_thread(), _current()))
        if event.payload == "exit":
            sys.exit()

    with place.publisher() as publisher, working(publisher, handle, threads=1):
        publisher.publish([payload(publisher, body) for body in ("exit", "", "")])
        spans = traces.named("process orders", 3)
        OutboxInstrumentor().uninstrument()
        publisher.publish([payload(publisher, "")])
        wait_until(lambda: len(seen) == 4, 10)
    assert len({thread for thread, _ in seen}) == 1
    assert [context.span_id for _, context in seen[:3]] == [span.context.span_id for span in spans]
    assert not any(span.parent for span in spans)
    assert not seen[3][1].is_valid


def test_a_message_that_was_late_has_ended_once(traces: Traces, place: Place) -> None:
    release = threading.Event()
    after: list[Any] = []

    @consumer("orders", timeout=0.2)
    def handle(event: Any) -> None:
        release.wait(10)
        after.append(_current())

    with place.publisher() as publisher, working(publisher, handle, threads=1):
        publisher.publish([payload(publisher, "")])
        span = traces.one("process orders")
        dead = traces.named("send amq.default", 2)[1]
        release.set()
        wait_until(lambda: after, 10)
    assert attributes_of(span)["outbox.outcome"] == "dead"
    assert attributes_of(span)["error.type"] == "outbox.consumers.outcome.ProcessTimeout"
    assert parent_of(dead) == id_of(span)
    assert after[0].span_id == span.context.span_id
    assert len(traces.named("process orders")) == 1


# ------------------------------------------------------------------------------ parent or link


def test_a_delayed_event_begins_a_new_trace(traces: Traces, place: Place) -> None:
    handled = Handled()
    with place.publisher() as publisher, working(publisher, orders(handled)):
        with traces.tracer.start_as_current_span("request"):
            event = payload(publisher, "", delay=0.1)
            assert event.headers["outbox-delayed"] is True
            publisher.publish([event])
        span = traces.one("process orders")
    assert span.parent is None
    assert links_of(span) == [id_of(traces.one("request"))]
    assert list(handled[0].headers) == ["traceparent"]


def test_without_a_trace_a_delayed_event_is_as_ever(traces: Traces) -> None:
    configure("memory://")
    with auto_publishing():
        assert enqueue_event(1, "a", delay=1).headers == {}


def test_a_replayed_message_begins_a_new_trace(traces: Traces, place: Place) -> None:
    handled = Handled()
    with place.publisher() as publisher, working(publisher, orders(handled)):
        with traces.tracer.start_as_current_span("request"):
            publisher.publish([payload(publisher, "fail")])
        traces.named("send amq.default", 2)
        wait_until(lambda: place.count("orders.dead") == 1, 10)
        assert replay(place, "orders.dead") == []
        first, second = traces.named("process orders", 2)
    request = traces.one("request")
    assert parent_of(first) == id_of(request)
    assert second.parent is None
    assert links_of(second) == [id_of(request)]


@pytest.mark.parametrize(("seconds", "is_child"), [(30, True), (90, False)])
def test_a_late_attempt_begins_a_new_trace(
    traces: Traces, place: Place, seconds: int, is_child: bool
) -> None:
    handled = Handled()
    first = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    with place.publisher() as publisher, working(publisher, orders(handled)):
        with traces.tracer.start_as_current_span("request"):
            event = payload(publisher, "")
        headers: Any = event.headers
        headers |= {"outbox-attempt": 2, "outbox-first-failed-at": first.isoformat()}
        publisher.publish([event])
        span = traces.one("process orders")
    request = id_of(traces.one("request"))
    assert links_of(span) == [request]
    assert parent_of(span) == (request if is_child else None)


@pytest.mark.parametrize(("parent", "is_child"), [("always", True), ("never", False)])
def test_the_choice_may_be_made_for_all(place: Place, parent: Any, is_child: bool) -> None:
    traces = Traces()
    OutboxInstrumentor().instrument(tracer_provider=traces.provider, parent=parent)
    with place.publisher() as publisher, working(publisher, orders(Handled())):
        with traces.tracer.start_as_current_span("request"):
            delay = 0.1 if parent == "always" else 0
            publisher.publish([payload(publisher, "", delay=delay)])
        span = traces.one("process orders")
    request = id_of(traces.one("request"))
    assert links_of(span) == [request]
    assert parent_of(span) == (request if is_child else None)


@pytest.mark.parametrize(
    "wrong",
    [
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-\u0660af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
        ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
        {"trace": 1},
        7,
        None,
        "",
    ],
    ids=repr,
)
def test_a_header_that_holds_no_context_begins_a_new_trace(
    traces: Traces, place: Place, wrong: Any
) -> None:
    handled = Handled()
    with place.publisher() as publisher, working(publisher, orders(handled)):
        headers = {"traceparent": wrong, "tracestate": wrong}
        publisher.publish([payload(publisher, "", headers=headers)])
        span = traces.one("process orders")
    assert (span.parent, links_of(span)) == (None, [])
    assert attributes_of(span)["outbox.outcome"] == "acked"
    assert handled[0].headers == headers


def test_a_later_version_of_the_header_is_read(traces: Traces, place: Place) -> None:
    later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes"
    with place.publisher() as publisher, working(publisher, orders(Handled())):
        publisher.publish([payload(publisher, "", headers={"traceparent": later})])
        span = traces.one("process orders")
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C


# ------------------------------------------------------------------------------ sampling


class _Counting(Sampler):
    """A sampler that records nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def should_sample(self, *arguments: Any, **named: Any) -> Any:
        self.asked += 1
        return ALWAYS_OFF.should_sample(*arguments, **named)

    def get_description(self) -> str:
        return "Counting"


@pytest.mark.parametrize("usual", [True, False])
def test_what_was_not_sampled_stays_so_and_is_carried_on(place: Place, usual: bool) -> None:
    unusual = _Counting()
    traces = Traces(ParentBased(ALWAYS_OFF) if usual else unusual)
    OutboxInstrumentor().instrument(tracer_provider=traces.provider)
    seen: list[Any] = []

    @consumer("orders", auto_publish=True)
    def handle(event: Any) -> None:
        seen.extend((event.headers["traceparent"], enqueue_event(1, "bills", exchange="").headers))

    with place.publisher() as publisher, working(publisher, handle):
        with traces.tracer.start_as_current_span("request"):
            publisher.publish([payload(publisher, "")])
        wait_until(lambda: place.count("bills") == 1, 10)
    assert traces.spans == []
    first, second = seen[0], seen[1]["traceparent"]
    assert first[:36] == second[:36]
    assert first.endswith(("-00", "-02"))
    assert second.endswith(("-00", "-02"))
    assert usual == (first == second)  # then no span was made, not even one that records nothing
    assert unusual.asked == (0 if usual else 4)


# ------------------------------------------------------------------------------ the instrumentor


def test_it_is_found_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group = "opentelemetry_instrumentor"
    [(name, value)] = project["entry-points"][group].items()
    entry = importlib.metadata.EntryPoint(name, value, group)
    instrumentor = entry.load()()
    assert instrumentor.instrumentation_dependencies() == ()
    assert not instrumentor.is_instrumented_by_opentelemetry
    instrumentor.instrument(skip_dep_check=True)  # as opentelemetry-instrument does
    assert OutboxInstrumentor().is_instrumented_by_opentelemetry


def test_a_second_time_only_warns(traces: Traces, caplog: pytest.LogCaptureFixture) -> None:
    before = seam.tracer
    with caplog.at_level(logging.WARNING, "outbox.telemetry"):
        OutboxInstrumentor().instrument(create_spans=True)
    assert seam.tracer is before
    assert "instrumented already" in caplog.text
    OutboxInstrumentor().uninstrument()
    OutboxInstrumentor().uninstrument()
    assert seam.tracer is None


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(UsageError, match="parent='sometimes' is not one of auto, always, never"):
        OutboxInstrumentor().instrument(parent="sometimes")  # type: ignore[arg-type]
    assert seam.tracer is None


def test_a_provider_may_be_set_later() -> None:
    script = """
from outbox import auto_publishing, configure, enqueue_event
from outbox.telemetry import OutboxInstrumentor
OutboxInstrumentor().instrument()
configure("memory://")
with auto_publishing():
    enqueue_event(1, "a")
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
trace.set_tracer_provider(provider := TracerProvider(shutdown_on_exit=False))
provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
with auto_publishing():
    enqueue_event(1, "a")
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stderr == ""
    assert printed.stdout.count('"name": "send outbox"') == 1  # flushed when the publisher closes


def test_without_it_nothing_of_opentelemetry_is_imported() -> None:
    script = """
import sys
import outbox.consumers, outbox.middleware.wsgi, outbox.sql, outbox.telemetry, outbox.testing
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout == "[]\n"


def test_a_tracer_that_is_broken_stops_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Sampler):
        def should_sample(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("broken sampler")

        def get_description(self) -> str:
            return "Broken"

    traces = Traces(Broken())
    OutboxInstrumentor().instrument(tracer_provider=traces.provider)
    handled = Handled()
    with caplog.at_level(logging.ERROR, "outbox.telemetry"):
        with place.publisher() as publisher, working(publisher, orders(handled)):
            publisher.publish([payload(publisher, "")]).raise_for_failure()
            wait_until(lambda: handled, 10)
    assert "could not begin the span of a chunk" in caplog.text
    assert "could not begin the span of a message" in caplog.text


def test_a_processor_of_spans_that_is_broken_stops_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("broken processor")

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    traces = Traces()
    traces.provider.add_span_processor(Broken())
    OutboxInstrumentor().instrument(tracer_provider=traces.provider, create_spans=True)

    @consumer("orders")
    def handle(event: Any) -> None:
        raise Mute

    with place.publisher() as publisher, working(publisher, handle) as worker:
        with auto_publishing(publisher=publisher):
            enqueue_event("", "orders")
        wait_until(lambda: worker.stats().ended == 1, 10)
    assert caplog.text.count("could not end a span") == 2
    process = traces.one("process orders")
    assert process.status.status_code is StatusCode.ERROR
    assert attributes_of(process)["error.type"].endswith("Mute")
    assert attributes_of(process)["outbox.outcome"] == "dead"


def test_a_context_of_the_application_is_kept(traces: Traces, place: Place) -> None:
    of_application: contextvars.ContextVar[str] = contextvars.ContextVar("of_application")
    of_application.set("main")
    token = context.attach(context.set_value("key", "value"))
    seen: list[Any] = []

    @consumer("orders")
    def handle(event: Any) -> None:
        seen.append((of_application.get(), context.get_value("key")))

    with place.publisher() as publisher, working(publisher, handle):
        publisher.publish([payload(publisher, "")])
        wait_until(lambda: seen, 10)
    context.detach(token)
    assert seen == [("main", "value")]


def test_a_publisher_that_is_closed_has_all_spans_exported(place: Place) -> None:
    flushed: list[int] = []

    class Provider(TracerProvider):
        def force_flush(self, timeout_millis: int = 30000) -> bool:
            flushed.append(timeout_millis)
            return True

    OutboxInstrumentor().instrument(tracer_provider=Provider())
    with place.publisher(drain_timeout=2) as publisher:
        publisher.publish(events_for(publisher, ["a"]))
        assert flushed == []
    [milliseconds] = flushed
    assert 0 < milliseconds <= 2000


def test_a_forked_child_traces_what_it_publishes(tmp_path: Path) -> None:
    script = """
import os, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from outbox import auto_publishing, configure, enqueue_event
from outbox.telemetry import OutboxInstrumentor

provider = TracerProvider(shutdown_on_exit=False)
exporter = ConsoleSpanExporter(formatter=lambda span: f"{span.name} {os.getpid()}\\n")
provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
OutboxInstrumentor().instrument(tracer_provider=provider)
publisher = configure("memory://")
with auto_publishing():
    enqueue_event(1, "a", exchange="parent")
pid = os.fork()
with auto_publishing():
    enqueue_event(1, "a", exchange="both")
publisher.close()
if pid:
    os.waitpid(pid, 0)
    print("child", pid)
    print("parent", os.getpid())
else:
    sys.stdout.flush()
    os._exit(0)
"""
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = printed.stdout.splitlines()
    child, parent = (line.split()[1] for line in lines[-2:])
    assert sorted(lines[:-2]) == sorted(
        [f"send both {child}", f"send both {parent}", f"send parent {parent}"]
    )
