"""What a worker counts of its messages."""

from __future__ import annotations

import math
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from outbox.consumers.message.tally import OUTCOMES, Tally, _Times
from outbox.consumers.outcome import (
    ACK,
    DUPLICATE,
    EXPIRED,
    REJECT,
    REQUEUE,
    Again,
    Dead,
    Outcome,
    ProcessTimeout,
    Reject,
    RemoteError,
    Return,
)
from outbox.messages.delivery import Delivery, restore_delayed
from outbox.messages.headers import ATTEMPT, DELAY_EXCHANGE, DELAY_UNTIL, HEADER_OCCURRED_AT
from outbox.telemetry.histogram import BOUNDS

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def delivery(headers: dict[str, Any] | None = None, *, redelivered: bool = False) -> Delivery:
    found = Delivery("q", 1, 1, redelivered, "", "q", b"{}", headers=headers or {})
    restore_delayed(found)
    found.read_times()  # as decoding does
    return found


def occurred(seconds_ago: float) -> dict[str, Any]:
    return {HEADER_OCCURRED_AT: round((time.time() - seconds_ago) * 1e6)}


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (ACK, "acked"),
        (DUPLICATE, "duplicate"),
        (EXPIRED, "expired"),
        (Again(1.0, ValueError(), 1, NOW), "retried"),
        (Again(1.0, ProcessTimeout(), 1, NOW), "timed_out"),
        (REQUEUE, "requeued"),
        (Return(0.0), "returned"),
        (REJECT, "rejected"),
        (Dead("no", Reject("no")), "rejected"),
        (Dead("no", ExceptionGroup("", [Reject()]), decisive=Reject()), "rejected"),
        (Dead("no", RemoteError("Reject", "...")), "rejected"),
        (Dead("no", RemoteError("ValueError", "...")), "dead"),
        (Dead("ValueError: no", ValueError("no")), "dead"),
        (Dead("lost with its process 3 times"), "dead"),
    ],
)
def test_each_message_counts_as_one_outcome(outcome: Outcome, name: str) -> None:
    tally = Tally({"q": "Consumer"})
    tally.of_thread().ended(delivery(), outcome, time.perf_counter())
    [ended] = tally.read().values()
    assert {each: number for each, number in ended.outcomes.items() if number} == {name: 1}
    assert set(ended.outcomes) == set(OUTCOMES)


def test_a_message_that_is_left_counts_as_returned() -> None:
    tally = Tally({"q": "Consumer"})
    tally.of_thread().returned(delivery(), time.perf_counter())
    assert tally.read()["q"].outcomes["returned"] == 1


def test_durations_are_sorted_into_buckets() -> None:
    tally = Tally({"q": "Consumer"})
    for seconds in (0.001, 0.02, 40.0, 1000.0):
        tally.of_thread().ended(delivery(), ACK, time.perf_counter() - seconds)
    durations = tally.read()["q"].durations
    assert durations.count == 4
    assert durations.total == pytest.approx(1040.021, abs=1)
    assert [bound for bound, n in zip((*BOUNDS, "more"), durations.buckets, strict=True) if n] == [
        0.005,
        0.025,
        60.0,
        "more",
    ]


def test_the_wait_is_that_of_the_first_begin() -> None:
    tally = Tally({"q": "Consumer"})
    tally.of_thread().ended(delivery(occurred(20)), ACK, time.perf_counter() - 5)
    tally.of_thread().ended(delivery(occurred(20) | {ATTEMPT: 2}), ACK, time.perf_counter())
    tally.of_thread().ended(delivery(occurred(20), redelivered=True), ACK, time.perf_counter())
    from_another_client = delivery()  # it says nothing
    tally.of_thread().ended(from_another_client, ACK, time.perf_counter())
    waits = tally.read()["q"].waits
    assert waits.count == 1
    assert waits.total == pytest.approx(15, abs=1)


def test_the_wait_of_a_delayed_event_begins_when_it_was_due() -> None:
    tally = Tally({"q": "Consumer"})
    delayed = {DELAY_EXCHANGE: "", DELAY_UNTIL: round((time.time() - 2) * 1e6)}
    for headers in ({**occurred(7), **delayed}, {**occurred(7), **delayed, ATTEMPT: 2}):
        tally.of_thread().ended(delivery(headers), ACK, time.perf_counter())
    waits = tally.read()["q"].waits
    assert waits.count == 1
    assert waits.total == pytest.approx(2, abs=0.5)


def test_a_message_that_was_not_decoded_has_waited_too() -> None:
    tally = Tally({"q": "Consumer"})
    undecoded = Delivery("q", 1, 1, False, "", "q", b"{}", headers=occurred(3))
    tally.of_thread().ended(undecoded, EXPIRED, time.perf_counter())
    assert tally.read()["q"].waits.total == pytest.approx(3, abs=0.5)


def test_an_event_from_a_clock_ahead_has_not_waited() -> None:
    tally = Tally({"q": "Consumer"})
    tally.of_thread().ended(delivery(occurred(-3600)), ACK, time.perf_counter())
    assert tally.read()["q"].waits.total == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_no_clock_shows_counts_no_wait(value: float) -> None:
    tally = Tally({"q": "Consumer"})
    for headers in (occurred(3), {HEADER_OCCURRED_AT: value}, occurred(1)):
        tally.of_thread().ended(delivery(headers), ACK, time.perf_counter())
    waits = tally.read()["q"].waits
    assert waits.count == 2
    assert waits.total == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("value", [None, "text", [1], 10**400])
def test_another_clients_header_counts_no_wait(value: Any) -> None:
    tally = Tally({"q": "Consumer"})
    tally.of_thread().ended(delivery({HEADER_OCCURRED_AT: value}), ACK, time.perf_counter())
    assert tally.read()["q"].waits.count == 0
    assert tally.read()["q"].outcomes["acked"] == 1


def run(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_counts_of_threads_add_up_while_another_one_reads() -> None:
    tally = Tally({"q": "Consumer"})

    def count() -> None:
        for _ in range(2000):
            tally.of_thread().ended(delivery(), ACK, time.perf_counter())

    def read() -> None:
        for _ in range(200):
            tally.read()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run(*[count] * 8, read)
    finally:
        sys.setswitchinterval(interval)
    assert tally.read()["q"].outcomes["acked"] == 16_000
    assert tally.read()["q"].durations.count == 16_000  # and again: nothing is counted twice


def test_what_falls_on_a_bound_or_changes_buckets_is_counted_as_bisect_would() -> None:
    numbers = [*BOUNDS, 0.0, *(bound * 1.001 for bound in BOUNDS), *BOUNDS[::-1], 0.02, 0.02, 1e9]
    times = _Times()
    for number in numbers:
        if times.above < number <= times.up_to:
            times.count += 1
            times.total += number
        else:
            times.add(number)
        assert times.above <= number <= times.up_to
    expected = Counter(bisect_left(BOUNDS, number) for number in numbers)
    found = times.read()
    assert found.buckets == tuple(expected[index] for index in range(len(BOUNDS) + 1))
    assert found.total == pytest.approx(sum(numbers))


def test_counts_of_ended_threads_stay_without_their_cells() -> None:
    tally = Tally({"q": "Consumer"})
    for _ in range(20):
        run(lambda: tally.of_thread().ended(delivery(occurred(1)), ACK, time.perf_counter()))
    assert len(tally._living) == 1
    ended = tally.read()["q"]
    assert not tally._living
    assert (ended.outcomes["acked"], ended.waits.count) == (20, 20)
    assert ended.waits.total == pytest.approx(20, abs=5)


def test_queues_are_counted_apart_also_those_without_a_consumer() -> None:
    tally = Tally({"q": "Consumer"})
    other = Delivery("other", 1, 1, False, "", "other", b"{}")
    tally.of_thread().ended(other, ACK, time.perf_counter())
    tally.of_thread().returned(other, time.perf_counter())
    ended = tally.read()
    assert ended["q"].durations.count == 0
    assert (ended["other"].outcomes["acked"], ended["other"].outcomes["returned"]) == (1, 1)
