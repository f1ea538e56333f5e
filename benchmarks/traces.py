"""What traces cost: beside none, and beside the same calls of OpenTelemetry's SDK written by hand.

python -m benchmarks.traces [--rounds N] [--messages N] [--check]

All cases take turns in one process, with the SDK's processor that exports in batches, and an
exporter that does nothing. The bounds are about the processor time of the process, which others on
the machine disturb less than the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pika
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import Publisher, auto_publishing, enqueue_event
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.telemetry import OutboxInstrumentor
from outbox.testing.broker import PrivateBroker

QUEUE = "benchmark-traces"
CHUNK = 100
PAYLOAD = {"order_id": 12345, "customer": "Ada Lovelace", "note": "x" * 120}


class Nowhere(SpanExporter):
    """Drops the spans."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Measured(NamedTuple):
    """What a number of messages took.

    Attributes:
        rate: messages per second.
        cpu: processor time for each, in microseconds.
    """

    rate: float
    cpu: float

    @classmethod
    def of(cls, messages: int, began: float, used: float) -> Measured:
        """Measure up to now, from ``time.perf_counter()`` and ``time.process_time()`` before."""
        cpu = (time.process_time() - used) / messages * 1e6
        return cls(messages / (time.perf_counter() - began), cpu)


provider = TracerProvider()
provider.add_span_processor(
    BatchSpanProcessor(Nowhere(), max_queue_size=1 << 16, schedule_delay_millis=500)
)
tracer = provider.get_tracer("benchmark")


def parent(*, sampled: bool) -> trace.Span:
    """Return the span of a request in another process."""
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else 0)
    return trace.NonRecordingSpan(trace.SpanContext(0xABC, 0xDEF, True, flags))


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    OutboxInstrumentor().instrument(tracer_provider=provider)
    yield
    OutboxInstrumentor().uninstrument()


def consumed(publisher: Publisher, messages: int, flags: str, *, by_hand: bool) -> Measured:
    """Measure how a worker processes messages."""
    done = threading.Semaphore(0)

    def handle(event: ReceivedEvent) -> None:
        done.release()

    def handle_in_span(event: ReceivedEvent) -> None:
        context = propagate.extract(event.headers)
        creation = trace.get_current_span(context).get_span_context()
        with tracer.start_as_current_span(
            f"process {QUEUE}",
            context,
            trace.SpanKind.CONSUMER,
            {
                "messaging.system": "rabbitmq",
                "server.address": "127.0.0.1",
                "server.port": 5672,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": QUEUE,
                "messaging.rabbitmq.destination.routing_key": event.target,
                "messaging.message.id": event.id,
                "messaging.message.body.size": len(event.body),
            },
            [trace.Link(creation)],
        ) as span:
            handle(event)
            span.set_attribute("outbox.outcome", "acked")

    worker = Worker(
        [consumer(QUEUE)(handle_in_span if by_hand else handle)],
        publisher=publisher,
        threads=1,
        prefetch=500,
    )
    headers = {"traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-{flags}"}
    with auto_publishing(publisher=publisher):
        for number in range(messages):
            enqueue_event(number, QUEUE, exchange="", headers=headers)
    began, used = time.perf_counter(), time.process_time()
    worker.start()
    for _ in range(messages):
        if not done.acquire(timeout=60):
            raise RuntimeError("messages are missing")
    measured = Measured.of(messages, began, used)
    worker.stop()
    return measured


def make_queue(publisher: Publisher) -> None:
    """Have a worker declare the queue."""
    worker = Worker([consumer(QUEUE)(lambda event: None)], publisher=publisher)
    worker.start()
    while True:
        with auto_publishing(publisher=publisher) as collector:
            enqueue_event(0, QUEUE, exchange="")
            if collector.publish().published:
                break
        time.sleep(0.1)
    worker.stop()


def published(publisher: Publisher, messages: int, *, sampled: bool) -> Measured:
    """Measure publishing in chunks of 100, each in a request."""
    began, used = time.perf_counter(), time.process_time()
    with trace.use_span(parent(sampled=sampled)):
        for _ in range(messages // CHUNK):
            with auto_publishing(publisher=publisher):
                for _ in range(CHUNK):
                    enqueue_event(PAYLOAD, "nowhere")
    return Measured.of(messages, began, used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--messages", type=int, default=5_000, help="in each (default: 5,000)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    count: int = options.messages
    found: dict[str, list[Measured]] = defaultdict(list)
    with PrivateBroker() as broker, Publisher(broker.url, unroutable="ignore") as publisher:
        make_queue(publisher)
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            version: str = connection._impl.server_properties["version"]
        run: dict[str, tuple[bool, Callable[[], Measured]]] = {
            "consume": (False, lambda: consumed(publisher, count, "01", by_hand=False)),
            "consume, spans by hand": (
                False,
                lambda: consumed(publisher, count, "01", by_hand=True),
            ),
            "consume, traces": (True, lambda: consumed(publisher, count, "01", by_hand=False)),
            "consume, traces, not sampled": (
                True,
                lambda: consumed(publisher, count, "00", by_hand=False),
            ),
            "publish": (False, lambda: published(publisher, count, sampled=True)),
            "publish, traces": (True, lambda: published(publisher, count, sampled=True)),
            "publish, traces, not sampled": (
                True,
                lambda: published(publisher, count, sampled=False),
            ),
        }
        for number in range(options.rounds + 1):
            for name, (is_traced, measure) in run.items():
                with instrumented() if is_traced else contextlib.nullcontext():
                    measured = measure()
                progress(
                    f"round {number}, {name}: {measured.rate:,.0f} a second, {measured.cpu:.0f} us"
                )
                if number:  # the first warms up
                    found[name].append(measured)
    print(machine(version))
    rows = [
        [name, f"{median(m.rate for m in all_):,.0f}", f"{median(m.cpu for m in all_):.0f}"]
        for name, all_ in found.items()
    ]
    print(table(["", "a second", "us of processor time"], rows))

    def times(one: str, other: str) -> float:
        """Return how much more processor time a case takes, from pairs of one round."""
        return median(a.cpu / b.cpu for a, b in zip(found[one], found[other], strict=True))

    kept = print_bounds(
        [
            Bound(
                "consuming: the time with traces, of that by hand",
                times("consume, traces", "consume, spans by hand"),
                1.25,
                at_most=True,
            ),
            Bound(
                "consuming: the time when not sampled, of that without traces",
                times("consume, traces, not sampled", "consume"),
                1.25,
                at_most=True,
            ),
            Bound(
                "publishing: the time with traces, of that without",
                times("publish, traces", "publish"),
                1.25,
                at_most=True,
            ),
            Bound(
                "publishing: the time when not sampled, of that without traces",
                times("publish, traces, not sampled", "publish"),
                1.25,
                at_most=True,
            ),
        ]
    )
    return 0 if kept or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
