"""Tasks in the testing kit: asserted, and run without a worker."""

from __future__ import annotations

import asyncio
import datetime
import decimal
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from outbox import UsageError, auto_publishing, configure
from outbox.tasks import (
    NoResults,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    TaskHandle,
    later,
    options,
    schedule,
)
from outbox.testing import CollectedEvents
from tests import accounting, counting, shipping
from tests.shipping import Customer, Newsletter, Order


@pytest.fixture(autouse=True)
def noted() -> list[Any]:
    shipping.log.clear()
    counting.counted.clear()
    return shipping.log


@pytest.fixture
def engine(tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    shipping.Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_calls_are_asserted_however_their_arguments_were_given(
    collected_events: CollectedEvents,
) -> None:
    day = datetime.date(2030, 1, 1)
    with auto_publishing():
        shipping.greet.later(1, text="a")
        shipping.carry.later(day, [])
        options(priority=9, delay=60, key="k").later(Newsletter.deliver_all, at="noon")
        schedule(datetime.timedelta(hours=1), shipping.greet, 2)
    assert collected_events.assert_later(shipping.greet, 1, "a").payload["args"] == [1]
    collected_events.assert_later(shipping.greet, number=1, text="a")
    collected_events.assert_later(shipping.greet, ..., options={"times": 2})
    collected_events.assert_later(shipping.carry, day, boxes=[])
    collected_events.assert_later(
        Newsletter.deliver_all, "noon", options={"priority": 9, "delay": 60, "key": "k"}
    )
    hour = datetime.timedelta(hours=1)
    collected_events.assert_later(shipping.greet, 2, options={"at": hour, "priority": 3})
    calls: list[tuple[Any, int, dict[str, Any]]] = [
        (shipping.greet, 1, {}),
        (shipping.plain, 1, {}),
        (shipping.greet, 2, {"priority": 5}),
    ]
    for call, number, wanted in calls:
        with pytest.raises(AssertionError, match="published event"):
            collected_events.assert_later(call, number, options=wanted)


def test_what_was_called_is_run_with_all_that_follows(
    collected_events: CollectedEvents, noted: list[Any]
) -> None:
    with auto_publishing():
        shipping.follow.later(3)
        later(shipping.plain, 4)
        shipping.wait.later(5)
        options(queue="elsewhere").later(shipping.greet, 6)
        counting.count.later(7)
    done = collected_events.deliver_all()
    assert len(done) == 6
    assert all(each.acked for each in done)
    assert counting.counted == [7]
    assert [note[:2] for note in noted if note[0] != "waited"] == [
        ("plain", 4),
        (6, "hello"),
        (3, "hello"),
    ]


def test_a_failing_task_fails_the_test(collected_events: CollectedEvents) -> None:
    with auto_publishing():
        shipping.fails.later("no")
    with pytest.raises(LookupError, match="no"):
        collected_events.deliver_all(shipping.fails)
    [letter] = collected_events.dead_letters
    assert letter.headers["outbox-dead-reason"] == "LookupError: no"


def test_an_asynchronous_test_runs_coroutines_with_the_other_method(
    collected_events: CollectedEvents, noted: list[Any]
) -> None:
    with auto_publishing():
        shipping.wait.later(1)
        shipping.greet.later(2)

    async def act() -> None:
        with pytest.raises(UsageError, match="await deliver_async"):
            collected_events.deliver(shipping)
        await collected_events.deliver_all_async(shipping)

    asyncio.run(act())
    assert {note[1] for note in noted} == {1, "hello"}


def test_instances_in_a_test(
    collected_events: CollectedEvents, engine: Engine, noted: list[Any]
) -> None:
    configure(task_session=sessionmaker(engine))
    with Session(engine) as session:
        order, ann = Order(id=1), Customer(name="Ann")
        session.add_all([order, ann])
        session.commit()
        with auto_publishing():
            later(order.ship, ann)
        collected_events.assert_later(order.ship, ann)
        collected_events.deliver_all(shipping)
        session.refresh(order)
        assert order.state == "shipped"
    assert noted == [("Order", 1, "Ann", False)]


@pytest.mark.asyncio
async def test_coroutines_of_instances_run_in_an_asynchronous_session(
    collected_events: CollectedEvents, tmp_path: Any, noted: list[Any]
) -> None:
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(shipping.Base.metadata.create_all)
    sessions = async_sessionmaker(engine)
    configure(task_session=sessions)
    async with sessions() as session:
        order = Order(id=1)
        session.add(order)
        await session.commit()
        async with auto_publishing():
            later(order.ship_async)
    await collected_events.deliver_all_async(shipping)
    await engine.dispose()
    assert noted == [("async", 1)]


def test_results_are_there_once_tasks_were_delivered(collected_events: CollectedEvents) -> None:
    """Also without a database, and without a wait for what has not run."""
    with auto_publishing():
        number = accounting.add.later(1, 2)
        months = accounting.months.later(2030)
        cancelled = accounting.add.later(3, 4)
        failed = accounting.fails.later("no")
        twice = accounting.twice.later()
        forgotten = accounting.forgets.later()
        once = accounting.book_once.later("first")
        with pytest.raises(UsageError, match="publish"):
            number.result()
    with pytest.raises(ResultTimeout, match="deliver_all"):
        number.result()
    assert number.status == "unknown"
    assert cancelled.cancel()
    collected_events.deliver(accounting, raise_errors=False)
    assert (twice.status, number.result(), months.result()) == (
        "retrying",
        3,
        {datetime.date(2030, 1, 1): decimal.Decimal("1.50")},
    )
    collected_events.deliver_all(accounting, raise_errors=False)
    assert (twice.result(), once.result()) == (2, "first")
    assert TaskHandle[int](number.id).result() == 3
    assert not number.cancel()
    with pytest.raises(TaskFailed, match="ValueError: no"):
        failed.result()
    with pytest.raises(TaskCancelled):
        cancelled.result()
    with pytest.raises(NoResults):
        forgotten.result()
    with auto_publishing():
        accounting.book_once.options(id=once.id).later("first")
    collected_events.deliver_all(accounting)
    assert once.result() == "first"
