"""Dead letters of messages from other clients."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pytest

from outbox.consumers.message.copies import dead_letter
from outbox.consumers.outcome import Dead
from outbox.header_values import MAX_HEADER_BYTES, plain_table
from outbox.messages.delivery import Delivery
from outbox.transports.rabbitmq.amqp.encoder import Encoder


def delivery(headers: dict[Any, Any], **options: Any) -> Delivery:
    return Delivery("q", 1, 1, False, "e", "t", b"{}", headers=headers, **options)


@pytest.mark.parametrize(
    "value",
    [
        decimal.Decimal("1.5"),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        1 << 64,
        -(1 << 70),
        0.5,
        "lone \ud800 surrogate",
        [decimal.Decimal(1), {"a": [datetime.datetime(2026, 1, 2)]}],
        {b"\xff": 1, "a": {b"\xff": 2}},
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_headers_of_a_sender_can_be_written_again(value: Any) -> None:
    letter = dead_letter(delivery({"odd": value, b"\xff": 1}), Dead("why"))
    assert Encoder().encode(letter)
    assert "odd" in letter.headers


def test_a_reason_that_is_not_text_can_still_be_written() -> None:
    letter = dead_letter(delivery({}), Dead("\udc80" * 5_000, ValueError("\udc80")))
    assert Encoder().encode(letter)
    assert len(letter.headers["outbox-dead-reason"]) == 2_000


def test_headers_that_leave_no_room_for_the_reason_are_left_out() -> None:
    big = {f"h{n}": "x" * 1_000 for n in range(129)}
    letter = dead_letter(delivery(big), Dead("why"))
    assert letter.headers["outbox-dead-reason"] == "why"
    assert "dropped" in letter.headers["outbox-dead-headers"]
    assert plain_table(letter.headers, "headers")[1] < MAX_HEADER_BYTES
    assert "h1" in dead_letter(delivery(dict(list(big.items())[:100])), Dead("why")).headers


def test_headers_that_the_broker_acts_on_are_not_sent_back_to_it() -> None:
    headers = {"CC": ["a"], "BCC": ["b"], "x-death": [], "x-delivery-count": 3, "mine": 1}
    letter = dead_letter(delivery(headers), Dead("why"))
    assert letter.headers["mine"] == 1
    assert not {"CC", "BCC", "x-death", "x-delivery-count"} & set(letter.headers)


@pytest.mark.parametrize(
    ("headers", "timestamp"),
    [({"outbox-occurred-at-us": 1_700_000_000_000_000}, 5), ({}, 1_700_000_000)],
)
def test_a_dead_letter_says_when_its_event_occurred(
    headers: dict[Any, Any], timestamp: int
) -> None:
    letter = dead_letter(delivery(headers, timestamp=timestamp), Dead("why"))
    assert letter.occurred_at == datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC)


@pytest.mark.parametrize("microseconds", [-1, -(1 << 62), 1 << 62])
def test_an_impossible_time_is_not_passed_on(microseconds: int) -> None:
    letter = dead_letter(delivery({"outbox-occurred-at-us": microseconds}), Dead("why"))
    assert abs(letter.occurred_at - datetime.datetime.now(datetime.UTC)).total_seconds() < 60
    assert Encoder().encode(letter)


@pytest.mark.hazard("H9")
def test_an_exception_whose_traceback_cannot_be_formatted_still_leaves_a_dead_letter() -> None:
    class Unsound(Exception):
        def __getattribute__(self, name: str) -> Any:
            raise ValueError("none")

    headers = dead_letter(delivery({}), Dead("why", Unsound())).headers
    assert headers["outbox-dead-traceback"] == "(traceback unavailable: ValueError)"
