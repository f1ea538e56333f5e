"""Bugs in the durable outbox."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, bindparam, delete, event, func, or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import ids
from outbox.configuration import default_publisher
from outbox.messages import rows
from outbox.spool.spool import Spool
from outbox.sql import Store, metadata, relay, row_fates, transaction, waves
from outbox.storage import schema, store
from outbox.storage.statements import Statements
from proving.bugs.bug import Bug

__all__ = ["BUGS"]


_DURABLE = ("durable", "relay", "relay2")


def _claim_deletes() -> None:
    original = Store.claim

    def claim(self: Any, *arguments: Any, **options: Any) -> Any:
        rows = original(self, *arguments, **options)
        self.complete(rows)
        return rows

    Store.claim = claim  # type: ignore[method-assign]


def _stored_elsewhere() -> None:
    def store(session: Any, stored: Any, publisher: Any) -> None:
        Store(session.get_bind()).put([stored])

    transaction._store_in_session = store


def _released_is_committed() -> None:
    original = transaction._store_in_session

    def store(session: Any, stored: Any, publisher: Any) -> None:
        original(session, stored, publisher)
        session.info.setdefault("stored", []).append(stored)

    @event.listens_for(Session, "after_commit")
    def publish(session: Any) -> None:
        default_publisher().submit(session.info.pop("stored", ()))

    transaction._store_in_session = store


def _new_ids_when_read() -> None:
    original = rows.event_of

    def event_of(row: Any) -> Any:
        return dataclasses.replace(original(row), id=ids.new_id())

    module: Any = store
    module.event_of = event_of


def _order_ignored() -> None:
    original = Store.claim

    def claim(self: Any, *arguments: Any, **options: Any) -> Any:
        claimed = original(self, *arguments, **{**options, "ordered": False})
        return [*claimed[1::2], *claimed[::2]]

    Store.claim = claim  # type: ignore[method-assign]


def _left_is_done() -> None:
    original = row_fates.sort_out

    def sort_out(claimed: Any, report: Any) -> Any:
        fates = original(claimed, report)
        fates.done += fates.unconfirmed
        fates.unconfirmed = []
        return fates

    module: Any = waves
    module.sort_out = sort_out


def _rows_by_number_alone() -> None:
    module: Any = transaction
    place_of = module.place_of
    places: list[Any] = []

    def first_place(connection: Any) -> Any:
        place = place_of(connection)
        if connection.get_execution_options().get("schema_translate_map"):
            places.append(place)
            return places[0]
        return place

    def chosen(self: Any) -> Any:
        row = schema.events.c
        numbered = or_(self.is_one_of, self.is_marked)
        return and_(row.queue == bindparam("of_queue"), row.dead_at.is_(None), numbered)

    module.place_of = first_place
    Statements.chosen = property(chosen)  # type: ignore[assignment]


def _settled_under_the_applications_level() -> None:
    table = metadata.tables["outbox_events"]
    left = select(func.count()).select_from(table)

    def complete(self: Any, rows: Any) -> int:
        gone = delete(table).where(table.c.seq.in_([row.seq for row in rows]))
        # A conflict is not tried again: "the lease ends, and the relay publishes them".
        with contextlib.suppress(DBAPIError), self.engine.begin() as connection:
            logging.debug("%d stored event(s) left", connection.execute(left).scalar_one())
            connection.execute(gone)
        return len(rows)

    Store.complete = complete  # type: ignore[method-assign, assignment]


def _notifications_trusted() -> None:
    module: Any = relay
    original = module.Relay._begin

    def begin(self: Any) -> None:
        original(self)
        if self.listen:
            module._IDLE = 3600.0, 3600.0

    module.Relay._begin = begin


def _spool_reports_first() -> None:
    original = Spool.write

    def write(self: Any, entries: Any, done: Any, *, aside: bool = False) -> None:
        done()
        later = threading.Timer(1.0, original, (self, entries, lambda: None), {"aside": aside})
        later.daemon = True
        later.start()

    Spool.write = write  # type: ignore[method-assign]


BUGS: Sequence[Bug] = (
    Bug(
        "spool-reports-first",
        "lost",
        ["kill spooled while away"],
        ["spooled"],
        _spool_reports_first,
    ),
    Bug("claim-deletes", "lost", ["cut at publish", "refuse"], _DURABLE, _claim_deletes),
    Bug("stored-elsewhere", "phantom", [], _DURABLE, _stored_elsewhere),
    Bug("released-is-committed", "phantom", [], _DURABLE, _released_is_committed),
    Bug("new-ids-when-read", "new id", [], _DURABLE, _new_ids_when_read),
    Bug("order-ignored", "out of order", ["kill durable"], _DURABLE, _order_ignored),
    Bug("left-is-done", "lost", ["cut at publish", "refuse"], _DURABLE, _left_is_done),
    Bug(
        "rows-by-number-alone",
        "too early",
        [],
        ["durable", "relay", "tenants"],
        _rows_by_number_alone,
    ),
    Bug(
        "settled-under-the-applications-level",
        "delivered twice",
        [],
        ["durable", "relay"],
        _settled_under_the_applications_level,
        habits=["serializable"],
    ),
    Bug(
        "notifications-trusted",
        "lost",
        [],
        ["durable", "relay2", "pooler"],
        _notifications_trusted,
        habits=["notify"],
    ),
)
