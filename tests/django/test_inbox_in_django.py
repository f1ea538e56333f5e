"""Consumers under Django: fresh connections, and messages noted with the handler's data."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import importlib
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import InterfaceError, OperationalError, connection, connections, transaction
from opentelemetry import context

from outbox import CollectorClosed, Event, Publisher, UsageError, sinks
from outbox.consumers import Consumer, consumer
from outbox.consumers.message.databases import is_unavailable, refreshers
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import REQUEUE, Ack, Again, Dead, Hold, Outcome
from outbox.django import enqueue_event
from outbox.django.models import StoredEvent
from outbox.django.moments import NOW
from outbox.django.noting import TransactionInbox, open_inbox
from outbox.messages.delivery import as_delivered
from outbox.telemetry import OutboxInstrumentor
from tests.django.shop.models import Order

pytestmark = pytest.mark.usefixtures("databases")


@pytest.fixture
def inbox(outbox_setting: Any) -> TransactionInbox:
    outbox_setting()
    return open_inbox()


def processed(work: Consumer, inbox: Any, id: str = "a") -> Outcome:
    """Process a message once, as a worker would."""
    event = Event(id, "work", "", b"{}")
    with Publisher("memory://") as publisher:
        engine = InlineEngine(publisher, inbox)
        message = Message(work, as_delivered(event, "work", 1), engine)
        if not work.is_async:
            return contextvars.copy_context().run(engine.conclude, message)
        return asyncio.run(engine.conclude_async(message))


def noted(using: str = "default") -> int:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM outbox_inbox")
        return int(cursor.fetchone()[0])


def orders() -> list[int]:
    return list(Order.objects.order_by("pk").values_list("number", flat=True))


def working(process: Callable[[], object]) -> Consumer:
    @consumer("work", deduplicate=True)
    def work(event: object) -> None:
        process()

    return work


def test_the_note_is_committed_with_the_handlers_data(inbox: TransactionInbox) -> None:
    seen: list[int] = []

    def process() -> None:
        with transaction.atomic():
            Order.objects.create(number=1)
            seen.append(noted())
        transaction.get_connection().rollback()  # nothing is left to be rolled back
        seen.append(noted())

    work = working(process)
    processed(work, inbox)
    assert seen == [0, 1]
    outcome: Any = processed(work, inbox)
    assert outcome.duplicate
    assert orders() == [1]


def test_instrumentations_see_the_handlers_statements_alone(inbox: TransactionInbox) -> None:
    seen: list[str] = []

    def note(execute: Any, sql: str, *arguments: Any) -> Any:
        if not context.get_value("suppress_instrumentation"):  # as instrumentations look at it
            seen.append(sql)
        return execute(sql, *arguments)

    def process() -> None:
        with transaction.atomic():
            Order.objects.create(number=1)

    OutboxInstrumentor().instrument()
    try:
        with connection.execute_wrapper(note):
            assert isinstance(processed(working(process), inbox), Ack)
    finally:
        OutboxInstrumentor().uninstrument()
    assert noted() == 1
    [insert] = [sql for sql in seen if not sql.startswith(("BEGIN", "SELECT VERSION", "SET "))]
    assert "shop_order" in insert


def test_a_rolled_back_handler_is_not_noted_and_runs_again(inbox: TransactionInbox) -> None:
    def process() -> None:
        with transaction.atomic():
            Order.objects.create(number=1)
            raise KeyError

    work = working(process)
    assert isinstance(processed(work, inbox), Dead | Again)
    assert noted() == len(orders()) == 0


@pytest.mark.parametrize("databases", ["mariadb"], indirect=True)
@pytest.mark.parametrize("writes", [True, False])
def test_a_lock_in_the_way_of_the_note_is_no_failed_attempt(
    inbox: TransactionInbox, writes: bool
) -> None:
    def process() -> None:
        if writes:
            with transaction.atomic():
                Order.objects.create(number=1)

    with connection.cursor() as cursor:
        cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")
    with contextlib.closing(connection.copy()) as beside:  # another worker is about to note it
        beside.set_autocommit(False)
        with beside.cursor() as cursor:
            cursor.execute(
                "INSERT INTO outbox_inbox (consumer, message_id, done_at) "
                f"VALUES ('work', 'a', {NOW['mysql']})"
            )
        outcome = processed(working(process), inbox)
        beside.rollback()
    assert outcome == REQUEUE if writes else isinstance(outcome, Hold)
    assert orders() == []
    assert isinstance(processed(working(process), inbox), Ack)
    assert noted() == 1


def test_follow_on_events_belong_to_the_transaction_too(inbox: TransactionInbox) -> None:
    fails = [True, False]

    @consumer("work", deduplicate=True)
    def work(event: object) -> None:
        with transaction.atomic():
            Order.objects.create(number=1)
            enqueue_event({}, "order.paid")
            if fails.pop(0):
                raise KeyError

    processed(work, inbox)
    assert not StoredEvent.objects.exists()
    processed(work, inbox)
    processed(work, inbox)
    assert (StoredEvent.objects.count(), noted(), orders()) == (1, 1, [1])


def test_a_savepoint_that_is_rolled_back_keeps_the_note(inbox: TransactionInbox) -> None:
    def process() -> None:
        with transaction.atomic():
            with pytest.raises(KeyError), transaction.atomic():
                Order.objects.create(number=1)
                raise KeyError
            Order.objects.create(number=2)

    processed(working(process), inbox)
    assert (noted(), orders()) == (1, [2])


def test_a_transaction_that_only_reads_is_not_taken_for_the_handlers_work(
    inbox: TransactionInbox,
) -> None:
    seen: list[int] = []

    def process() -> None:
        Order.objects.create(number=0)  # commits at once
        with transaction.atomic():
            Order.objects.count()
        seen.append(noted())
        with transaction.atomic():
            Order.objects.create(number=1)
        seen.append(noted())

    processed(working(process), inbox)
    assert seen == [0, 1]


def test_what_commits_at_once_is_noted_after_the_handler(inbox: TransactionInbox) -> None:
    seen: list[int] = []

    def process() -> None:
        Order.objects.create(number=1)
        seen.append(noted())

    processed(working(process), inbox)
    assert (seen, noted()) == ([0], 1)


def test_manual_transactions_take_the_note_as_well(inbox: TransactionInbox) -> None:
    seen: list[int] = []

    def process() -> None:
        transaction.set_autocommit(False)
        try:
            Order.objects.create(number=1)
            transaction.rollback()
            Order.objects.count()
            transaction.commit()
            seen.append(noted())
            transaction.rollback()
            Order.objects.create(number=2)
            transaction.commit()
            seen.append(noted())
            transaction.rollback()
        finally:
            transaction.set_autocommit(True)

    processed(working(process), inbox)
    assert (seen, orders()) == ([0, 1], [2])


def test_of_two_runs_at_a_time_the_second_leaves_nothing_behind(inbox: TransactionInbox) -> None:
    def process() -> None:
        with connection.cursor() as cursor:  # as another worker does meanwhile
            cursor.execute(f"INSERT INTO outbox_inbox SELECT 'work', 'a', {NOW[connection.vendor]}")
        with transaction.atomic():
            Order.objects.create(number=1)

    outcome: Any = processed(working(process), inbox)
    assert outcome.duplicate
    assert orders() == []


def test_a_handler_that_was_given_up_cannot_commit(inbox: TransactionInbox) -> None:
    work = working(lambda: None)
    entry = inbox.entry(work, Event("a", "work", "", b"{}"))
    entry.join()
    try:
        assert not entry.give_up()
        with pytest.raises(CollectorClosed), transaction.atomic():
            Order.objects.create(number=1)
    finally:
        entry.leave()
    assert (noted(), orders()) == (0, [])
    with transaction.atomic():
        Order.objects.create(number=2)
    assert orders() == [2]


def test_another_databases_transaction_is_not_asked(inbox: TransactionInbox) -> None:
    seen: list[int] = []

    def process() -> None:
        with transaction.atomic(using="other"):
            Order.objects.using("other").create(number=1)
        seen.append(noted())

    processed(working(process), inbox)
    assert (seen, noted(), noted("other")) == ([0], 1, 0)


def test_a_coroutines_transactions_take_the_note(inbox: TransactionInbox) -> None:
    seen: list[int] = []

    @sync_to_async
    def book() -> None:
        with transaction.atomic():
            Order.objects.create(number=1)
        seen.append(noted())

    @consumer("work")
    async def work(event: object) -> None:
        # Another handler has connected before.
        await sync_to_async(lambda: connection.ensure_connection())()
        entry = inbox.entry(working(lambda: None), event)  # type: ignore[arg-type]
        entry.join()
        await book()
        entry.leave()

    processed(work, None)
    assert seen == [1]


def test_a_message_is_forgotten_after_its_window(inbox: TransactionInbox) -> None:
    @consumer("work", deduplicate=datetime.timedelta(seconds=0.001))
    def work(event: object) -> None:
        Order.objects.create(number=1)

    for _ in range(2):
        processed(work, inbox)
    assert orders() == [1, 1]
    inbox._forgetting._looked_at.clear()
    assert not inbox.entry(work, Event("b", "work", "", b"{}")).is_done()
    assert noted() == 0


def test_without_the_table_the_error_names_the_migration() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE outbox_inbox")
    assert sinks.inbox is not None
    with pytest.raises(UsageError, match=r"manage\.py migrate outbox_events --database default"):
        sinks.inbox()


def test_connections_are_refreshed_but_not_those_in_a_tests_transaction() -> None:
    [refresh] = refreshers(is_async=False)
    connection.ensure_connection()
    connection.queries_log.append({})
    connection.close_at = 0
    with transaction.atomic():
        refresh()
        assert connection.connection is not None
        assert connection.queries_log
    connection.close_at = 0
    refresh()
    assert connection.connection is None
    assert not connection.queries_log


_SESSIONS = {
    "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend(%s)"),
    "mysql": ("SELECT connection_id()", "KILL %s"),
}
"""The statements that name a session, and that end the one of that name."""


def test_a_lost_connection_is_no_failed_attempt() -> None:
    def process() -> None:
        connection.ensure_connection()
        if connection.vendor == "sqlite":
            connections["default"].settings_dict["NAME"] = "/nowhere/at/all.sqlite3"
            connection.close()
        else:
            this, end = _SESSIONS[connection.vendor]
            with connection.cursor() as here, connections["other"].cursor() as there:
                here.execute(this)
                there.execute(end, here.fetchone())
        Order.objects.count()

    @consumer("work")
    def work(event: object) -> None:
        process()

    assert isinstance(processed(work, None), Hold)


@pytest.mark.parametrize(
    ("kind", "module", "name", "arguments"),
    [
        (OperationalError, "psycopg", "OperationalError", ["the connection is closed"]),
        (InterfaceError, "psycopg2", "InterfaceError", ["connection already closed"]),
        (OperationalError, "psycopg2", "OperationalError", ["server closed the connection"]),
        (OperationalError, "pymysql", "OperationalError", [2013, "Lost connection"]),
        (InterfaceError, "pymysql", "InterfaceError", [0, ""]),
    ],
)
def test_the_drivers_errors_are_recognised_in_djangos(
    kind: type[Exception], module: str, name: str, arguments: list[Any]
) -> None:
    error = kind(*arguments)
    error.__cause__ = getattr(importlib.import_module(module), name)(*arguments)
    assert is_unavailable(error)
