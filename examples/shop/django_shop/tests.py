"""The project's tests: ``python -m examples.shop.django_shop.manage test``."""

from __future__ import annotations

from django.test import TestCase

from examples.shop.django_shop.models import Order
from outbox.testing import CollectedEventsMixin

ORDER = {"item": "tea", "amount": "12.50"}
TOO_DEAR = {"item": "yacht", "amount": "1000000"}


class OrdersTest(CollectedEventsMixin, TestCase):
    def test_an_order_is_announced(self):
        response = self.client.post("/orders", ORDER)
        assert response.status_code == 201
        event = self.collected_events.assert_stored("order.placed", ORDER)
        assert event.payload["order_id"] == Order.objects.get().pk

    def test_an_order_and_its_event_are_two_queries(self):
        with self.assertNumQueries(4):  # with those of the savepoint
            self.client.post("/orders", ORDER)

    def test_an_order_that_is_not_paid_is_not_announced(self):
        response = self.client.post("/orders", TOO_DEAR)
        assert response.status_code == 402
        assert not Order.objects.exists()
        self.collected_events.assert_nothing_published()
