"""Callers that are interrupted: by signal handlers that raise or publish, and by finalizers."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from outbox import Event, EventCollector, Publisher, auto_publishing
from tests.amqp import Inspector

INTERRUPTIONS = 300

# Where the signal handler raises in a finalizer, Python only reports it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class TimeLimit(Exception):
    """Raised by a signal handler, as by RQ, Celery's soft limits and pytest-timeout."""


@contextlib.contextmanager
def on_alarm(act: Callable[[], object]) -> Iterator[Callable[[float], object]]:
    """Call ``act`` in the signal handler; yield a function that sets the alarm."""

    def handle(*_: object) -> None:
        act()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def give_up() -> None:
    raise TimeLimit


@pytest.fixture
def publisher(amqp_url: str, name: str) -> Iterator[Publisher]:
    with Publisher(amqp_url, exchange=name) as publisher:
        yield publisher


def publish(publisher: Publisher, event_id: str, how: str) -> None:
    if how == "block":
        with auto_publishing(publisher=publisher) as block:
            block.enqueue_event(0, "x", id=event_id)
        return
    event = Event(id=event_id, target="x", exchange=publisher.settings.exchange, body=b"0")
    if how == "publish":
        publisher.publish([event])
    elif how == "future":
        publisher.submit([event]).result()
    else:
        publisher.submit([event])
        publisher.drain()


@pytest.mark.parametrize("how", ["block", "publish", "future", "drain"])
def test_a_time_limit_anywhere_leaves_the_publisher_usable_and_loses_nothing(
    publisher: Publisher, inspector: Inspector, name: str, how: str
) -> None:
    queue = inspector.queue(name, name)
    draw = random.Random(how)
    publish(publisher, "first", how)
    done: set[str] = {"first"}
    interrupted: set[str] = set()
    with on_alarm(give_up) as alarm:
        while len(interrupted) < INTERRUPTIONS:
            event_id = f"{len(done) + len(interrupted)}"
            try:
                try:
                    alarm(draw.uniform(0.00005, 0.003))
                    publish(publisher, event_id, how)
                finally:
                    alarm(0)
            except TimeLimit:
                interrupted.add(event_id)
            else:
                done.add(event_id)
    assert publisher.drain(10)
    publish(publisher, "last", how)
    arrived = [message.id for message in inspector.all(queue)]
    assert len(set(arrived)) == len(arrived)
    assert done | {"last"} <= set(arrived) <= done | {"last"} | interrupted
    assert publisher.kept == ()


def test_the_events_of_an_interrupted_publish_are_in_exactly_one_place(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    draw = random.Random(7)
    collector = EventCollector(publisher=publisher)
    enqueued = 0
    with on_alarm(give_up) as alarm:
        for _ in range(INTERRUPTIONS):
            collector.enqueue_event(0, "x", id=str(enqueued))
            enqueued += 1
            with contextlib.suppress(TimeLimit):
                try:
                    alarm(draw.uniform(0.00001, 0.0004))
                    collector.publish()
                finally:
                    alarm(0)
    collector.publish()
    assert publisher.drain(10)
    arrived = sorted(int(message.id) for message in inspector.all(queue))
    assert arrived == list(range(enqueued))


@pytest.mark.parametrize("how", ["block", "publish"])
def test_a_signal_handler_may_publish_while_it_interrupts_a_publisher(
    publisher: Publisher, inspector: Inspector, name: str, how: str
) -> None:
    queue = inspector.queue(name, name)
    draw = random.Random(how)
    signalled: list[str] = []

    def announce() -> None:
        signalled.append(f"signal-{len(signalled)}")
        begin = time.monotonic()
        with auto_publishing(independent=True, publisher=publisher) as block:
            block.enqueue_event(0, "x", id=signalled[-1])
        assert block.report is not None
        assert block.report.published
        slowest.append(time.monotonic() - begin)

    slowest: list[float] = []
    done: list[str] = []
    with on_alarm(announce) as alarm:
        while len(signalled) < INTERRUPTIONS:
            done.append(str(len(done)))
            alarm(draw.uniform(0.00001, 0.001))
            publish(publisher, done[-1], how)
            alarm(0)
    assert max(slowest) < 3  # none waited for its own timeout
    arrived = [message.id for message in inspector.all(queue)]
    assert sorted(arrived) == sorted(done + signalled)


@pytest.mark.slow
def test_a_finalizer_may_publish_while_it_interrupts_a_publisher(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    closed: list[str] = []

    class Handle:
        def __init__(self) -> None:
            self.itself = self  # a cycle, which only the garbage collector frees

        def __del__(self) -> None:
            closed.append(f"closed-{len(closed)}")
            publish_one(closed[-1])

    def publish_one(event_id: str) -> None:
        event = Event(id=event_id, target="x", exchange=name, body=b"0")
        publisher.submit([event])

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(300):
            Handle()
            publish(publisher, str(number), "block")
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert publisher.drain(10)
    arrived = [message.id for message in inspector.all(queue)]
    assert len(closed) == 300
    assert set(arrived) == {str(number) for number in range(300)} | set(closed)


def test_a_log_handler_that_publishes_each_line_is_not_called_for_its_own_events(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[str] = []

    class Publishing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if len(lines) < 100:
                with auto_publishing(independent=True, publisher=publishers[0]) as block:
                    block.enqueue_event({"line": lines[-1]}, "log")

    publishers = [Publisher("amqp://127.0.0.1:9", timeout=0.2, drain_timeout=0)]
    handler = Publishing()
    logger = logging.getLogger("outbox")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        publish(publishers[0], "one", "block")
        time.sleep(1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        publishers[0].close()
    assert len(lines) < 15, lines


def test_a_thread_that_starts_while_its_caller_is_interrupted_works(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    draw = random.Random(1)
    names = set()
    with on_alarm(give_up) as alarm:
        for number in range(40):
            with Publisher(amqp_url, exchange=name) as publisher:
                with contextlib.suppress(TimeLimit):
                    try:
                        alarm(draw.uniform(0.00001, 0.002))
                        publish(publisher, f"first-{number}", "publish")
                    finally:
                        alarm(0)
                publish(publisher, str(number), "publish")
                names.add(str(number))
    arrived = {message.id for message in inspector.all(queue)}
    assert names <= arrived
    assert not [each for each in threading.enumerate() if each.name == "outbox-publisher"]
