"""The number of files that a reader has to open to follow an event, or a message, to its end.

Counted while the program runs, once everything is warm: what happens once, at the first event, is
not part of every trip.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import outbox
from outbox.consumers import Consumer, ReceivedEvent, Worker
from tests.amqp import Inspector, properties_of
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

ROOT = Path(outbox.__file__).parent
MOST_FOR_AN_EVENT = 16
MOST_FOR_A_MESSAGE = 23


class Trip:
    """The files of outbox that any thread started under ``watched`` enters between two calls."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()
        self.is_recording = False

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        if self.is_recording:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not frame.f_code.co_name.startswith("<"):
                self.files.add(str(path.relative_to(ROOT)))
                self.functions.add((str(path.relative_to(ROOT)), frame.f_code.co_qualname))

    def record(self, function: Callable[[], object]) -> None:
        self.is_recording = True
        function()
        self.is_recording = False

    def check(self, most: int) -> None:
        if len(self.files) > most:
            listed = "\n  ".join(sorted(self.files))
            pytest.fail(f"{len(self.files)} files instead of {most}:\n  {listed}", pytrace=False)


@contextmanager
def watched() -> Iterator[Trip]:
    trip = Trip()
    before = sys.gettrace(), threading.gettrace()
    threading.settrace(trip.trace)
    sys.settrace(trip.trace)
    try:
        yield trip
    finally:
        sys.settrace(before[0])
        threading.settrace(before[1])


def test_an_event_passes_few_files_until_it_is_confirmed(
    amqp_url: str, name: str, inspector: Inspector
) -> None:
    inspector.queue(name, name)

    def trip_of_one() -> None:
        outbox.enqueue_event({"n": 1}, "order.placed")
        assert outbox.publish().published

    with watched() as trip:
        outbox.configure(amqp_url, exchange=name)
        with outbox.auto_publishing():
            for _ in range(3):
                trip_of_one()
            time.sleep(0.2)  # whatever the first ones have left to do
            trip.record(trip_of_one)
    trip.check(MOST_FOR_AN_EVENT)


def test_a_message_passes_few_files_until_it_is_acked(
    amqp_url: str, name: str, inspector: Inspector
) -> None:
    class Orders(Consumer):
        queue = name
        topics = ("order.placed",)
        done = 0

        def process(self, event: ReceivedEvent) -> None:
            type(self).done += 1

    inspector.clean_up(queue=name)
    with watched() as trip, outbox.Publisher(amqp_url, exchange=name) as publisher:
        worker = Worker([Orders], publisher=publisher, threads=1)
        worker.start()

        def trip_of_one() -> None:
            before = Orders.done
            inspector.publish("order.placed", b"{}", name, properties_of(message_id=str(before)))
            wait_until(lambda: Orders.done > before)
            time.sleep(0.5)  # until it is acked: a single ack waits for others, but not for long

        wait_until(lambda: worker.is_consuming)
        for _ in range(3):
            trip_of_one()
        trip.record(trip_of_one)
        assert worker.stop(5)
    trip.check(MOST_FOR_A_MESSAGE)
