"""``enqueue_event()`` behaves like ``Model.objects.create()``."""

from __future__ import annotations

import asyncio
import datetime
import warnings
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from outbox import Event, UsageError
from outbox.django import aenqueue_event, enqueue_event
from outbox.django.connecting import engine_of
from outbox.django.models import StoredEvent
from outbox.sql import Store
from outbox.storage.creating import database_id, missing
from outbox.storage.transactions import own_transaction
from tests.django.shop.models import Order

# Its name before Django 6.1.
savepoint_create = getattr(transaction, "savepoint_create", None) or transaction.savepoint

pytestmark = pytest.mark.usefixtures("databases")


@pytest.fixture(autouse=True)
def without_publisher(outbox_setting: Any) -> None:
    """Nothing publishes, so that what was stored stays to be looked at."""
    outbox_setting()


def stored(using: str = "default") -> list[str]:
    return [row.id for row in StoredEvent.objects.using(using)]


def test_an_event_is_a_row_of_the_transaction_at_once() -> None:
    with transaction.atomic():
        event = enqueue_event({"n": 1}, "order.placed", key="7", headers={"by": "me"}, priority=3)
        assert stored() == [event.id]
    [row] = StoredEvent.objects.all()
    assert (row.target, row.key, row.priority) == ("order.placed", "7", 3)
    assert (row.aggregatetype, row.aggregateid) == ("order", "7")
    assert bytes(row.payload) == b'{"n":1}'
    assert row.occurred_at == event.occurred_at
    assert abs(row.stored_at - event.occurred_at) < datetime.timedelta(seconds=5)
    assert row.available_at == row.stored_at


def test_the_project_adds_headers_to_what_is_stored(outbox_setting: Any) -> None:
    outbox_setting(HEADERS=lambda: {"tenant": "acme"})
    with transaction.atomic():
        event = enqueue_event(1, "a", headers={"n": 1})
    assert event.headers == {"tenant": "acme", "n": 1}


def test_a_relay_reads_what_was_stored() -> None:
    event = enqueue_event({"n": 1}, "order.placed", key="7", headers={"by": "me", "raw": b"\0"})
    [claimed] = Store(engine_of("default")).claim(10)
    assert claimed.event == event


def test_a_rollback_drops_the_event() -> None:
    with pytest.raises(KeyError), transaction.atomic():
        enqueue_event({}, "order.placed")
        raise KeyError
    with transaction.atomic():
        enqueue_event({}, "order.placed")
        transaction.set_rollback(True)
    assert stored() == []


def test_a_savepoint_that_is_rolled_back_drops_its_events_alone() -> None:
    with transaction.atomic():
        kept = enqueue_event({}, "order.placed")
        with pytest.raises(KeyError), transaction.atomic():
            enqueue_event({}, "order.placed")
            raise KeyError
        savepoint = savepoint_create()
        enqueue_event({}, "order.placed")
        transaction.savepoint_rollback(savepoint)
    assert stored() == [kept.id]


def test_outside_of_a_transaction_an_event_commits_at_once() -> None:
    event = enqueue_event({}, "order.placed")
    connection.rollback()
    assert stored() == [event.id]


def test_in_manual_transaction_management_it_commits_with_the_rest() -> None:
    transaction.set_autocommit(False)
    try:
        enqueue_event({}, "order.placed")
        transaction.rollback()
        event = enqueue_event({}, "order.placed")
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert stored() == [event.id]


def test_an_event_is_one_query() -> None:
    with transaction.atomic(), CaptureQueriesContext(connection) as queries:
        for _ in range(10):
            enqueue_event({}, "order.placed")
    assert len(queries) == 10


def test_an_event_for_later_is_due_then() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    enqueue_event({}, "order.placed", deliver_at=later)
    [row] = StoredEvent.objects.all()
    assert abs(row.available_at - later) < datetime.timedelta(milliseconds=1)
    assert not Store(engine_of("default")).claim(10)


def test_an_alias_names_the_transaction() -> None:
    with pytest.raises(KeyError), transaction.atomic(using="other"):
        enqueue_event({}, "order.placed", using="other")
        here = enqueue_event({}, "order.placed", using="default")
        raise KeyError
    there = enqueue_event({}, "order.placed", using="other")
    assert (stored(), stored("other")) == ([here.id], [there.id])
    with pytest.raises(UsageError, match=r"using='nowhere' is not in DATABASES"):
        enqueue_event({}, "order.placed", using="nowhere")


def test_an_event_that_would_miss_the_open_transaction_is_refused() -> None:
    with (
        pytest.raises(UsageError, match="a transaction of the database 'other' is open"),
        transaction.atomic(using="other"),
    ):
        enqueue_event({}, "order.placed")
    with transaction.atomic(using="other"), transaction.atomic():
        enqueue_event({}, "order.placed")
    assert len(stored()) == 1


def test_outside_of_atomic_a_project_may_warn_or_refuse(outbox_setting: Any) -> None:
    outbox_setting(OUTSIDE_ATOMIC="error")
    with pytest.raises(UsageError, match=r"outside of transaction\.atomic"):
        enqueue_event({}, "order.placed")
    with transaction.atomic():
        enqueue_event({}, "order.placed")
    outbox_setting(OUTSIDE_ATOMIC="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            enqueue_event({}, "order.placed")
    assert [each.filename for each in caught] == [__file__]
    assert len(stored()) == 4


def test_on_an_event_loop_there_is_a_coroutine_for_it() -> None:
    async def view() -> Event:
        with pytest.raises(UsageError, match=r"await outbox\.django\.aenqueue_event"):
            enqueue_event({}, "order.placed")
        return await aenqueue_event({"n": 1}, "order.placed")

    event = asyncio.run(view())
    assert stored() == [event.id]


def test_without_the_table_the_error_names_the_migration() -> None:
    call_command("migrate", "outbox_events", "zero", verbosity=0)
    with pytest.raises(UsageError, match=r"manage\.py migrate outbox_events --database default"):
        enqueue_event({}, "order.placed")


def test_the_migrated_table_is_what_outbox_needs() -> None:
    for alias in ("default", "other"):
        Store(engine_of(alias)).check(complete=True)
        with own_transaction(engine_of(alias)) as connection:
            assert missing(connection) == []
            assert database_id(connection)
    call_command("makemigrations", "outbox_events", check=True, dry_run=True, verbosity=0)


def test_a_table_that_is_there_is_taken_over() -> None:
    event = enqueue_event({}, "order.placed")
    call_command("migrate", "outbox_events", "zero", fake=True, verbosity=0)
    call_command("migrate", "outbox_events", verbosity=0)
    assert stored() == [event.id]


def test_data_and_event_are_committed_together() -> None:
    with pytest.raises(KeyError), transaction.atomic():
        order = Order.objects.create(number=1)
        enqueue_event({"order": order.pk}, "order.placed")
        raise KeyError
    with transaction.atomic():
        order = Order.objects.create(number=2)
        enqueue_event({"order": order.pk}, "order.placed")
    assert Order.objects.count() == len(stored()) == 1
