"""A worker that begins no more messages, and finishes those that it has begun."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.consumers.command import worker_main
from outbox.messages.delivery import dead_letter_queue
from outbox.system.signals import Stop
from tests.places import Place, events_for
from tests.waiting import wait_until


@pytest.mark.parametrize("is_async", [False, True])
def test_a_retired_worker_gives_back_what_it_has_not_begun(
    place: Place,
    name: str,
    is_async: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker_main, "_LINE_EVERY", 0.2)
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    begun: list[str] = []
    may_end = threading.Event()

    def plain(event: ReceivedEvent) -> None:
        begun.append(event.id)
        may_end.wait(20)

    async def task(event: ReceivedEvent) -> None:
        begun.append(event.id)
        await asyncio.to_thread(may_end.wait, 20)

    publisher = place.publisher()
    worker = Worker(
        [consumer(name)(task if is_async else plain)],
        publisher=publisher,
        threads=1,
        concurrency=1,
    )
    worker.start()
    wait_until(lambda: worker.is_consuming, 10)
    events = events_for(publisher, [name] * 3, exchange="")
    publisher.publish(events).raise_for_failure()
    wait_until(lambda: len(begun) == 1, 10)
    stop = Stop()
    with caplog.at_level(logging.INFO, "outbox.consumer"):
        retiring = threading.Thread(target=worker_main._leave, args=(worker, stop))
        retiring.start()
        wait_until(lambda: place.count(name) == 2, 10)
        wait_until(lambda: f"1 message(s) to end, for 0 s now: {begun[0]!r}" in caplog.text, 10)
    assert retiring.is_alive()
    began = time.monotonic()
    may_end.set()
    retiring.join(10)
    assert worker.is_idle
    assert worker.stop(10)
    assert time.monotonic() - began < 10
    assert len(begun) == 1
    assert place.count(name) == 2
    publisher.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stop_bounds_the_messages_of_a_retired_worker(
    place: Place, name: str, is_async: bool
) -> None:
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    begun = threading.Event()
    may_end = threading.Event()

    def plain(event: ReceivedEvent) -> None:
        begun.set()
        may_end.wait(20)

    async def task(event: ReceivedEvent) -> None:
        begun.set()
        await asyncio.sleep(20)

    publisher = place.publisher()
    worker = Worker([consumer(name)(task if is_async else plain)], publisher=publisher)
    worker.start()
    wait_until(lambda: worker.is_consuming, 10)
    publisher.publish(events_for(publisher, [name], exchange="")).raise_for_failure()
    assert begun.wait(10)
    worker.retire()
    began = time.monotonic()
    assert not worker.stop(0.3)
    assert time.monotonic() - began < 8
    may_end.set()
    wait_until(lambda: place.count(name) == 1, 10)
    publisher.close()
