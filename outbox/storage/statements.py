"""The statements of the store, each built once; only its parameters change from call to call.

Building a statement takes longer than the database takes to run it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    Float,
    Integer,
    Select,
    String,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT

from outbox.storage.clock import in_seconds, now, seconds_since
from outbox.storage.schema import events

__all__ = ["Statements", "statements"]

# A parameter must not have the name of a column.
_QUEUE = bindparam("of_queue", type_=String)
_RANK = bindparam("of_rank", type_=Integer)
_AT_MOST = bindparam("at_most", type_=Integer)
_AMONG = bindparam("among", type_=Integer)
_MAX_BYTES = bindparam("max_bytes", type_=Integer)
_SECONDS = bindparam("seconds", type_=Float)
_TOKEN = bindparam("of_token", type_=String)
_WHY = bindparam("why", type_=Text)
_FAILURES = bindparam("failures", type_=Integer)

_WITH_AGE = (events, seconds_since(events.c.stored_at).label("age"))


class Statements:
    """The statements for one kind of database. Thread-safe."""

    def __init__(self, *, is_postgresql: bool) -> None:
        """Build each statement when it is first used."""
        self._is_postgresql = is_postgresql

    def numbers(self, seqs: Sequence[int]) -> Any:
        """Return ``seqs`` as the parameter ``numbers``: one parameter for any number of rows."""
        return list(seqs) if self._is_postgresql else json.dumps(list(seqs))

    @functools.cached_property
    def is_one_of(self) -> ColumnElement[bool]:
        """Whether a row is one of ``numbers``."""
        if self._is_postgresql:
            return events.c.seq == any_(bindparam("numbers", type_=ARRAY(BIGINT)))
        each = func.json_each(bindparam("numbers", type_=Text)).table_valued("value")
        return events.c.seq.in_(select(each.c.value))

    @functools.cached_property
    def due(self) -> ColumnElement[bool]:
        """Whether a row of ``of_queue`` and ``of_rank`` is due."""
        row = events.c
        return and_(
            row.queue == _QUEUE,
            row.rank == _RANK,
            row.dead_at.is_(None),
            row.available_at <= now(),
        )

    @functools.cached_property
    def chosen(self) -> ColumnElement[bool]:
        """Whether a row of ``of_queue`` is one of ``numbers`` and isn't leased."""
        row = events.c
        return and_(
            row.queue == _QUEUE,
            row.dead_at.is_(None),
            self.is_one_of,
            row.lease_token.is_(None),
        )

    @functools.cached_property
    def highest_rank(self) -> Select[Any]:
        """The highest rank in ``of_queue`` that is below ``of_rank``."""
        row = events.c
        return select(func.max(row.rank)).where(
            row.queue == _QUEUE, row.dead_at.is_(None), row.rank < _RANK
        )

    @functools.cached_property
    def lease_due(self) -> Update:
        """Lease due rows."""
        return self._lease(self.due)

    @functools.cached_property
    def lease_chosen(self) -> Update:
        """Lease chosen rows."""
        return self._lease(self.chosen)

    @functools.cached_property
    def lease_named(self) -> Update:
        """Lease ``numbers``, whatever their state."""
        return self._lease(self.is_one_of)

    @functools.cached_property
    def lease_first_chosen(self) -> Update:
        """Lease chosen rows that are the first of their key."""
        return self._lease(and_(self.chosen, _is_first_of_its_key()))

    @functools.cached_property
    def lease_first_due(self) -> Update:
        """Lease due rows that are the first of their key."""
        return self._lease(and_(self.due, _is_first_of_its_key()))

    @functools.cached_property
    def lease_first_due_near(self) -> Update:
        """Lease, of the ``among`` oldest due rows, those that are the first of their key."""
        row = events.c
        window = select(row.seq).where(self.due).order_by(row.available_at, row.seq).limit(_AMONG)
        return self._lease(
            and_(self.due, row.seq.in_(window.scalar_subquery()), _is_first_of_its_key())
        )

    @functools.cached_property
    def following_due(self) -> Select[Any]:
        """Rows of ``keys`` in their order, and whether they are due."""
        return self._following(self.due)

    @functools.cached_property
    def following_chosen(self) -> Select[Any]:
        """Rows of ``keys`` in their order, and whether they are chosen."""
        return self._following(self.chosen)

    @functools.cached_property
    def leased(self) -> Select[Any]:
        """The row ``number``, as a claim returns it."""
        return select(*_WITH_AGE).where(events.c.seq == bindparam("number"))

    @functools.cached_property
    def complete(self) -> Delete:
        """Delete ``numbers`` of the lease ``of_token``."""
        return delete(events).where(self._ours)

    @functools.cached_property
    def release(self) -> Update:
        """Release ``numbers`` of the lease ``of_token``."""
        return (
            update(events)
            .where(self._ours)
            .values(
                lease_token=None,
                available_at=in_seconds(_SECONDS),
                reason=_WHY,
                attempts=events.c.attempts + _FAILURES,
            )
        )

    @functools.cached_property
    def release_in_place(self) -> Update:
        """Release ``numbers`` of the lease ``of_token``, due since they were stored."""
        return (
            update(events)
            .where(self._ours)
            .values(
                lease_token=None,
                available_at=events.c.stored_at,
                reason=_WHY,
                attempts=events.c.attempts + _FAILURES,
            )
        )

    @functools.cached_property
    def leases(self) -> Select[Any]:
        """The lease that holds each of ``numbers``, if any."""
        return select(events.c.seq, events.c.lease_token).where(self.is_one_of)

    @functools.cached_property
    def extend(self) -> Update:
        """Extend the lease ``of_token`` of ``numbers``."""
        return update(events).where(self._ours).values(available_at=in_seconds(_SECONDS))

    @functools.cached_property
    def bury(self) -> Update:
        """Mark ``numbers`` of the lease ``of_token`` dead."""
        return (
            update(events)
            .where(self._ours)
            .values(lease_token=None, dead_at=now(), reason=_WHY, attempts=events.c.attempts + 1)
        )

    @functools.cached_property
    def _ours(self) -> ColumnElement[bool]:
        return and_(self.is_one_of, events.c.lease_token == _TOKEN)

    def _lease(self, condition: ColumnElement[bool]) -> Update:
        """Lease the oldest rows that meet ``condition``, up to ``at_most`` and ``max_bytes``."""
        row = events.c
        oldest = (
            select(row.seq, row.available_at, func.length(row.payload).label("size"))
            .where(condition)
            .order_by(row.available_at, row.seq)
            .limit(_AT_MOST)
        )
        if self._is_postgresql:
            oldest = oldest.with_for_update(skip_locked=True)
        # Materialised: a plan that evaluates it twice would lease more rows than the limit.
        due = oldest.cte("due").prefix_with("MATERIALIZED")
        before = func.sum(due.c.size).over(order_by=(due.c.available_at, due.c.seq)) - due.c.size
        bounded = select(due.c.seq, before.label("before")).subquery("bounded")
        return (
            update(events)
            .where(row.seq.in_(select(bounded.c.seq).where(bounded.c.before < _MAX_BYTES)))
            .values(
                lease_token=_TOKEN,
                available_at=in_seconds(_SECONDS),
                deliveries=row.deliveries + 1,
            )
            .returning(*_WITH_AGE)
        )

    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        row = events.c
        free = or_(row.lease_token.is_(None), row.available_at <= now())
        return (
            select(
                row.seq,
                row.key,
                func.length(row.payload).label("size"),
                and_(condition, free).label("ready"),
            )
            .where(
                row.key.in_(bindparam("keys", expanding=True)),
                row.queue == _QUEUE,
                row.dead_at.is_(None),
            )
            .order_by(row.key, row.seq)
            .limit(_AT_MOST)
        )


@functools.cache
def statements(*, is_postgresql: bool) -> Statements:
    """Return the statements for PostgreSQL or SQLite, built once per process."""
    return Statements(is_postgresql=is_postgresql)


def _is_first_of_its_key() -> ColumnElement[bool]:
    earlier = events.alias("earlier")
    return or_(
        events.c.key.is_(None),
        ~exists().where(
            earlier.c.queue == events.c.queue,
            earlier.c.key == events.c.key,
            earlier.c.seq < events.c.seq,
            earlier.c.dead_at.is_(None),
        ),
    )
