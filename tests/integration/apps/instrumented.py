"""A program that other instrumentations watch; prints the spans they make as JSON.

Usage: ``python -m tests.integration.apps.instrumented FOLDER AMQP_URL NAME``. It needs the
environment that ``scripts/otel-venv`` makes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pika
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from sqlalchemy.orm import Session

import outbox.sql
from outbox import Event, EventCollector, Publisher, auto_publishing, configure, enqueue_event
from outbox.consumers import ReceivedEvent, Reject, Retry, Worker, consumer
from outbox.sql import Inbox, Relay, Store
from outbox.telemetry import OutboxInstrumentor

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
tracer = provider.get_tracer("application")
found: dict[str, list[str]] = {}


def main(folder: str, url: str, name: str) -> None:
    for package, instrumentor in (("sqlalchemy", "SQLAlchemy"), ("pika", "Pika")):
        module: Any = importlib.import_module(f"opentelemetry.instrumentation.{package}")
        getattr(module, f"{instrumentor}Instrumentor")().instrument(tracer_provider=provider)
    import sqlalchemy  # its create_engine() is another one now

    engine = sqlalchemy.create_engine(f"sqlite:///{folder}/shop.db")
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    take("a plain query")
    with pika.BlockingConnection(pika.URLParameters(url)) as plain:
        channel = plain.channel()
        channel.queue_declare(f"{name}-plain", auto_delete=True)
        channel.basic_publish("", f"{name}-plain", b"")
        channel.queue_delete(f"{name}-plain")
    take("a plain publish")

    store = Store(engine)
    store.create()
    inbox = Inbox(engine)
    inbox.create()
    publisher = configure(url, exchange=name, after_commit="publish")
    exporter.clear()
    with running(Relay(store, publisher)):
        time.sleep(0.5)
    take("a relay, not instrumented")
    OutboxInstrumentor().instrument(tracer_provider=provider)
    with tracer.start_as_current_span("request"), Session(engine) as session:
        enqueue_event(1, "order.placed", session=session)
        session.commit()
    take("the application's transaction")
    outbox.sql.drain()
    take("the fast path")

    store.put([event_of("order.paid")])
    with running(Relay(store, publisher)):
        time.sleep(1)
    take("a relay")

    with Publisher(f"sqlite:///{folder}/queue.db") as embedded:
        work(embedded, name, inbox, engine)
    take("a SQLite file as the broker")
    work(publisher, name, inbox, engine)
    take("RabbitMQ")
    publisher.close()
    take("the end")
    print(json.dumps(found))


@contextlib.contextmanager
def running(relay: Relay) -> Iterator[None]:
    relay.start()
    yield
    relay.stop()


def event_of(target: str) -> Event:
    return Event(id=target, target=target, exchange="", body=b"1", unroutable="ignore")


def work(publisher: Publisher, name: str, inbox: Inbox, engine: Any) -> None:
    """Process messages that end in all ways."""
    over = threading.Event()

    @consumer(f"{name}-work", auto_publish=True, deduplicate=True)
    def handle(event: ReceivedEvent) -> None:
        match event.payload:
            case "retry" if event.attempt == 1:
                raise Retry(delay=0)
            case "reject":
                raise Reject
            case "query":
                with engine.begin() as connection:
                    connection.execute(text("SELECT 'of a handler'"))
            case "follow":
                enqueue_event("over", f"{name}-work", exchange="")
            case "over":
                over.set()

    worker = Worker([handle], publisher=publisher, threads=1, inbox=inbox)
    worker.start()
    try:
        worker_is_ready(publisher, name)
        with tracer.start_as_current_span("request"), auto_publishing(publisher=publisher):
            for payload in ("retry", "reject", "query", "follow"):
                enqueue_event(payload, f"{name}-work", exchange="")
        assert over.wait(20)
    finally:
        worker.stop()


def worker_is_ready(publisher: Publisher, name: str) -> None:
    """Wait until the queue exists."""
    for _ in range(200):
        collector = EventCollector(publisher=publisher)
        collector.enqueue_event("first", f"{name}-work", exchange="", unroutable="fail")
        events = collector.clear_events()
        if publisher.publish(events, keep=False).ok:
            return
        time.sleep(0.1)


def take(what: str) -> None:
    """Note the spans since the last call, each with what has made it."""
    time.sleep(0.1)
    found[what] = [
        f"{(span.instrumentation_scope.name if span.instrumentation_scope else '')}: {span.name}"
        + ("" if span.parent else " (root)")
        for span in exporter.get_finished_spans()
    ]
    exporter.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
