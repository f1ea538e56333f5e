"""What a worker counts, while it runs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from outbox import enqueue_event
from outbox.consumers import (
    REJECT,
    REQUEUE,
    Consumer,
    ReceivedEvent,
    RetryPolicy,
)
from outbox.consumers.message.tally import ThreadTally
from outbox.consumers.outcome import Outcome
from outbox.messages.delivery import Delivery
from outbox.telemetry import metrics
from tests.places import Place, events_for, made, working
from tests.waiting import wait_until


class Obedient(Consumer):
    """Does what its messages say."""

    retry = RetryPolicy(max_attempts=2, delay=0.05)

    def process(self, event: ReceivedEvent) -> Any:
        match event.payload["n"]:
            case 1:
                raise ValueError("as asked")
            case 2:
                return REJECT
            case 3 if not event.redelivered:
                return REQUEUE
        return None


def test_a_worker_counts_how_its_messages_end(place: Place, name: str) -> None:
    class Named(Obedient):
        queue = made(place, name)

    with place.publisher(unroutable="fail") as publisher:
        publisher.publish(events_for(publisher, [name] * 5))
        with working(publisher, Named) as worker:
            wait_until(lambda: worker.stats().ended >= 7)
            stats = worker.stats()
        assert stats.is_consuming
        text = metrics.render(metrics.snapshot())
    [ours] = stats.queues
    assert (ours.queue, ours.consumer) == (name, "Named")
    assert {outcome: number for outcome, number in ours.outcomes.items() if number} == {
        "acked": 3,
        "retried": 1,
        "dead": 1,
        "rejected": 1,
        "requeued": 1,
    }
    assert ours.duration.count == 7
    assert ours.wait.count == 5
    assert 0 <= ours.wait.total < 60
    assert worker.stats().in_flight == 0
    assert f'outbox_messages_total{{queue="{name}",consumer="Named",outcome="acked"}} 3' in text


def test_a_worker_shows_what_it_works_on(place: Place, name: str) -> None:
    go_on = threading.Event()

    class Waiting(Consumer):
        queue = made(place, name)

        def process(self, event: ReceivedEvent) -> None:
            go_on.wait(20)

    with place.publisher(unroutable="fail") as publisher:
        publisher.publish(events_for(publisher, [name] * 3))
        with working(publisher, Waiting) as worker:
            try:
                wait_until(lambda: worker.stats().in_flight == 2)
            finally:
                go_on.set()
            wait_until(lambda: worker.stats().ended == 3)
            wait_until(lambda: worker.stats().in_flight == 0)


def test_each_thread_counts_for_itself(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[tuple[threading.Thread, threading.Thread]] = []
    count = ThreadTally.ended

    def ended(tally: ThreadTally, delivery: Delivery, outcome: Outcome, began: float) -> None:
        threads.append((tally.thread, threading.current_thread()))
        count(tally, delivery, outcome, began)

    class Publishing(Consumer):  # which ends on the thread that gets the confirms
        queue = made(place, name)
        auto_publish = True
        timeout = 0.5
        retry = RetryPolicy(max_attempts=1)

        def process(self, event: ReceivedEvent) -> None:
            if event.payload["n"] == 0:
                time.sleep(1)
            enqueue_event({"n": 0}, f"{name}.async", exchange="")

    class Asynchronous(Consumer):
        queue = made(place, f"{name}.async")

        async def process(self, event: ReceivedEvent) -> None:
            pass

    monkeypatch.setattr(ThreadTally, "ended", ended)
    with place.publisher(unroutable="fail") as publisher:
        publisher.publish(events_for(publisher, [name] * 6))
        with working(publisher, Publishing, Asynchronous) as worker:
            wait_until(lambda: worker.stats().ended == 11)
            late, other = worker.stats().queues
    assert (late.outcomes["acked"], late.outcomes["dead"]) == (5, 1)
    assert other.outcomes["acked"] == 5
    assert all(own is current for own, current in threads)
    assert len({current for _, current in threads}) > 2


@pytest.mark.one_python
def test_counting_costs_a_message_at_most_two_calls(place: Place, name: str) -> None:
    calls: Counter[str] = Counter()
    messages = 200

    def profile(frame: FrameType, what: str, _: object) -> None:
        if what == "call":
            calls[frame.f_code.co_filename.rpartition("/")[2]] += 1

    class Counted(Consumer):
        queue = made(place, name)

        def process(self, event: ReceivedEvent) -> None:
            pass

    with place.publisher(unroutable="fail") as publisher:
        publisher.publish(events_for(publisher, [name] * messages))
        threading.setprofile(profile)
        try:
            with working(publisher, Counted) as worker:
                threading.setprofile(None)
                wait_until(lambda: worker.stats().ended >= messages)
        finally:
            threading.setprofile(None)
    counting = sum(calls[file] for file in ("tally.py", "sources.py", "histogram.py"))
    assert calls["message.py"] > messages  # the profile has seen the messages
    assert messages <= counting <= 2 * messages
