"""Writing and reading delays over RabbitMQ, without a broker."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Event
from outbox.messages.delivery import as_delivered, restore_delayed
from outbox.transports.rabbitmq.delay_ladder import (
    LEVELS,
    LONGEST_DELAY,
    Ladder,
    Part,
    delayed,
    levels_of,
    seconds_left,
    steps_of,
    way_of,
    way_to_queue,
)

NOW = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
LONGEST = (1 << LEVELS) - 1
EVENT = Event(id="1", target="order.placed", exchange="shop", body=b"1", deliver_at=NOW)


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(-5, 0), (0, 0), (0.000001, 1), (0.5, 1), (1, 1), (1.000001, 2), (86_400.5, 86_401)],
)
def test_the_remaining_time_is_rounded_up_to_whole_seconds(seconds: float, left: int) -> None:
    assert seconds_left(NOW + datetime.timedelta(seconds=seconds), NOW) == left


@pytest.mark.hazard("C12")
@given(st.integers(1, LONGEST))
def test_the_levels_at_which_an_event_waits_add_up_to_its_delay(seconds: int) -> None:
    levels = levels_of(seconds)
    assert sum(1 << number for number in levels) == seconds
    assert levels == sorted(set(levels), reverse=True)
    written = delayed(EVENT, seconds)
    assert written.exchange == f"outbox.delay.{levels[0]:02}"
    said = {name: value for name, value in written.headers.items() if name[-1].isdigit()}
    assert said == {
        f"outbox-delay-{number:02}": number in levels for number in range(levels[0] + 1)
    }


@pytest.mark.hazard("C7")
@given(st.integers(1, LONGEST), st.sampled_from(["", "shop", "ß" * 127]))
def test_a_delayed_event_is_delivered_as_if_it_had_not_been_delayed(
    seconds: int, exchange: str
) -> None:
    event = Event(
        id="1", target="a", exchange=exchange, body=b"1", headers={"mine": 1, "x-mine": 2}, key="k"
    )
    plain = as_delivered(event, "q", 1)
    found = as_delivered(delayed(event, seconds), "q", 1)
    found.exchange = "outbox.delay.due"
    found.headers = {
        **(found.headers or {}),
        "x-death": [{"queue": "outbox.delay.00"}],
        "x-first-death-queue": "outbox.delay.00",
        "x-last-death-reason": "expired",
    }
    restore_delayed(found)
    assert (found.exchange, found.target, found.headers) == (
        plain.exchange,
        plain.target,
        plain.headers,
    )


def test_the_brokers_record_of_other_deaths_is_left_alone() -> None:
    found = as_delivered(EVENT, "q", 1)
    found.headers = {"x-death": [{"queue": "q"}]}
    restore_delayed(found)
    assert found.headers == {"x-death": [{"queue": "q"}]}


def test_a_delay_of_nine_years_is_too_long_but_eight_are_allowed() -> None:
    year = datetime.timedelta(days=365)
    assert 8 * year < LONGEST_DELAY < 9 * year


def test_a_way_is_the_base_the_levels_upwards_the_queues_and_the_destination() -> None:
    assert way_of("shop", "order.placed", 5) == [
        Part("base"),
        Part("level", number=0),
        Part("level", number=1),
        Part("level", number=2),
        Part("queue", number=2),
        Part("queue", number=0),
        Part("to exchange", "shop"),
    ]
    assert way_of("", "invoices", 1)[-1] == Part("to queue", "invoices")


def test_a_part_is_declared_once_until_everything_is_forgotten() -> None:
    ladder = Ladder()
    way = way_of("shop", "a", 1)
    assert ladder.lacks(way) == way
    ladder.made(way[:2], 0.0)
    assert ladder.lacks(way) == way[2:]
    ladder.forget()
    assert ladder.lacks(way) == way


def test_once_a_minute_everything_but_the_destination_queues_is_checked() -> None:
    ladder = Ladder()
    ladder.made([*way_of("shop", "a", 1), *way_of("", "invoices", 1)], 100.0)
    assert ladder.parts_to_recheck(159.0) == []
    assert ladder.parts_to_recheck(160.0) == way_of("shop", "a", 1)
    assert ladder.parts_to_recheck(161.0) == []


def test_queues_named_by_user_data_do_not_pile_up() -> None:
    ladder = Ladder()
    for number in range(25_000):
        ladder.made([Part("to queue", str(number))], 0.0)
    assert len(ladder._there) <= 10_001
    assert ladder.lacks([Part("to queue", "24999")]) == []


def test_every_part_has_steps_that_declare_it() -> None:
    for part in (*way_of("shop", "a", LONGEST), Part("to queue", "a")):
        assert steps_of(part), part


@pytest.mark.parametrize("mode", ["passive", "never"])
def test_a_consumer_that_does_not_declare_does_not_bind_either(mode: object) -> None:
    assert way_to_queue("a", mode) == []  # type: ignore[arg-type]
