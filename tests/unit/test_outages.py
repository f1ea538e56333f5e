"""Which failures of a broker are logged, without a broker."""

from __future__ import annotations

import pytest

from outbox.transports.outages import Outages

BROKER = (("a", 1), ("b", 2))
REFUSED = "cannot connect to a:1: [Errno 111] Connection refused"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Link:
    kept = 0

    def __call__(self) -> int:
        return self.kept


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outages(clock: Clock) -> Outages:
    return Outages(clock=clock)


def test_an_outage_is_reported_when_it_begins_and_then_every_minute(
    outages: Outages, clock: Clock
) -> None:
    link = Link()
    said = []
    for _ in range(14):
        if text := outages.failed(BROKER, "a:1", REFUSED, link, link):
            said.append(text)
        clock.now += 10
        link.kept += 1
    assert said == [
        REFUSED,
        f"{REFUSED}; down for 60 s, 6 event(s) kept",
        f"{REFUSED}; down for 120 s, 12 event(s) kept",
    ]
    assert outages.ended(BROKER) == 140
    assert outages.ended(BROKER) == 0
    assert outages.failed(BROKER, "a:1", REFUSED, link, link) == REFUSED


def test_another_reason_is_reported_at_once_but_not_another_number(
    outages: Outages, clock: Clock
) -> None:
    link = Link()
    silent = "a:1 has confirmed nothing for {} s"
    assert outages.failed(BROKER, "a:1", silent.format(30.1), link, link)
    clock.now += 2
    assert not outages.failed(BROKER, "a:1", silent.format(30.2), link, link)
    password = "cannot connect to a:1: the broker refused the user or the password"
    text = outages.failed(BROKER, "a:1", password, link, link)
    assert text == f"{password}; down for 2 s, 0 event(s) kept"
    assert outages.failed(BROKER, "b:2", password, link, link)  # another host of the broker
    assert not outages.failed(BROKER, "a:1", password, link, link)


def test_several_links_to_one_broker_share_its_outage(outages: Outages, clock: Clock) -> None:
    publisher, consumer = Link(), Link()
    publisher.kept = 3
    assert outages.failed(BROKER, "a:1", REFUSED, publisher, publisher)
    assert not outages.failed(BROKER, "a:1", REFUSED, consumer, consumer)
    clock.now += 61
    assert "3 event(s)" in outages.failed(BROKER, "a:1", REFUSED, consumer, consumer)
    outages.left(BROKER, publisher)
    assert not outages.failed(BROKER, "a:1", REFUSED, consumer, consumer)
    outages.left(BROKER, consumer)
    assert outages.failed(BROKER, "a:1", REFUSED, consumer, consumer) == REFUSED


def test_a_link_whose_user_keeps_no_events_says_nothing_of_them(
    outages: Outages, clock: Clock
) -> None:
    relay = Link()
    assert outages.failed("a database", "", REFUSED, relay, None) == REFUSED
    clock.now += 60
    text = outages.failed("a database", "", REFUSED, relay, None)
    assert text == f"{REFUSED}; down for 60 s"
