"""Recurring tasks where they are declared, and the messages in their queues."""

from __future__ import annotations

import datetime
import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import UsageError
from outbox.messages.delivery import as_delivered
from outbox.messages.received_event import decode
from outbox.settings import Settings
from outbox.tasks import current_task, task
from outbox.tasks.recurring_calls import recurring_task_of, tick_id
from outbox.transports.rabbitmq.recurring.schedule_messages import (
    Hello,
    Planned,
    read_message,
    tick_queue_name,
)

UTC = datetime.UTC
NOON = datetime.datetime(2026, 10, 24, 12, 0, tzinfo=UTC)


@task(cron="30 2 * * *", timezone="Europe/Berlin", catch_up=True, priority=7)
def nightly(copy_to: str = "", *more: int) -> None: ...


@task(every=60)
def each_minute() -> None: ...


@task
def called(number: int) -> None: ...


def test_the_next_runs_of_a_task_are_in_its_time_zone() -> None:
    texts = [run.isoformat() for run in nightly.next_runs(NOON, 3)]
    assert texts == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
        "2026-10-27T02:30:00+01:00",
    ]
    [soon] = each_minute.next_runs()
    assert 0 < (soon - datetime.datetime.now(UTC)).total_seconds() <= 60
    assert called.next_runs(NOON, 3) == []
    nightly()  # it is called as it was


@pytest.mark.parametrize("after", [NOON.replace(tzinfo=None), "noon"])
def test_next_runs_needs_an_aware_time(after: object) -> None:
    with pytest.raises(UsageError, match="not a datetime with a time zone"):
        nightly.next_runs(after)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, True, 1.5, 10_001])
def test_next_runs_needs_a_number(count: object) -> None:
    with pytest.raises(UsageError, match="not an int from 1"):
        nightly.next_runs(NOON, count)  # type: ignore[arg-type]


def test_what_nobody_could_call_is_refused_where_it_is_declared() -> None:
    with pytest.raises(UsageError, match="each parameter needs a default, and 'number' has none"):
        task(every=60)(called.function)
    with pytest.raises(UsageError, match="catch_up and overlap are of recurring tasks"):
        task(catch_up=True)(each_minute.function)
    with pytest.raises(UsageError, match="catch_up and overlap are of recurring tasks"):
        task(overlap="skip")(each_minute.function)
    with pytest.raises(UsageError, match="overlap is 'wait', not 'publish' or 'skip'"):
        task(every=60, overlap="wait")(each_minute.function)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="catch_up is 1, not a bool"):
        task(every=60, catch_up=1)(each_minute.function)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"@task of .*each_minute: every is 0\.1"):
        task(every=0.1)(each_minute.function)


def test_a_tick_is_a_call_without_arguments_with_one_id_for_its_time() -> None:
    settings = Settings.load("memory://", {})
    recurring = recurring_task_of(nightly, settings)
    assert recurring is not None
    tick = NOON.astimezone(datetime.timezone(datetime.timedelta(hours=5)))
    event, same = recurring.event(tick), recurring.event(NOON)
    assert event.id == same.id == tick_id(nightly.name, NOON)
    assert uuid.UUID(event.id).version == 5
    assert recurring.event(NOON + datetime.timedelta(seconds=1)).id != event.id
    assert (event.exchange, event.target, event.priority) == ("", "tasks", 7)
    received = decode(as_delivered(event, "tasks", 1))
    assert received.task == nightly.name
    assert received.scheduled_for == NOON
    assert received.payload == {"args": []}
    assert recurring_task_of(called, settings) is None
    assert current_task() is None


def test_a_time_from_outside_may_be_anything() -> None:
    event = recurring_task_of(each_minute, Settings.load("memory://", {})).event(NOON)  # type: ignore[union-attr]
    for value in ("soon", 1.5, True, 10**30, -(10**30), None, [1]):
        delivery = as_delivered(event, "tasks", 1)
        delivery.headers = {**(delivery.headers or {}), "outbox-scheduled-for-us": value}
        assert decode(delivery).scheduled_for is None


def test_a_schedule_and_a_hello_survive_their_message() -> None:
    planned = Planned("every 60 s", NOON, NOON - datetime.timedelta(minutes=1))
    assert read_message(planned.body()) == planned
    assert read_message(Planned("x", NOON).body()) == Planned("x", NOON)
    assert read_message(Hello("abc").body()) == Hello("abc")
    later = Planned("every 60 s", NOON + datetime.timedelta(minutes=1), NOON)
    assert planned.merged(later) == later == later.merged(planned)


@given(st.binary() | st.from_type(type(None)).map(lambda _: b"[" * 60_000))
def test_anything_else_is_neither(body: bytes) -> None:
    assert read_message(body) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "x"},
        {"schedule": 1, "next": NOON.isoformat()},
        {"schedule": "x", "next": "2026-01-01T00:00:00"},
        {"schedule": "x", "next": "9999-12-31T23:59:59+00:00"},
        {"schedule": "x", "next": "9999-12-31T23:59:59-12:00"},
        {"schedule": "x", "next": 5},
        {"schedule": "x", "next": NOON.isoformat(), "last": "never"},
        {"hello": 5},
        {"hello": ["x"]},
        {},
        [],
        "hello",
        None,
        1,
    ],
)
def test_what_is_nearly_a_schedule_is_none(fields: object) -> None:
    assert read_message(json.dumps(fields).encode()) is None


def test_the_name_of_its_queue_has_room_in_amqp() -> None:
    assert tick_queue_name("tasks", "mail.nightly") == "tasks.every.mail.nightly"
    with pytest.raises(UsageError, match=r"more than 255 bytes; give the task a shorter one"):
        tick_queue_name("tasks", "ü" * 125)
