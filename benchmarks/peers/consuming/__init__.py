"""Consumers to compare, each as safe as its documentation describes.

All have the same prefetch, ack a message when its handler has returned, keep no results and don't
log per message. outbox, FastStream and the bare loops consume the same messages, of 200 bytes of
JSON, from the same quorum queue; Dramatiq and Celery consume their own messages from separate
classic queues.

Each contender runs in a new process, and its module is imported only there.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.peers import BODY
from outbox import Event, Publisher

__all__ = [
    "CELERY_QUEUE",
    "CONTENDERS",
    "DRAMATIQ_QUEUE",
    "EXCHANGE",
    "FOLLOW_ON",
    "PREFETCH",
    "QUEUE",
    "THREADS",
    "Contender",
    "Countdown",
]

PREFETCH = 200
THREADS = 8
MANY_THREADS = 32
CONCURRENCY = 100  # tasks
EXCHANGE = "bench"
QUEUE = "bench"
FOLLOW_ON = "bench.follow-on"
DRAMATIQ_QUEUE = "bench_dramatiq"
CELERY_QUEUE = "bench_celery"
_PATIENCE = 300.0  # seconds


class Countdown:
    """The count of handled messages, timed from the first to the last. Thread-safe.

    So connecting, declaring and the rest of the start aren't measured.
    """

    def __init__(self, messages: int, on_last: Callable[[], object] | None = None) -> None:
        self._left = self._messages = messages
        self._on_last = on_last
        self._lock = threading.Lock()
        self._begin = self._end = 0.0
        self._done = threading.Event()

    @property
    def rate(self) -> float:
        """The messages per second."""
        return (self._messages - 1) / (self._end - self._begin)

    def handle(self) -> None:
        """Count a message; this is the whole handler of a contender."""
        with self._lock:
            if self._left == self._messages:
                self._begin = time.perf_counter()
            self._left -= 1
            if self._left:
                return
        self._end = time.perf_counter()
        self._done.set()
        if self._on_last is not None:
            self._on_last()

    @property
    def is_over(self) -> bool:
        """Whether the last message has been handled."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait for the last message."""
        if not self._done.wait(_PATIENCE):
            raise RuntimeError(f"{self._left} messages have not come in {_PATIENCE:.0f} s")


@dataclass(frozen=True, slots=True)
class Contender:
    """A contender that consumes.

    Attributes:
        name: its name in the table.
        module: the module in this package.
        function: the function in the module that consumes all messages; it takes a URL and the
            number of messages, and returns messages per second.
        fill: the function in the module that puts the messages into ``queue``, with the same
            arguments; "" for the common messages.
        queue: the queue that it consumes from.
        sends_to: the queue of its follow-on messages, one for each message; "" if it has none.
        options: keyword arguments of the function.
    """

    name: str
    module: str
    function: str = "consume"
    fill: str = ""
    queue: str = QUEUE
    sends_to: str = ""
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether the contender is outbox."""
        return self.module == "outbox_"

    def consume(self, url: str, messages: int) -> float:
        """Consume all messages; return messages per second."""
        rate: float = getattr(self._module(), self.function)(url, messages, **self.options)
        return rate

    def put(self, url: str, messages: int) -> None:
        """Put messages into the queue."""
        if self.fill:
            getattr(self._module(), self.fill)(url, messages)
        else:
            _fill(url, messages)

    def _module(self) -> object:
        return importlib.import_module(f"{__name__}.{self.module}")


CONTENDERS = {
    "threads": Contender(f"**outbox, {THREADS} threads**", "outbox_"),
    "threads+": Contender(
        f"**outbox, {THREADS} threads; timeout, retry and a filter**", "outbox_", "consume_guarded"
    ),
    "pika": Contender("bare pika loop", "pika_"),
    "kombu": Contender("kombu", "kombu_"),
    "dramatiq": Contender(
        f"Dramatiq, {THREADS} threads", "dramatiq_", fill="fill", queue=DRAMATIQ_QUEUE
    ),
    "celery": Contender(f"Celery, {THREADS} threads", "celery_", fill="fill", queue=CELERY_QUEUE),
    "asyncio": Contender(f"**outbox, asyncio, {CONCURRENCY} tasks**", "outbox_", "consume_async"),
    "asyncio+": Contender(
        f"**outbox, asyncio, {CONCURRENCY} tasks; timeout, retry and a filter**",
        "outbox_",
        "consume_async_guarded",
    ),
    "aio-pika": Contender("bare aio-pika loop", "aio_pika_"),
    "faststream": Contender("FastStream", "faststream_"),
    "threads, follow-on": Contender(
        f"**outbox, {THREADS} threads, `publish()`**",
        "outbox_",
        "consume_and_publish",
        sends_to=FOLLOW_ON,
    ),
    "threads, auto": Contender(
        f"**outbox, {THREADS} threads, `auto_publish`**",
        "outbox_",
        "consume_and_auto_publish",
        sends_to=FOLLOW_ON,
    ),
    "asyncio, auto": Contender(
        f"**outbox, asyncio, {CONCURRENCY} tasks, `auto_publish`**",
        "outbox_",
        "consume_and_auto_publish_async",
        sends_to=FOLLOW_ON,
    ),
    "asyncio, follow-on": Contender(
        f"**outbox, asyncio, {CONCURRENCY} tasks, `publish_async()`**",
        "outbox_",
        "consume_and_publish_async",
        sends_to=FOLLOW_ON,
    ),
    "dramatiq, follow-on": Contender(
        f"Dramatiq, {THREADS} threads, `confirm_delivery`",
        "dramatiq_",
        "consume_and_publish",
        "fill_middle",
        DRAMATIQ_QUEUE,
        f"{DRAMATIQ_QUEUE}_last",
    ),
    "32 threads, follow-on": Contender(
        f"outbox, {MANY_THREADS} threads, `publish()`",
        "outbox_",
        "consume_and_publish",
        sends_to=FOLLOW_ON,
        options={"threads": MANY_THREADS},
    ),
    "dramatiq 32, follow-on": Contender(
        f"Dramatiq, {MANY_THREADS} threads, `confirm_delivery`",
        "dramatiq_",
        "consume_and_publish",
        "fill_middle",
        DRAMATIQ_QUEUE,
        f"{DRAMATIQ_QUEUE}_last",
        options={"threads": MANY_THREADS},
    ),
}


def _fill(url: str, messages: int) -> None:
    """Put messages, as any publisher sends them, into the queue that the workers declare."""
    with Publisher(url, exchange=EXCHANGE) as publisher:
        event = Event(id="1", target=QUEUE, exchange=EXCHANGE, body=BODY)
        for _ in range(messages // 1000):
            publisher.publish([event] * 1000, timeout=60).raise_for_failure()
