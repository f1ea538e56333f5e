"""Handlers that end, stop or block the event loop of their worker."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import Publisher, UsageError
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.consumers.event_loop import loop_watch
from outbox.messages.delivery import dead_letter_queue
from tests.places import SQLitePlace, events_for, made, working
from tests.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), name)


@pytest.fixture
def publisher(place: SQLitePlace) -> Iterator[Publisher]:
    with place.publisher() as publisher:
        yield publisher


async def leave() -> None:
    await asyncio.sleep(0)
    sys.exit(2)


async def interrupt() -> None:
    await asyncio.sleep(0)
    raise KeyboardInterrupt


async def in_a_group(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(task())


async def beside(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    background.add(asyncio.create_task(task()))
    await asyncio.sleep(0.01)


async def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)


async def cancel_everything() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0)


background: set[asyncio.Task[None]] = set()


@pytest.mark.parametrize(
    ("bad", "is_dead"),
    [
        (lambda: asyncio.gather(leave()), True),
        (lambda: asyncio.wait_for(leave(), 10), True),
        (lambda: in_a_group(leave), True),
        (lambda: in_a_group(interrupt), True),
        (lambda: asyncio.gather(interrupt()), True),
        (lambda: beside(leave), False),
        (lambda: beside(interrupt), False),
        (stop_the_loop, False),
        (cancel_everything, True),
    ],
)
def test_whatever_a_task_of_a_handler_does_the_loop_goes_on(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    bad: Callable[[], Any],
    is_dead: bool,
) -> None:
    done = []

    class Work(Consumer):
        queue = name

        async def process(self, event: ReceivedEvent) -> None:
            if event.headers.get("bad"):
                await bad()
            done.append(event.headers["number"])

    with working(publisher, Work) as worker:
        wait_until(lambda: worker.is_consuming)
        for number, is_bad in ((1, False), (2, True), (3, False)):
            headers = {"number": number, "bad": is_bad}
            publisher.publish(events_for(publisher, [name], exchange="", headers=headers))
            wait_until(lambda: len(done) + place.count(dead_letter_queue(name)) == number)  # noqa: B023
        assert done == ([1, 3] if is_dead else [1, 2, 3])
        assert worker.is_consuming
        assert not worker.wait(0)


def test_messages_whose_tasks_are_cancelled_before_they_begin_are_redelivered(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    done = set()

    class Work(Consumer):
        queue = made(place, name)

        async def process(self, event: ReceivedEvent) -> None:
            if event.headers["number"] == 0 and not event.redelivered:
                time.sleep(0.5)  # noqa: ASYNC251  meanwhile the others arrive
                await asyncio.sleep(0)  # their tasks are made, and have yet to take a step
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
            done.add(event.headers["number"])

    for number in range(20):
        headers = {"number": number}
        publisher.publish(events_for(publisher, [name], exchange="", headers=headers))
    with working(publisher, Work):
        wait_until(lambda: len(done) == 20)


BREAKS = """
import asyncio
from outbox.consumers import consumer


@consumer("work", topics=["order.*", "#.paid"])
async def work(event):
    loop = asyncio.get_running_loop()
    loop._selector.close()  # as os.closerange() does
"""


def test_a_worker_whose_loop_can_not_go_on_ends(place: SQLitePlace, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BREAKS)
    command = [sys.executable, "-m", "outbox.consumers", "broken", "--url", place.url]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=output)
    try:
        with place.publisher() as publisher:
            begins = "consuming 'work' (topics 'order.*', '#.paid') with"
            wait_until(lambda: begins in log.read_text(), 20)
            publisher.publish(events_for(publisher, ["work"], exchange=""))
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()
    assert "ERROR" in log.read_text()
    assert "the event loop has ended" in log.read_text()


def test_what_blocks_the_loop_is_logged_with_its_stack(
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loop_watch, "_PATIENCE", 0.3)
    monkeypatch.setattr(loop_watch, "_EVERY", 0.05)

    class Work(Consumer):
        queue = name

        async def process(self, event: ReceivedEvent) -> None:
            await asyncio.gather(self.fetch())

        async def fetch(self) -> None:
            time.sleep(1.5)  # noqa: ASYNC251

    caplog.set_level(logging.WARNING, "outbox.consumer")
    with working(publisher, Work) as worker:
        wait_until(lambda: worker.is_consuming)
        [event] = events_for(publisher, [name], exchange="")
        publisher.publish([event])
        wait_until(lambda: "the event loop goes on after" in caplog.text)
    warnings = [record.getMessage() for record in caplog.records if "blocked" in record.msg]
    assert len(warnings) == 2  # after 0.3 s and, twice as long later, 0.9 s
    for warning in warnings:
        assert f"message {event.id!r} of {name!r}" in warning
        assert "time.sleep(1.5)" in warning
        assert warning.count("  File ") == 1  # that of fetch(), without the engine's frames
    time.sleep(0.5)
    names = [thread.name for thread in threading.enumerate()]
    assert "outbox-worker-loop-watch" not in names


def test_a_worker_starts_only_once(publisher: Publisher, name: str) -> None:
    class Work(Consumer):
        queue = name

        def process(self, event: ReceivedEvent) -> None:
            pass

    with working(publisher, Work) as worker:
        with pytest.raises(UsageError, match="make another Worker"):
            worker.start()
        wait_until(lambda: worker.is_consuming)
    with pytest.raises(UsageError, match="make another Worker"):
        worker.start()
    never_started = Worker([Work], publisher=publisher)
    assert never_started.stop(1)
    with pytest.raises(UsageError, match="make another Worker"):
        never_started.start()
