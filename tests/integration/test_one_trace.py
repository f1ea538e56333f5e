"""One trace from a web request to the handlers of its events, over a real broker."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from werkzeug.test import Client
from werkzeug.wrappers import Response

import outbox.telemetry
from outbox import Publisher, auto_publishing, configure, enqueue_event
from outbox.consumers import Retry, consumer
from outbox.middleware.wsgi import OutboxMiddleware
from outbox.sql import Relay
from outbox.storage.store import Store
from outbox.telemetry import OutboxInstrumentor
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.consuming import Command
from tests.places import RabbitMQPlace, events_for, made, replay, working
from tests.tracing import Traces, attributes_of, id_of, links_of, parent_of
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def traces() -> Iterator[Traces]:
    traces = Traces()
    OutboxInstrumentor().instrument(tracer_provider=traces.provider)
    yield traces
    OutboxInstrumentor().uninstrument()


@pytest.fixture
def broker(amqp_url: str, name: str, inspector: Inspector) -> RabbitMQPlace:
    return RabbitMQPlace(amqp_url, name, inspector)


def test_a_request_its_stored_event_and_the_handlers_are_one_trace(
    traces: Traces, broker: RabbitMQPlace, name: str, tmp_path: Path
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    store = Store(engine)
    store.create()
    orders, bills = made(broker, f"{name}-orders", "order.*"), made(broker, f"{name}-bills")
    traces.clear()

    def application(_environ: Any, start_response: Any) -> list[bytes]:
        with Session(engine) as session:
            enqueue_event({"n": 1}, "order.17", session=session)
            session.commit()
        start_response("201 Created", [])
        return []

    def instrumented(environ: Any, start_response: Any) -> Any:
        with traces.tracer.start_as_current_span("request"):
            return OutboxMiddleware(application)(environ, start_response)

    @consumer(orders, auto_publish=True)
    def on_order(event: Any) -> None:
        with traces.tracer.start_as_current_span("inside"):
            enqueue_event({"n": 2}, bills, exchange="")

    @consumer(bills)
    async def on_bill(event: Any) -> None:
        with traces.tracer.start_as_current_span("inside of a coroutine"):
            pass

    publisher = configure(broker.url, exchange=broker.exchange, after_commit="nothing")
    with working(publisher, on_order, on_bill):
        assert Client(instrumented, Response).post("/orders").status_code == 201
        assert Relay(store, publisher).run_once() == 1
        of_bill = traces.one(f"process {bills}")
    engine.dispose()

    request, relayed = traces.one("request"), traces.one(f"send {broker.exchange}")
    of_order, followed = traces.one(f"process {orders}"), traces.one("send amq.default")
    inside, in_coroutine = traces.one("inside"), traces.one("inside of a coroutine")
    assert relayed.parent is None  # the relay serves many requests
    assert links_of(relayed) == [id_of(request)]
    assert parent_of(of_order) == id_of(request)
    assert links_of(of_order) == [id_of(request)]
    assert parent_of(inside) == id_of(of_order)
    assert parent_of(followed) == id_of(of_order)
    assert links_of(followed) == [id_of(inside)]
    assert parent_of(of_bill) == id_of(inside)
    assert parent_of(in_coroutine) == id_of(of_bill)
    everything = [request, of_order, inside, followed, of_bill, in_coroutine]
    assert len({span.context.trace_id for span in everything}) == 1
    assert attributes_of(of_order)["messaging.destination.name"] == (
        f"{broker.exchange}:order.17:{orders}"
    )
    assert attributes_of(of_order)["messaging.system"] == "rabbitmq"
    assert attributes_of(of_bill)["messaging.destination.name"] == bills


@pytest.mark.slow
def test_a_delayed_event_has_a_trace_apart(
    traces: Traces, broker: RabbitMQPlace, name: str
) -> None:
    seen: list[Any] = []
    queue = made(broker, name)

    @consumer(queue)
    def handle(event: Any) -> None:
        seen.append(event.headers)
        if event.attempt == 1:
            raise Retry(delay=1)

    with broker.publisher() as publisher, working(publisher, handle):
        with traces.tracer.start_as_current_span("request") as request:
            carried = events_for(publisher, [queue], exchange="", delay=1)
            publisher.publish(carried).raise_for_failure()
        first, second = traces.named(f"process {queue}", 2)
    context = request.get_span_context()
    for span in (first, second):
        assert span.parent is None
        assert links_of(span) == [(context.trace_id, context.span_id)]
    assert first.context.trace_id != second.context.trace_id != context.trace_id
    assert [list(headers) for headers in seen] == [["traceparent"], ["traceparent"]]


def test_a_replayed_message_has_a_trace_apart(
    traces: Traces, broker: RabbitMQPlace, name: str
) -> None:
    queue = made(broker, name)

    @consumer(queue)
    def handle(event: Any) -> None:
        if len(traces.spans) < 3:
            raise LookupError("no such order")

    with broker.publisher() as publisher, working(publisher, handle):
        traces.clear()
        with traces.tracer.start_as_current_span("request"):
            publisher.publish(events_for(publisher, [queue], exchange=""))
        wait_until(lambda: broker.count(f"{queue}.dead") == 1, 10)
        assert replay(broker, f"{queue}.dead") == []
        first, second = traces.named(f"process {queue}", 2)
    request = id_of(traces.one("request"))
    assert (parent_of(first), links_of(first)) == (request, [request])
    assert (second.parent, links_of(second)) == (None, [request])
    assert [attributes_of(span)["outbox.outcome"] for span in (first, second)] == ["dead", "acked"]


def test_kept_events_have_another_span_when_they_are_sent(
    traces: Traces, broker: RabbitMQPlace, proxy: FaultProxy, name: str
) -> None:
    queue = made(broker, name)
    traces.clear()
    proxy.refuse()
    with Publisher(proxy.url, timeout=0.3) as publisher:
        with traces.tracer.start_as_current_span("request"):
            report = publisher.publish(events_for(publisher, [queue] * 3, exchange=""))
        assert len(report.kept) == 3
        proxy.heal()
        assert publisher.drain(20)
        first, second = traces.named("send amq.default", 2)
    request = traces.one("request")
    assert parent_of(first) == id_of(request)
    assert attributes_of(first)["outbox.kept"] == 3
    assert attributes_of(first)["error.type"].startswith("outbox.errors.")
    assert second.parent is None
    assert links_of(second) == [id_of(request)]
    assert attributes_of(second)["messaging.batch.message_count"] == 3
    assert "error.type" not in attributes_of(second)
    assert broker.count(queue) == 3


def test_kept_events_that_fail_again_say_so(
    traces: Traces, broker: RabbitMQPlace, proxy: FaultProxy, name: str
) -> None:
    queue = made(broker, name)
    traces.clear()
    with Publisher(proxy.url, timeout=0.5) as publisher:
        publisher.publish(events_for(publisher, [queue], exchange=""))
        proxy.black_hole()
        assert publisher.publish(events_for(publisher, [queue], exchange="")).kept
        proxy.cut()
        proxy.heal()
        assert publisher.drain(20)
        spans = traces.named("send amq.default", 3)
    assert [span.attributes is not None and "error.type" in span.attributes for span in spans] == [
        False,
        True,
        False,
    ]


_ISOLATED = """
import json, os, time
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from outbox.consumers import consumer
from outbox.telemetry import OutboxInstrumentor


class ToFile(SpanExporter):
    def export(self, spans):
        with open("spans", "a") as file:
            for span in spans:
                print(span.name, span.attributes.get("outbox.outcome"), os.getpid(), file=file)
        return SpanExportResult.SUCCESS


provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(BatchSpanProcessor(ToFile(), schedule_delay_millis=60_000))
OutboxInstrumentor().instrument(tracer_provider=provider)


@consumer("{name}", timeout=2)
def work(event):
    with open("done", "a") as file:
        print("done", event.id, os.getpid(), file=file)
    if event.payload["do"] == "hang":
        time.sleep(60)
"""


@pytest.mark.one_python
@pytest.mark.slow
def test_an_isolated_attempt_has_its_span_where_it_ran(
    broker: RabbitMQPlace, name: str, tmp_path: Path
) -> None:
    OutboxInstrumentor().uninstrument()
    command = Command(tmp_path, broker, name)
    command.write(_ISOLATED.replace("{name}", name))
    command.start("--isolate", "process", "--threads", "1")
    try:
        command.publish("hang", "work", "work")
        command.wait_done(3)
    finally:
        assert command.stop() == 0
    spans = [line.split() for line in (tmp_path / "spans").read_text().splitlines()]
    done = {pid for _, pid in command.did()}
    processed = [(outcome, int(pid)) for kind, _, outcome, pid in spans if kind == "process"]
    assert sorted(outcome for outcome, _ in processed) == ["acked", "acked", "dead"]
    [worker] = [pid for outcome, pid in processed if outcome == "dead"]
    assert worker not in done  # it has killed the subprocess
    assert {pid for outcome, pid in processed if outcome == "acked"} < done


def test_without_traces_nothing_of_them_is_called(broker: RabbitMQPlace, name: str) -> None:
    OutboxInstrumentor().uninstrument()
    folder = os.path.dirname(outbox.telemetry.__file__)
    called: set[str] = set()
    done: list[Any] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and os.path.dirname(code.co_filename) == folder:
            called.add(f"{os.path.basename(code.co_filename)}:{code.co_name}")

    @consumer(made(broker, name), auto_publish=True)
    def handle(event: Any) -> None:
        if event.payload == 1:
            enqueue_event(2, name, exchange="")
        done.append(event)

    with broker.publisher() as publisher:
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            with working(publisher, handle):
                with auto_publishing(publisher=publisher):
                    enqueue_event(1, name, exchange="")
                wait_until(lambda: len(done) == 2, 10)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert not [each for each in called if each.startswith(("tracing", "spans", "trace_context"))]
