"""Consumers: retries, dead letters, time limits, duplicates, sessions, coroutines, frozen time."""

from __future__ import annotations

import asyncio
import datetime
import time
import unittest
import uuid
from decimal import Decimal

import pytest

from examples.shop import warehouse
from examples.shop.consumers import Invoices
from examples.shop.orders import place_order
from examples.shop.warehouse import Parcels, Product, Reservations, tracking
from outbox import auto_publishing
from outbox.consumers import ProcessTimeout
from outbox.testing import CollectedEventsMixin

NUMBER = uuid.UUID("00000000-0000-4000-8000-000000000001")


class Carrier:
    """Stands in for the carrier, which is away for the first calls."""

    def __init__(self, away):
        self.away = away

    def book_parcel(self, order_id):
        if self.away:
            self.away -= 1
            raise ConnectionError("the carrier is away")
        return NUMBER, Decimal("5.20")


@pytest.fixture
def carrier(monkeypatch):
    carrier = Carrier(away=0)
    monkeypatch.setattr(warehouse, "book_parcel", carrier.book_parcel)
    return carrier


@pytest.mark.collected_events(strict=True)
def test_a_parcel_is_booked_at_the_second_attempt(collected_events, carrier):
    carrier.away = 1
    with auto_publishing():
        order_id = place_order("tea", "12.50")
    done = collected_events.deliver_all(Invoices, Parcels)
    assert [result.retried for result in done] == [False, True, False]
    collected_events.assert_published("order.placed", times=1)
    collected_events.assert_published("invoice.sent", {"order_id": order_id}, times=1)
    collected_events.assert_published(
        "parcel.booked", {"number": NUMBER, "postage": Decimal("5.20")}
    )


def test_a_parcel_that_cannot_be_booked_is_a_dead_letter(collected_events, carrier):
    carrier.away = 10
    collected_events.perform(Parcels, {"order_id": 17}, raise_errors=False)
    with pytest.raises(ConnectionError, match="the carrier is away"):
        collected_events.deliver_all(Parcels)
    assert carrier.away == 7
    [letter] = collected_events.dead_letters
    assert letter.payload == {"order_id": 17}
    collected_events.assert_nothing_published()


def test_a_carrier_that_takes_too_long_is_given_up(collected_events, monkeypatch):
    monkeypatch.setattr(Parcels, "timeout", 0.05)
    monkeypatch.setattr(warehouse, "book_parcel", lambda order_id: time.sleep(0.2))
    with pytest.raises(ProcessTimeout):
        collected_events.perform(Parcels, {"order_id": 17})
    collected_events.assert_not_published("parcel.booked")


def test_an_order_is_reserved_once(collected_events, session):
    session.add(Product(item="tea", left=5))
    session.flush()
    first = collected_events.perform(Reservations, {"item": "tea"})
    again = collected_events.perform(Reservations, {"item": "tea"}, id=first.event.id)
    assert again.duplicate
    assert session.get(Product, "tea").left == 4


def test_the_tests_own_data_outlive_a_handler_that_fails(collected_events, session):
    tea = Product(item="tea", left=5)
    session.add(tea)
    session.flush()
    done = collected_events.perform(Reservations, {"item": "yacht"}, raise_errors=False)
    assert done.outcome.reason == "there is no product 'yacht'"
    assert tea in session
    assert tea.left == 5


@pytest.mark.asyncio
async def test_a_parcel_is_followed_until_it_is_delivered(collected_events, monkeypatch):
    loop = asyncio.get_running_loop()

    async def wait_for_delivery(number):
        assert asyncio.get_running_loop() is loop

    monkeypatch.setattr(warehouse, "wait_for_delivery", wait_for_delivery)
    done = await collected_events.perform_async(tracking, {"number": NUMBER, "order_id": 17})
    assert [event.target for event in done.follow_ons] == ["parcel.delivered"]
    collected_events.assert_published("parcel.delivered", {"order_id": 17})


def test_a_parcel_is_booked_today(collected_events, carrier):
    freeze_time = pytest.importorskip("freezegun").freeze_time
    with freeze_time("2026-01-01 12:00"):
        collected_events.perform(Parcels, {"order_id": 17})
    event = collected_events.assert_published(
        "parcel.booked", {"booked_on": datetime.date(2026, 1, 1)}
    )
    assert event.occurred_at == datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


class WarehouseTest(CollectedEventsMixin, unittest.TestCase):
    def setUp(self):
        with auto_publishing():
            place_order("tea", "12.50")

    def test_every_order_gets_a_parcel(self):
        self.collected_events.deliver_all(Invoices, Parcels)
        self.collected_events.assert_published_in_order(
            "order.placed", "invoice.sent", "parcel.booked"
        )
