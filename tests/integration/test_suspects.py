"""Messages that were lost with a process, in the worker that gets them next."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from outbox.consumers import (
    Consumer,
    ReceivedEvent,
    Reject,
    Requeue,
    RetryPolicy,
    Worker,
    consumer,
)
from outbox.consumers.losses.begun_keeper import BegunKeeper
from outbox.consumers.losses.begun_table import BegunTable, key_of
from outbox.messages.delivery import dead_letter_queue
from tests.places import Place, events_for, made, reading, working
from tests.waiting import wait_until


class Losses:
    """A table in which messages can be lost on demand, and a worker's side of it."""

    def __init__(self, keeper: BegunKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
        self._keeper, self._monkeypatch = keeper, monkeypatch
        self.table = self._table()[0]

    def _table(self) -> tuple[BegunTable, int]:
        region = self._keeper.take()
        assert region is not None
        for name, value in self._keeper.variables(region).items():
            self._monkeypatch.setenv(name, value)
        table = BegunTable.inherited()
        assert table is not None
        return table, region

    def lose(self, queue: str, *ids: str, times: int = 1) -> None:
        table, region = self._table()
        for each in ids:
            table.begin(key_of(queue, each), times - 1)
        assert len(self._keeper.free(region, -9)) == len(ids)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Losses]:
    keeper = BegunKeeper(2, 32)
    yield Losses(keeper, monkeypatch)
    keeper.close()


def send(place: Place, name: str, count: int) -> list[str]:
    """Publish messages that have been delivered once already; return their ids."""
    with place.publisher() as publisher:
        sent = events_for(publisher, [name] * count, exchange="")
        assert publisher.publish(sent).ok
    with reading(place, name, again=True) as reader:
        reader.take(count)
    return [event.id for event in sent]


def is_idle(worker: Worker) -> bool:
    return not worker._guard.gate._running


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_what_was_lost_begins_alone_and_the_rest_side_by_side(
    place: Place, name: str, losses: Losses, is_async: bool
) -> None:
    sent = send(place, made(place, name), 12)
    suspects = sent[2:5]
    losses.lose(name, *suspects)
    running: set[str] = set()
    beside: dict[str, set[str]] = {each: set() for each in sent}
    done: list[str] = []

    def begin(event: ReceivedEvent) -> None:
        for each in running:
            beside[each].add(event.id)
        beside[event.id] |= running
        running.add(event.id)

    def end(event: ReceivedEvent) -> None:
        running.discard(event.id)
        done.append(event.id)

    if is_async:

        @consumer(name)
        async def work(event: ReceivedEvent) -> None:
            begin(event)
            await asyncio.sleep(0.1)
            end(event)
    else:

        @consumer(name)
        def work(event: ReceivedEvent) -> None:
            begin(event)
            time.sleep(0.1)
            end(event)

    with (
        place.publisher() as publisher,
        working(publisher, work, threads=4, begun=losses.table) as worker,
    ):
        wait_until(lambda: len(done) == 12, 20)
        wait_until(lambda: is_idle(worker))
    assert [beside[each] for each in suspects] == [set()] * 3
    assert any(beside[each] for each in sent)
    assert losses.table.loss_of(key_of(name, suspects[0])) is None  # it has ended


@pytest.mark.parametrize("times", [3, 4])
def test_after_three_losses_a_message_is_dead_lettered(
    place: Place, name: str, losses: Losses, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    [message] = send(place, made(place, name), 1)
    losses.lose(name, message, times=times)
    called: list[Any] = []

    class Mortal(Consumer):
        queue = name
        retry = RetryPolicy(max_attempts=10)

        def process(self, event: ReceivedEvent) -> None:
            called.append("process")

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            called.append((event.id, reason))

    with place.publisher() as publisher, working(publisher, Mortal, begun=losses.table):
        wait_until(lambda: place.count(dead_letter_queue(name)) == 1, 20)
    reason = f"lost with its process {times} times (the last one ended with signal 9)"
    # A callback that kills the process as well is not called again.
    assert called == ([(message, reason)] if times == 3 else [])
    assert f"attempt 1: '{reason}'" in caplog.text
    assert place.count(name) == 0


def test_a_late_handler_holds_up_no_suspect(place: Place, name: str, losses: Losses) -> None:
    late, suspect = send(place, made(place, name), 2)
    losses.lose(name, suspect)
    goes_on = threading.Event()
    done: list[str] = []

    @consumer(name, timeout=0.3)
    def work(event: ReceivedEvent) -> None:
        if event.id == late:
            goes_on.wait(20)
        else:
            done.append(event.id)

    with (
        place.publisher() as publisher,
        working(publisher, work, threads=2, begun=losses.table) as worker,
    ):
        wait_until(lambda: done == [suspect], 10)
        assert worker.late == 1
        goes_on.set()
        wait_until(lambda: worker.late == 0)
        assert is_idle(worker)


def test_a_message_that_waits_for_its_turn_is_given_back_by_a_stop(
    place: Place, name: str, losses: Losses
) -> None:
    busy, suspect = send(place, made(place, name), 2)
    losses.lose(name, suspect)
    goes_on = threading.Event()
    begun: list[str] = []

    @consumer(name)
    def work(event: ReceivedEvent) -> None:
        begun.append(event.id)
        goes_on.wait(20)

    with place.publisher() as publisher:
        with working(publisher, work, threads=2, begun=losses.table):
            wait_until(lambda: begun == [busy])
            time.sleep(0.3)
            threading.Timer(0.3, goes_on.set).start()
        assert begun == [busy]
        wait_until(lambda: place.count(name) == 1)
        with reading(place, name, again=True) as reader:
            assert reader.get()[0].message_id == suspect


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_however_an_attempt_ends_nothing_is_left_running(
    place: Place, name: str, losses: Losses, is_async: bool
) -> None:
    ends = ["return", "fail", "reject", "requeue", "exit", "too late"]
    seen: dict[str, int] = {}

    def act(event: ReceivedEvent) -> None:
        seen[event.id] = seen.get(event.id, 0) + 1
        how = of_id[event.id]
        if seen[event.id] > 1 and how == "requeue":
            return
        if how == "fail":
            raise ValueError
        if how == "reject":
            raise Reject("no")
        if how == "requeue":
            raise Requeue
        if how == "exit":
            raise SystemExit(1)

    if is_async:

        @consumer(name, timeout=0.3)
        async def work(event: ReceivedEvent) -> None:
            act(event)
            if of_id[event.id] == "too late":
                await asyncio.sleep(5)
    else:

        @consumer(name, timeout=0.3)
        def work(event: ReceivedEvent) -> None:
            act(event)
            if of_id[event.id] == "too late":
                time.sleep(1)

    of_id = dict(zip(send(place, made(place, name), len(ends)), ends, strict=True))
    losses.lose(name, *list(of_id)[::2])
    with (
        place.publisher() as publisher,
        working(publisher, work, threads=3, begun=losses.table) as worker,
    ):
        wait_until(lambda: place.count(dead_letter_queue(name)) == 4, 20)
        wait_until(lambda: sum(seen.values()) == len(ends) + 1, 10)
        wait_until(lambda: is_idle(worker))
    free = losses.table._free
    assert len(free) == len(set(free)) == 32
