"""Consumers that publish follow-on events, fail, fail at first, are slow, and deduplicate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from outbox import enqueue_event, publish, publish_async
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy
from proving.checker import FOLLOW_ON, MAX_ATTEMPTS
from proving.programs.unit import journal

HISTORY = journal("worker")
NAME = os.environ["PROVE_NAME"]
DELAY = 0.5  # seconds; RabbitMQ rounds it up to 1
TIMEOUT = 1.0
RETRY = RetryPolicy(max_attempts=MAX_ATTEMPTS, delay=DELAY)


class Failed(Exception):
    """The attempt fails on purpose."""


def begin(event: ReceivedEvent) -> None:
    """Write the attempt down, and enqueue the follow-on event."""
    key = event.payload["key"]
    HISTORY.write("handling", key=key, attempt=event.attempt)
    enqueue_event({"key": key + FOLLOW_ON}, "invoice.made")


def is_slow(event: ReceivedEvent) -> bool:
    return event.payload["work"] == "slow" and event.attempt == 1


def fail(event: ReceivedEvent) -> None:
    """Raise if this attempt has to fail."""
    work = event.payload["work"]
    if work == "fail" or (work == "retry" and event.attempt == 1):
        raise Failed


@contextlib.contextmanager
def noting_failure(event: ReceivedEvent) -> Iterator[None]:
    """Write down that the attempt fails, if the library is about to see that failure.

    If the database fails at that moment, the library sees that error, and counts no attempt.
    """
    try:
        yield
    except Failed:
        HISTORY.write(
            "failed",
            key=event.payload["key"],
            attempt=event.attempt,
            delay=DELAY,
            redelivered=event.redelivered,
        )
        raise


class Orders(Consumer):
    queue = f"{NAME}.orders"
    topics = ("order.*",)
    retry = RETRY
    timeout = TIMEOUT
    auto_publish = True

    def process(self, event: ReceivedEvent) -> None:
        begin(event)
        if is_slow(event):
            time.sleep(1.5 * TIMEOUT)
        with noting_failure(event):
            fail(event)


class Tasks(Consumer):
    queue = f"{NAME}.tasks"
    topics = ("task.*",)
    retry = RETRY
    timeout = TIMEOUT

    async def process(self, event: ReceivedEvent) -> None:
        begin(event)
        await asyncio.sleep(1.5 * TIMEOUT if is_slow(event) else 0.005)
        with noting_failure(event):
            fail(event)
        await publish_async()


if "OUTBOX_DATABASE_URL" in os.environ:
    ENGINE = create_engine(os.environ["OUTBOX_DATABASE_URL"], poolclass=NullPool)
    INSERT = text("INSERT INTO effects (of, id) VALUES (:of, :id)")

    class Charges(Consumer):
        queue = f"{NAME}.charges"
        topics = ("charge.*",)
        retry = RETRY
        deduplicate = True

        def process(self, event: ReceivedEvent) -> None:
            begin(event)
            with noting_failure(event), Session(ENGINE) as session:
                session.execute(INSERT, {"of": event.payload["key"], "id": event.id})
                time.sleep(0.005)
                fail(event)
                publish()  # before the commit, after which no attempt would repeat it
                session.commit()
