"""The order in which a worker starts its messages, without a broker."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from outbox.consumers.worker import dispatch_queue
from outbox.consumers.worker.dispatch_queue import (
    OrderedDispatchQueue,
    PlainDispatchQueue,
    make_dispatch_queue,
)
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
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def out() -> Counter[str]:
    return Counter()


def ordered(clock: Clock, out: Counter[str], *specs: QueueSpec) -> OrderedDispatchQueue:
    """Return arrivals whose first message came a while ago."""
    found = OrderedDispatchQueue(specs, out.__getitem__, 10, clock=clock)
    found.put(message(specs[0].name))
    found.get()
    clock.now += 10
    return found


def begins(found: OrderedDispatchQueue) -> bool:
    """Return whether the first waiting message may start now."""
    return found._wait_for_better(found._waiting[0][0]) <= 0


def test_without_ranks_or_priorities_messages_start_in_order_of_arrival() -> None:
    same = [HIGH, QueueSpec("other", (), "")]
    arrivals = make_dispatch_queue(same, lambda name: 0, 10)
    assert isinstance(arrivals, PlainDispatchQueue)
    first, second = message("high", 1), message("other", 2)
    arrivals.put(first)
    arrivals.put(second)
    assert arrivals.waiting() == [first, second]
    assert [arrivals.get(), arrivals.get()] == [first, second]
    assert isinstance(make_dispatch_queue([HIGH, LOW], lambda name: 0, 10), OrderedDispatchQueue)
    assert isinstance(make_dispatch_queue([URGENT], lambda name: 0, 10), OrderedDispatchQueue)


def test_a_message_put_ahead_starts_before_others_in_any_queue(
    clock: Clock, out: Counter[str]
) -> None:
    for arrivals in (PlainDispatchQueue(), ordered(clock, out, HIGH, LOW)):
        new, again = [message("high", tag) for tag in (1, 2)], message("high", 3)
        arrivals.put(new[0])
        arrivals.put(new[1])
        arrivals.put_ahead(again)
        assert sorted(arrivals.waiting(), key=lambda each: each.tag) == new
        assert [arrivals.get() for _ in range(3)] == [again, *new]


def test_a_look_at_what_waits_changes_no_order() -> None:
    arrivals = PlainDispatchQueue()
    sent = [message("high", tag) for tag in range(4)]
    for delivery in sent[:2]:
        arrivals.put(delivery)
    assert arrivals.waiting() == sent[:2]
    arrivals.put(sent[2])
    arrivals.put_ahead(sent[3])
    assert arrivals.waiting() == sent[:3]
    arrivals.put(None)
    assert [arrivals.get() for _ in range(5)] == [sent[3], *sent[:3], None]


def test_threads_that_race_for_messages_get_each_once() -> None:
    arrivals = PlainDispatchQueue()
    taken: list[list[Delivery]] = [[] for _ in range(4)]

    def take(mine: list[Delivery]) -> None:
        while (delivery := arrivals.get()) is not None:
            mine.append(delivery)

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    sent = [message("high", tag) for tag in range(20_000)]
    for delivery in sent:
        (arrivals.put if delivery.tag % 3 else arrivals.put_ahead)(delivery)
        if not delivery.tag % 100:
            arrivals.waiting()
    for _ in threads:
        arrivals.put(None)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(delivery.tag for mine in taken for delivery in mine) == list(range(20_000))


def test_the_lower_rank_starts_first_and_each_queue_keeps_its_order(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    for name, tag in (("low", 1), ("high", 2), ("low", 3), ("high", 4)):
        found.put(message(name, tag))
    got = [found.get() for _ in range(4)]
    assert [one.tag for one in got if one is not None] == [2, 4, 1, 3]


def test_the_higher_priority_starts_first_and_priorities_are_capped(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, URGENT)
    for tag, priority in enumerate((None, 3, 9, 200, 0)):
        found.put(message("urgent", tag, priority=priority))
    got = [found.get() for _ in range(5)]
    assert [one.tag for one in got if one is not None] == [2, 3, 1, 0, 4]


def test_no_message_starts_while_the_window_of_a_preferred_queue_is_full_or_just_was(
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


def test_a_window_that_was_full_when_a_message_arrived_is_remembered(
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


def test_a_window_that_was_full_until_its_messages_were_settled_is_remembered(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    out["high"] = 5
    found.put(message("high"))
    clock.now += 10
    assert found.get() is not None
    clock.now += 10
    out["high"] = 0
    found.put(message("low"))
    assert not begins(found)
    clock.now += dispatch_queue._ON_ITS_WAY + 0.001
    assert begins(found)


def test_a_preferred_queue_with_occasional_messages_holds_up_no_others(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    out["high"] = 1
    found.put(message("high"))
    assert found.get() is not None
    found.put(message("low"))
    assert begins(found)


def test_after_a_reconnect_preferred_queues_get_a_moment_to_deliver(
    clock: Clock, out: Counter[str]
) -> None:
    found = ordered(clock, out, HIGH, LOW)
    found.put(message("low", generation=2))
    assert not begins(found)
    clock.now += dispatch_queue._ON_ITS_WAY + 0.001
    found.put(message("low", generation=2))
    assert begins(found)


def test_a_thread_waiting_for_a_preferred_queue_gets_its_message_and_another_takes_the_rest() -> (
    None
):
    out: Counter[str] = Counter()
    found = OrderedDispatchQueue([HIGH, LOW], out.__getitem__, 10)
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


def test_a_stopped_thread_ends_even_if_messages_are_waiting() -> None:
    out = Counter(high=10)
    found = OrderedDispatchQueue([HIGH, LOW], out.__getitem__, 10)
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
