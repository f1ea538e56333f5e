"""What a delivery says of its past."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox.messages.delivery import Delivery
from outbox.messages.headers import ATTEMPT, HEADER_OCCURRED_AT


@pytest.mark.parametrize(
    ("redelivered", "headers", "returned"),
    [
        (False, None, 0),
        (False, {"x-delivery-count": 0}, 0),  # as RabbitMQ 3.10 sends it the first time
        (False, {"x-delivery-count": 7}, 0),  # from another client's copy: not of this queue
        (True, None, 1),  # a classic queue doesn't count
        (True, {"x-delivery-count": 3}, 3),
        (True, {"x-acquired-count": 4}, 0),  # RabbitMQ 4.3: nacked four times, which doesn't count
        (True, {"x-acquired-count": 4, "x-delivery-count": 2}, 2),
        (True, {"x-delivery-count": "many"}, 1),
        (True, {"x-delivery-count": True}, 1),
    ],
)
def test_returned_is_the_brokers_count(
    redelivered: bool, headers: dict[str, Any] | None, returned: int
) -> None:
    delivery = Delivery("q", 1, 1, redelivered, "", "q", b"", headers=headers)
    assert delivery.returned == returned


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LAST = 253_402_300_799_999_999  # of the year 9999


@given(st.integers(0, _LAST) | st.integers(0, 4_100_000_000_000_000))
@example(3_999_999_999_999_999)
@example(4_000_000_000_000_000)
def test_the_time_of_an_event_is_exact_to_the_microsecond(microseconds: int) -> None:
    found = Delivery("q", 1, 1, False, "", "q", b"", headers={HEADER_OCCURRED_AT: microseconds})
    assert found.occurred_at == _EPOCH + datetime.timedelta(microseconds=microseconds)
    assert found.since == pytest.approx(microseconds / 1e6, abs=1e-4)


@pytest.mark.parametrize("microseconds", [-1, _LAST + 1, 10**400, 1.5, "1", None])
def test_a_time_that_no_event_has_is_that_of_the_timestamp(microseconds: Any) -> None:
    headers = {HEADER_OCCURRED_AT: microseconds}
    found = Delivery("q", 1, 1, False, "", "q", b"", headers=headers, timestamp=60)
    assert found.occurred_at == _EPOCH + datetime.timedelta(seconds=60)
    assert found.since is None


@pytest.mark.parametrize(
    ("header", "attempt"),
    [(2, 2), (2**31 - 1, 2**31 - 1), (2**31, 1), (2**62, 1), (0, 1), (-1, 1), (True, 1), ("2", 1)],
)
def test_an_attempt_has_a_number_that_every_database_can_hold(header: Any, attempt: int) -> None:
    delivery = Delivery("q", 1, 1, False, "", "q", b"", headers={ATTEMPT: header})
    assert delivery.attempt == attempt


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00Z"])
def test_the_seconds_of_an_event_are_those_that_every_database_can_hold(time: str) -> None:
    attributes = {"specversion": "1.0", "source": "/", "type": "t", "id": "1", "time": time}
    headers = {f"cloudEvents:{name}": value for name, value in attributes.items()}
    seconds = [
        Delivery("q", 1, 1, False, "", "q", b"", headers=headers).occurred_seconds,
        Delivery(
            "q", 1, 1, False, "", "q", b"", headers={HEADER_OCCURRED_AT: _LAST}
        ).occurred_seconds,
    ]
    assert all(0 <= each < 253_402_300_799 - 86_400 for each in seconds)
