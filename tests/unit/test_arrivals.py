"""The order in which a worker begins what was delivered, without a broker."""

from __future__ import annotations

import queue
import threading
from collections import Counter

import pytest

from outbox.consumers.worker import dispatch_queue
from outbox.consumers.worker.dispatch_queue import OrderedArrivals, make_arrivals
from outbox.messages.delivery import Delivery, QueueSpec
from tests.waiting import wait_until

HIGH = QueueSpec("high", (), "")
LOW = QueueSpec("low", (), "", rank=1)
URGENT = QueueSpec("urgent", (), "", max_priority=9)


def message(
    queue: str, tag: int = 0, *, priority: int | None = None, generation: int = 1
) -> Delivery:
    return Delivery(queue, tag, generation, False, "", queue, b"", priority=priority)


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def out() -> Counter[str]:
    return Counter()


def ordered(clock: Clock, out: Counter[str], *specs: QueueSpec) -> OrderedArrivals:
    """Return an arrivals that has had its first message, a while ago."""
    found = OrderedArrivals(specs, out.__getitem__, 10, clock=clock)
    found.put(message(specs[0].name))
    found.get()
    clock.now += 10
    return found


def begins(found: OrderedArrivals) -> bool:
    """Return whether the first that waits may begin now."""
    return found._wait_for_better(found._waiting[0][0]) <= 0


def test_without_ranks_or_priorities_messages_begin_as_they_come() -> None:
    same = [HIGH, QueueSpec("other", (), "")]
    assert isinstance(make_arrivals(same, lambda name: 0, 10), queue.SimpleQueue)
    assert isinstance(make_arrivals([HIGH, LOW], lambda name: 0, 10), OrderedArrivals)
    assert isinstance(make_arrivals([URGENT], lambda name: 0, 10), OrderedArrivals)


def test_the_lower_rank_begins_first_and_within_a_queue_what_came_first(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    for name, tag in (("low", 1), ("high", 2), ("low", 3), ("high", 4)):
        found.put(message(name, tag))
    got = [found.get() for _ in range(4)]
    assert [one.tag for one in got if one is not None] == [2, 4, 1, 3]


def test_the_higher_priority_begins_first_and_none_counts_for_more_than_the_highest(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, URGENT)
    for tag, priority in enumerate((None, 3, 9, 200, 0)):
        found.put(message("urgent", tag, priority=priority))
    got = [found.get() for _ in range(5)]
    assert [one.tag for one in got if one is not None] == [2, 3, 1, 0, 4]


def test_while_the_window_of_a_queue_before_is_well_filled_and_a_moment_after_none_begins(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    found.put(message("low"))
    out["high"] = 5
    assert not begins(found)
    out["high"] = 4
    assert not begins(found)
    clock.now += dispatch_queue._ON_ITS_WAY + 0.001
    assert begins(found)
    out["high"] = 4
    assert begins(found)


def test_a_window_that_was_filled_when_a_message_came_is_remembered(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    out["high"] = 5
    found.put(message("high"))
    out["high"] = 0
    assert found.get() is not None
    found.put(message("low"))
    assert not begins(found)
    clock.now += dispatch_queue._ON_ITS_WAY + 0.001
    assert begins(found)


def test_a_queue_before_that_gets_a_message_now_and_then_holds_up_none(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    out["high"] = 1
    found.put(message("high"))
    assert found.get() is not None
    found.put(message("low"))
    assert begins(found)


def test_over_a_new_connection_the_queues_before_get_a_moment_to_deliver(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    found.put(message("low", generation=2))
    assert not begins(found)
    clock.now += dispatch_queue._ON_ITS_WAY + 0.001
    found.put(message("low", generation=2))
    assert begins(found)


def test_whoever_waits_for_better_gets_it_and_another_thread_takes_the_rest() -> None:
    out: Counter[str] = Counter()
    found = OrderedArrivals([HIGH, LOW], out.__getitem__, 10)
    got: list[str] = []

    def take() -> None:
        one = found.get()
        got.append(one.queue if one is not None else "")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    found.put(message("low"))
    found.put(message("high"))
    for thread in threads:
        thread.join(5)
    assert got == ["high", "low"]


def test_told_to_end_a_thread_ends_whatever_waits() -> None:
    out = Counter(high=10)
    found = OrderedArrivals([HIGH, LOW], out.__getitem__, 10)
    ended = threading.Event()

    def take() -> None:
        assert found.get() is None
        ended.set()

    thread = threading.Thread(target=take)
    thread.start()
    found.put(message("low"))
    wait_until(lambda: found._changed._waiters)  # type: ignore[attr-defined]
    found.put(None)
    assert ended.wait(5)
    thread.join(5)
