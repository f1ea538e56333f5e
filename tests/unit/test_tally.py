"""What a worker counts of its messages."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from outbox.consumers.message.tally import OUTCOMES, Tally
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
from outbox.messages.delivery import Delivery
from outbox.messages.headers import ATTEMPT, DELAY_EXCHANGE, HEADER_OCCURRED_AT
from outbox.telemetry.histogram import BOUNDS

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def delivery(headers: dict[str, Any] | None = None, *, redelivered: bool = False) -> Delivery:
    return Delivery("q", 1, 1, redelivered, "", "q", b"{}", headers=headers or {})


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
    tally.ended(delivery(), outcome, time.perf_counter())
    [ended] = tally.read().values()
    assert {each: number for each, number in ended.outcomes.items() if number} == {name: 1}
    assert set(ended.outcomes) == set(OUTCOMES)


def test_a_message_that_is_left_counts_as_returned() -> None:
    tally = Tally({"q": "Consumer"})
    tally.returned(delivery(), time.perf_counter())
    assert tally.read()["q"].outcomes["returned"] == 1


def test_durations_are_sorted_into_buckets() -> None:
    tally = Tally({"q": "Consumer"})
    for seconds in (0.001, 0.02, 40.0, 1000.0):
        tally.ended(delivery(), ACK, time.perf_counter() - seconds)
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
    tally.ended(delivery(occurred(20)), ACK, time.perf_counter() - 5)
    tally.ended(delivery(occurred(20) | {ATTEMPT: 2}), ACK, time.perf_counter())
    tally.ended(delivery(occurred(20), redelivered=True), ACK, time.perf_counter())
    tally.ended(delivery(), ACK, time.perf_counter())  # from another client: it says nothing
    waits = tally.read()["q"].waits
    assert waits.count == 1
    assert waits.total == pytest.approx(15, abs=1)


def test_the_wait_of_a_delayed_event_begins_when_it_was_due() -> None:
    tally = Tally({"q": "Consumer"})
    bits = {"outbox-delay-02": True, "outbox-delay-01": False, "outbox-delay-00": True}
    headers = {**occurred(7), DELAY_EXCHANGE: "", **bits}
    tally.ended(delivery(headers), ACK, time.perf_counter())
    assert tally.read()["q"].waits.total == pytest.approx(2, abs=0.5)


def test_an_event_from_a_clock_ahead_has_not_waited() -> None:
    tally = Tally({"q": "Consumer"})
    tally.ended(delivery(occurred(-3600)), ACK, time.perf_counter())
    assert tally.read()["q"].waits.total == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_no_clock_shows_counts_no_wait(value: float) -> None:
    tally = Tally({"q": "Consumer"})
    for headers in (occurred(3), {HEADER_OCCURRED_AT: value}, occurred(1)):
        tally.ended(delivery(headers), ACK, time.perf_counter())
    waits = tally.read()["q"].waits
    assert waits.count == 2
    assert waits.total == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("value", [None, "text", [1], 10**400])
def test_another_clients_header_counts_no_wait(value: Any) -> None:
    tally = Tally({"q": "Consumer"})
    tally.ended(delivery({HEADER_OCCURRED_AT: value}), ACK, time.perf_counter())
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
            tally.ended(delivery(), ACK, time.perf_counter())

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


def test_numbers_that_wait_to_be_sorted_are_few() -> None:
    tally = Tally({"q": "Consumer"})
    for outcome in (ACK, REQUEUE):
        for _ in range(3000):
            tally.ended(delivery(occurred(1)), outcome, time.perf_counter())
    durations, waits = tally._counts["q"].durations, tally._counts["q"].waits
    assert len(durations) < 1000
    assert len(waits) < 1000
    ended = tally.read()["q"]
    assert (ended.outcomes["acked"], ended.outcomes["requeued"]) == (3000, 3000)
    assert (ended.durations.count, ended.waits.count) == (6000, 6000)


def test_queues_are_counted_apart_also_those_without_a_consumer() -> None:
    tally = Tally({"q": "Consumer"})
    other = Delivery("other", 1, 1, False, "", "other", b"{}")
    tally.ended(other, ACK, time.perf_counter())
    tally.returned(other, time.perf_counter())
    ended = tally.read()
    assert ended["q"].durations.count == 0
    assert (ended["other"].outcomes["acked"], ended["other"].outcomes["returned"]) == (1, 1)
