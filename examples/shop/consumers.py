"""The shop's consumers: ``outbox-consume examples.shop.consumers``."""

from __future__ import annotations

import logging

from outbox import enqueue_event, publish
from outbox.consumers import Consumer, ReceivedEvent, consumer

logger = logging.getLogger("shop")


class Invoices(Consumer):
    """Sends an invoice for each order, and publishes an event about it."""

    queue = "shop.invoices"
    topics = ("order.placed",)

    def process(self, event: ReceivedEvent) -> None:
        order = event.payload
        logger.info("invoice for order %s: %s", order["order_id"], order["amount"])
        enqueue_event({"order_id": order["order_id"]}, "invoice.sent")
        publish()  # confirmed by the broker before the order's message is acked


@consumer("shop.ledger", topics=["invoice.sent"])
def ledger(event: ReceivedEvent) -> None:
    logger.info("order %s is in the books", event.payload["order_id"])
