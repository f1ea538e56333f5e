"""The order in which a worker begins tasks where a database is the broker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import called_tasks, task_order
from outbox import auto_publishing, configure
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.messages.rows import values_of
from outbox.storage.store import Store
from outbox.tasks import options
from outbox.transports.database.pace import Pace
from tests.integration.test_store import an_event, payloads
from tests.places import Place, place_of
from tests.waiting import wait_until


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Place:
    return place_of(request.param, request, name, tmp_path)


@pytest.mark.one_python
@pytest.mark.slow
def test_scheduled_tasks_begin_by_priority_then_by_time_and_none_early(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    order = task_order.run(url, tasks=400, seconds=1.5, each=0.004)
    assert (order.begun, order.early) == (400, 0)
    assert order.passing <= 4


@pytest.mark.slow
def test_an_urgent_task_overtakes_those_that_are_claimed(place: Place, name: str) -> None:
    publisher = configure(place.url, exchange=place.exchange, tasks_queue=name)
    place.will_clean_up(name)
    called_tasks.begun.clear()
    with auto_publishing():
        for _ in range(300):  # quick ones: many are claimed ahead
            options(priority=3).later(called_tasks.begin, 3, 0.0, 0.0)
        for _ in range(40):
            options(priority=2).later(called_tasks.begin, 2, 0.0, 0.1)
    worker = Worker(load(["benchmarks.called_tasks"]), publisher=publisher, threads=1)
    worker.start()
    try:
        wait_until(lambda: len(called_tasks.begun) > 302, 30)
        with auto_publishing():
            options(priority=9).later(called_tasks.begin, 9, 0.0, 0.0)
        written = time.time()
        wait_until(lambda: called_tasks.begun[-1][1] == 9, 30)
        late = [at for at, priority, _ in called_tasks.begun if priority == 2 and at > written]
        assert len(late) <= 3
    finally:
        assert worker.stop(20)
        publisher.close()


def test_what_is_held_leaves_room_for_higher_ranks_only(store: Store) -> None:
    def put(rank: int, count: int) -> None:
        name = f"{rank}"
        store.put_rows([values_of(an_event(name), queue="q", rank=rank) for _ in range(count)])

    for rank, count in ((0, 5), (3, 5), (7, 1)):
        put(rank, count)
    assert payloads(store.claim(4, queue="q", held={})) == ["7", "3", "3", "3"]
    assert store.claim(4, queue="q", held={7: 1, 3: 3}) == []
    put(5, 2)
    assert payloads(store.claim(4, queue="q", held={7: 1, 3: 3})) == ["5", "5"]
    assert payloads(store.claim(4, queue="q", held={0: 4})) == ["3", "3"]


def test_the_pace_is_that_of_what_was_settled_while_there_was_work() -> None:
    pace = Pace(2)
    pace.note(0, 2, 100.0)
    assert pace.limit == 2
    pace.note(8, 2, 100.0625)  # 128 a second
    assert pace.limit == 2 + 6
    pace.note(2, 0, 100.125)
    pace.note(0, 5, 160.0)  # nothing was held for a minute
    pace.note(64, 5, 160.0625)
    assert pace.limit == 2 + 51
    pace.note(1, 5, 165.0625)
    assert pace.limit == 2
