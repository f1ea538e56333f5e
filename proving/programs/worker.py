"""A consumer that publishes one follow-on event a message, or fails."""

from __future__ import annotations

import os

from outbox import enqueue_event, publish
from outbox.consumers import Consumer, ReceivedEvent
from proving.checker import FOLLOW_ON
from proving.programs.unit import journal

HISTORY = journal("worker")


class Orders(Consumer):
    queue = os.environ["PROVE_QUEUE"]
    topics = ("order.*",)

    def process(self, event: ReceivedEvent) -> None:
        key = event.payload["key"]
        HISTORY.write("handling", key=key, redelivered=event.redelivered)
        enqueue_event({"key": key + FOLLOW_ON}, "invoice.made")
        if event.payload["work"] == "fail":
            raise RuntimeError("on purpose")
        publish()
