"""Orders over HTTP, through the middleware."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from examples.shop import fastapi_app, flask_app
from examples.shop.consumers import Invoices, ledger
from examples.shop.orders import place_order
from outbox import auto_publishing

ORDER = {"item": "tea", "amount": "12.50"}
TOO_DEAR = {"item": "yacht", "amount": "1000000"}


def test_an_order_is_announced(collected_events):
    response = flask_app.app.test_client().post("/orders", data=ORDER)
    event = collected_events.assert_published("order.placed", ORDER)
    assert event.payload["order_id"] == response.get_json()["order_id"]


def test_an_order_over_asgi_is_announced(collected_events):
    TestClient(fastapi_app.app).post("/orders", data=ORDER)
    collected_events.assert_published("order.placed", ORDER, times=1)


def test_an_order_that_is_not_paid_is_not_announced(collected_events):
    assert flask_app.app.test_client().post("/orders", data=TOO_DEAR).status_code == 402
    assert TestClient(fastapi_app.app).post("/orders", data=TOO_DEAR).status_code == 402
    collected_events.assert_nothing_published()
    collected_events.assert_cleared("order.placed", TOO_DEAR, times=2)


@pytest.mark.collected_events(strict=True)
def test_an_invoice_follows_from_an_order(collected_events):
    with auto_publishing():
        order_id = place_order(**ORDER)
    done = collected_events.deliver_all(Invoices, ledger)
    assert [result.consumer.queue for result in done] == ["shop.invoices", "shop.ledger"]
    collected_events.assert_published_in_order("order.placed", "invoice.sent")
    collected_events.assert_published("invoice.sent", {"order_id": order_id})


def test_an_invoice_really_follows_from_an_order(embedded_events):
    flask_app.app.test_client().post("/orders", data=ORDER)
    assert all(result.acked for result in embedded_events.deliver_all(Invoices, ledger))
    embedded_events.assert_published_in_order("order.placed", "invoice.sent")
