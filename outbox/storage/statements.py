"""The statements of the store, each built once; only its parameters change from call to call.

Building a statement takes longer than the database takes to run it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
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
    case,
    cast,
    delete,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT

from outbox.storage.clock import in_seconds, now, seconds_after, seconds_since
from outbox.storage.schema import GRACE, events

__all__ = ["Statements", "statements"]

# A parameter must not have the name of a column.
_QUEUE = bindparam("of_queue", type_=String)
_RANK = bindparam("of_rank", type_=Integer)
_AT_MOST = bindparam("at_most", type_=Integer)
_AFTER = bindparam("after", type_=String)
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

    def firsts(self, heads: dict[str, int]) -> dict[str, Any]:
        """Return the first row of each key as parameters of the statements for rows behind it."""
        if self._is_postgresql:
            return {"keys": list(heads), "firsts": list(heads.values())}
        return {"keys": json.dumps(list(heads))}

    @functools.cached_property
    def is_one_of(self) -> ColumnElement[bool]:
        """Whether a row is one of ``numbers``."""
        if self._is_postgresql:
            return events.c.seq == any_(bindparam("numbers", type_=ARRAY(BIGINT)))
        each = func.json_each(bindparam("numbers", type_=Text)).table_valued("value")
        return events.c.seq.in_(select(each.c.value))

    def marks(self, ids: Mapping[int, str]) -> Any:
        """Return numbers and ids of rows as the parameter ``marks``."""
        marks = [f"{seq} {id}" for seq, id in ids.items()]
        return marks if self._is_postgresql else json.dumps(marks)

    @functools.cached_property
    def is_marked(self) -> ColumnElement[bool]:
        """Whether number and id of a row, one of ``numbers``, are among ``marks``."""
        mark = cast(events.c.seq, Text) + " " + events.c.id
        if self._is_postgresql:
            marked = mark == any_(bindparam("marks", type_=ARRAY(Text)))
        else:
            each = func.json_each(bindparam("marks", type_=Text)).table_valued("value")
            marked = mark.in_(select(each.c.value))
        return and_(self.is_one_of, marked)

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
        """Whether a row of ``of_queue`` is one of ``marks``, and due or within its grace."""
        row = events.c
        # A row that was claimed before is leased or backing off until it is due.
        in_grace = and_(row.deliveries == 0, row.available_at <= in_seconds(literal(GRACE)))
        return and_(
            row.queue == _QUEUE,
            row.dead_at.is_(None),
            self.is_marked,
            or_(row.available_at <= now(), in_grace),
        )

    @functools.cached_property
    def alive(self) -> Select[Any]:
        """The numbers of those rows of ``marks`` that are alive."""
        return select(events.c.seq).where(self.is_marked, events.c.dead_at.is_(None))

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
    def lease_due_named(self) -> Update:
        """Lease those of ``numbers`` that are due."""
        # Without the queue, so that no database walks the index of what is due there to find them.
        row = events.c
        return self._lease(and_(self.is_one_of, row.dead_at.is_(None), row.available_at <= now()))

    @functools.cached_property
    def lease_first_chosen(self) -> Update:
        """Lease chosen rows that are the first of their key."""
        earlier = events.alias("earlier")
        is_first = ~exists().where(
            earlier.c.queue == _QUEUE,
            earlier.c.key == events.c.key,
            earlier.c.seq < events.c.seq,
            earlier.c.dead_at.is_(None),
            _has_its_place(earlier),
        )
        return self._lease(and_(self.chosen, or_(events.c.key.is_(None), is_first)))

    @functools.cached_property
    def near(self) -> Select[Any]:
        """What an ordered claim may take of the ``among`` oldest due rows: in one row.

        ``size`` is how many rows were looked at, ``found`` how many of them may be taken: those
        without a key, and the first rows of the others' keys if they are due. ``numbers`` is the
        parameter that names them.
        """
        row = events.c
        window = (
            select(row.seq, row.key)
            .where(self.due)
            .order_by(row.available_at, row.seq)
            .limit(_AMONG)
            .cte("near")
            .prefix_with("MATERIALIZED")
        )
        keys = select(window.c.key).where(window.c.key.is_not(None)).distinct().subquery("keys")
        unkeyed = select(window.c.seq).where(window.c.key.is_(None))
        heads = select(_due_head_of(keys.c.key)).select_from(keys)  # NULL where it isn't due
        found = union_all(unkeyed, heads).subquery("found")
        gathered = func.array_agg if self._is_postgresql else func.json_group_array
        size = select(func.count()).select_from(window).scalar_subquery()
        return select(
            gathered(found.c.seq).label("numbers"), func.count().label("found"), size.label("size")
        ).where(found.c.seq.is_not(None))

    @functools.cached_property
    def heads(self) -> Select[Any]:
        """The first ``among`` keys from ``after`` on, each with its first row if that is due.

        A loose index scan: it jumps from key to key, and reads one row of each, however many rows
        wait behind that one.
        """

        def first_key(condition: Callable[[Any], ColumnElement[bool]]) -> Any:
            row = events.alias("next")
            return (
                select(row.c.key)
                .where(row.c.queue == _QUEUE, row.c.dead_at.is_(None), condition(row.c.key))
                .order_by(row.c.key)
                .limit(1)
                .scalar_subquery()
            )

        key = first_key(lambda column: column >= _AFTER)
        keys = select(key.label("key"), literal(1).label("place")).cte("keys", recursive=True)
        following = first_key(lambda column: column > keys.c.key)
        keys = keys.union_all(
            select(following, keys.c.place + 1).where(
                keys.c.key.is_not(None), keys.c.place < _AMONG
            )
        )
        return select(keys.c.key, _due_head_of(keys.c.key).label("seq")).where(
            keys.c.key.is_not(None)
        )

    @functools.cached_property
    def new_unkeyed(self) -> Select[Any]:
        """The oldest ``at_most`` rows of the relay that are due, have no key and are new."""
        row = events.c
        return self._unkeyed(
            # As in the index's condition, which a parameter would not match.
            row.queue == literal_column("''"),
            row.deliveries == literal_column("0"),
            row.dead_at.is_(None),
            row.available_at <= now(),
        )

    @functools.cached_property
    def unkeyed(self) -> Select[Any]:
        """The oldest ``at_most`` rows that are due and have no key; reads all that are due."""
        return self._unkeyed(self.due)

    @functools.cached_property
    def following_due(self) -> Select[Any]:
        """Rows of ``keys`` from the first on, in order, and whether they are due."""
        return self._following(self.due)

    @functools.cached_property
    def following_chosen(self) -> Select[Any]:
        """Rows of ``keys`` from the first on, in order, and whether they are chosen."""
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

    def _unkeyed(self, *conditions: ColumnElement[bool]) -> Select[Any]:
        row = events.c
        return (
            select(row.seq)
            .where(row.key.is_(None), *conditions)
            .order_by(row.available_at, row.seq)
            .limit(_AT_MOST)
        )

    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        row = events.c
        free = or_(row.lease_token.is_(None), row.available_at <= now())
        behind = select(
            row.seq,
            row.key,
            func.length(row.payload).label("size"),
            and_(condition, free).label("ready"),
        ).where(row.queue == _QUEUE, row.dead_at.is_(None), _has_its_place(events))
        if not self._is_postgresql:
            # Key by key, in the order of the index: no key's rows are all read to be sorted.
            each = func.json_each(bindparam("keys", type_=Text)).table_valued("value")
            of_keys = behind.where(row.key.in_(select(each.c.value)))
            return of_keys.order_by(row.key, row.seq).limit(_AT_MOST)
        firsts = (
            func.unnest(
                bindparam("keys", type_=ARRAY(Text)), bindparam("firsts", type_=ARRAY(BIGINT))
            )
            .table_valued("key", "seq", name="firsts")
            .render_derived()
        )
        # Likewise; an IN would be sorted here.
        of_key = (
            behind.where(_is_key(row.key, firsts.c.key), row.seq > firsts.c.seq)
            .order_by(row.key, row.seq)
            .limit(_AT_MOST)
            .lateral("behind")
        )
        return select(of_key).select_from(firsts.join(of_key, true())).limit(_AT_MOST)


@functools.cache
def statements(*, is_postgresql: bool) -> Statements:
    """Return the statements for PostgreSQL or SQLite, built once per process."""
    return Statements(is_postgresql=is_postgresql)


def _has_its_place(row: Any) -> ColumnElement[bool]:
    """Whether ``row`` stands in the order of its key: not if it is scheduled for later.

    A row that has been claimed keeps its place while it backs off, and so does a new one in its
    grace period.
    """
    return or_(
        row.c.deliveries > 0,
        row.c.available_at <= now(),
        row.c.available_at <= seconds_after(row.c.stored_at, literal_column(str(GRACE + 0.01))),
    )


def _due_head_of(key: ColumnElement[str]) -> Any:
    """The number of the first row of ``key``; NULL if it isn't due."""
    head = events.alias("head")
    is_due = and_(head.c.rank == _RANK, head.c.available_at <= now())
    return (
        select(case((is_due, head.c.seq)).label("seq"))
        .where(
            head.c.queue == _QUEUE,
            _is_key(head.c.key, key),
            head.c.dead_at.is_(None),
            _has_its_place(head),
        )
        .order_by(head.c.key, head.c.seq)
        .limit(1)
        .scalar_subquery()
    )


def _is_key(column: ColumnElement[Any], key: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether ``column`` equals ``key``, in a query that orders by the column and the number.

    With a plain ``=`` PostgreSQL may decide to walk the primary key until it meets the key, since
    that has the right order, too: past a whole backlog.
    """
    return and_(column >= key, column <= key)
