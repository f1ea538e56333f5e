"""An application's consumers, for tests of the testing kit."""

from __future__ import annotations

from typing import Any

from outbox import enqueue_event, publish
from outbox.consumers import Consumer, Reject

__all__ = ["Invoices", "Mails"]


class Invoices(Consumer):
    queue = "invoices"
    topics = ("order.*",)

    def process(self, event: Any) -> None:
        if event.payload["id"] == 13:
            raise ValueError("thirteen")
        if event.payload["id"] == 14:
            raise Reject("fourteen")
        enqueue_event({"order": event.payload["id"]}, "invoice.sent")
        publish()


class Mails(Consumer):
    queue = "mails"
    topics = ("invoice.sent",)
    auto_publish = True

    def process(self, event: Any) -> None:
        enqueue_event(event.payload, "mail.sent")
