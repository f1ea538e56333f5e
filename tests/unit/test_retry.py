"""Retry policies, as plain objects."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from outbox import UsageError
from outbox.consumers import Retry, RetryPolicy, exponential


def test_delays_grow_up_to_the_maximum() -> None:
    delay = exponential(1, factor=2, max=10, jitter=False)
    assert [delay(attempts) for attempts in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert delay(100_000) == 10


def test_with_jitter_a_delay_is_between_half_and_all_of_its_length() -> None:
    delay = exponential(8, factor=1)
    found = [delay(1) for _ in range(500)]
    assert 4 <= min(found) < 4.5
    assert 7.5 < max(found) <= 8


def test_the_last_attempt_is_not_followed_by_another() -> None:
    policy = RetryPolicy(max_attempts=3, delay=2)
    assert policy.delay_after(ValueError(), 1) == 2
    assert policy.delay_after(ValueError(), 2) == 2
    assert policy.delay_after(ValueError(), 3) is None
    assert policy.delay_after(Retry(), 3) is None
    assert policy.delay_after(ValueError(), 7) is None


def test_retried_exceptions_are_configurable() -> None:
    policy = RetryPolicy(on=(OSError,), give_up_on=(FileNotFoundError,), delay=1)
    assert policy.delay_after(ConnectionError(), 1) == 1
    assert policy.delay_after(FileNotFoundError(), 1) is None
    assert policy.delay_after(ValueError(), 1) is None
    assert policy.delay_after(SystemExit(), 1) is None


def test_an_explicit_retry_is_done_whatever_the_policy_retries() -> None:
    policy = RetryPolicy(on=(), delay=datetime.timedelta(minutes=1))
    assert policy.delay_after(Retry(), 1) == 60
    assert policy.delay_after(Retry(delay=5), 1) == 5
    assert policy.delay_after(Retry("soon", delay=datetime.timedelta(0)), 1) == 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: RetryPolicy(max_attempts=0), "max_attempts is 0"),
        (lambda: RetryPolicy(max_attempts=True), "max_attempts is True"),
        (lambda: RetryPolicy(delay=-1), "the delay -1 is not between"),
        (lambda: RetryPolicy(delay=float("nan")), "the delay nan"),
        (lambda: RetryPolicy(delay="1"), "the delay '1' is neither"),  # type: ignore[arg-type]
        (lambda: RetryPolicy(on=(1,)), "on has 1"),  # type: ignore[arg-type]
        (lambda: RetryPolicy(give_up_on=("x",)), "give_up_on has 'x'"),  # type: ignore[arg-type]
        (lambda: RetryPolicy(give_up_on=None), "give_up_on has None"),  # type: ignore[arg-type]
        (lambda: Retry(delay=-1), "the delay -1"),
        (lambda: exponential(0), "first is 0"),
        (lambda: exponential(1, factor=0.5), "factor is 0.5"),
        (lambda: exponential(5, max=4), "max is 4"),
    ],
)
def test_numbers_out_of_bounds_are_refused(make: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        make()


def test_a_single_exception_needs_no_tuple() -> None:
    assert RetryPolicy(on=OSError).on == (OSError,)  # type: ignore[arg-type]


def test_a_handler_that_exits_is_retried_like_one_that_raises() -> None:
    assert RetryPolicy(delay=2).delay_after(SystemExit(1), 1) == 2
