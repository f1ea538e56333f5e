"""The statements of the store, each built once; only its parameters change from call to call.

Building a statement takes longer than the database takes to run it.
"""

from __future__ import annotations

import datetime
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    Delete,
    Float,
    Insert,
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
    column,
    delete,
    exists,
    extract,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT
from sqlalchemy.sql.dml import ReturningInsert

from outbox.storage.clock import (
    ExactTimestamp,
    Timestamp,
    in_seconds,
    now,
    seconds_after,
    seconds_since,
)
from outbox.storage.drivers.arrays import ArrayOf
from outbox.storage.drivers.direct import execute_alone
from outbox.storage.floors import Span
from outbox.storage.schema import GRACE, events
from outbox.storage.upkeep.published_rows import moving

__all__ = ["NEVER", "OWNER_LENGTH", "ClaimedRow", "Statements", "statements"]

# A parameter must not have the name of a column.
_QUEUE = bindparam("of_queue", type_=String)
_RANK = bindparam("of_rank", type_=Integer)
_AT_MOST = bindparam("at_most", type_=Integer)
_AFTER = bindparam("after", type_=String)
_AMONG = bindparam("among", type_=Integer)
_MAX_BYTES = bindparam("max_bytes", type_=Integer)
_FLOOR = bindparam("floor", type_=Timestamp)
_SECONDS = bindparam("seconds", type_=Float)
_TOKEN = bindparam("of_token", type_=String)
_WHY = bindparam("why", type_=Text)
_FAILURES = bindparam("failures", type_=Integer)

OWNER_LENGTH = 12
"""The characters of a lease's token that name its owner."""

_RANKS = tuple(range(256))  # the priorities of AMQP
_FEW_ROWS = {"insertmanyvalues_page_size": 100}
_FEW = 5  # rows that PostgreSQL inserts as quickly one by one
NEVER = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)
"""When dead rows are due on MariaDB, whose indexes have no condition."""


class ClaimedRow(NamedTuple):
    """What a claim returns of a row, in this order.

    Reading all columns takes twice the time; and a name of a tuple is found at once, while
    SQLAlchemy looks up a row's in a mapping.
    """

    seq: int
    queue: str
    id: Any
    type: Any
    exchange: Any
    payload: Any
    content_type: Any
    headers: Any
    key: Any
    priority: Any
    unroutable: Any
    occurred_at: Any
    deliveries: int
    attempts: int
    age: float


_CLAIMED = (
    *(events.c[name] for name in ClaimedRow._fields[:-1]),
    seconds_since(events.c.stored_at).label("age"),
)


class Statements(ABC):
    """The statements for one kind of database. Thread-safe.

    A statement is built when it is first used. A subclass adds what the databases don't share:
    how many rows are named by one parameter, and how rows are leased.
    """

    indexes_all_unkeyed = False
    """Whether an index has all alive rows without a key, so that ``unkeyed`` reads only those."""

    def lease(
        self, connection: Connection, statement: Any, parameters: dict[str, Any]
    ) -> Sequence[Any]:
        """Run one of the statements ``lease_...``, and return the rows that it has leased."""
        return connection.execute(statement, parameters).all()

    @abstractmethod
    def numbers(self, seqs: Sequence[int]) -> Any:
        """Return ``seqs`` as the parameter ``numbers``: one parameter for any number of rows."""

    def gathered(self, numbers: Any) -> Any:
        """Return the numbers that :attr:`near` has found as the parameter ``numbers``."""
        return numbers

    @abstractmethod
    def marks(self, ids: Mapping[int, str]) -> Any:
        """Return numbers and ids of rows as the parameter ``marks``."""

    @abstractmethod
    def firsts(self, heads: dict[str, int]) -> dict[str, Any]:
        """Return the first row of each key as parameters of the statements for rows behind it."""

    @functools.cached_property
    @abstractmethod
    def is_one_of(self) -> ColumnElement[bool]:
        """Whether a row is one of ``numbers``."""

    @functools.cached_property
    @abstractmethod
    def is_marked(self) -> ColumnElement[bool]:
        """Whether number and id of a row, one of ``numbers``, are among ``marks``."""

    def put_rows(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """Insert rows that have the same columns."""
        connection.execute(self.put, rows)

    @functools.cached_property
    def put(self) -> Insert | ReturningInsert[Any]:
        """Insert rows."""
        return insert(events)

    def put_rows_if(
        self,
        connection: Connection,
        rows: Sequence[dict[str, Any]],
        condition: ColumnElement[bool],
        parameters: Mapping[str, Any],
    ) -> bool:
        """Insert rows that have the same columns if ``condition`` holds; return whether it did."""
        raise NotImplementedError

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
    def firsts_of_ranks(self) -> Select[Any]:
        """Of each rank in each of ``queues``: the row that is due first.

        Seeks from rank to rank, so that the cost doesn't grow with the number of rows.
        """
        lower = events.alias("lower")

        def highest(queue: ColumnElement[str], *conditions: ColumnElement[bool]) -> Any:
            of_queue = and_(lower.c.queue == queue, lower.c.dead_at.is_(None), *conditions)
            return select(func.max(lower.c.rank)).where(of_queue).scalar_subquery()

        names = self._names
        ranks = select(names.c.value.label("queue"), highest(names.c.value).label("rank"))
        cte = ranks.cte("ranks", recursive=True)
        next_rank = highest(cte.c.queue, lower.c.rank < cte.c.rank)
        cte = cte.union_all(select(cte.c.queue, next_rank).where(cte.c.rank.is_not(None)))
        due_at = _first_due_at(cte.c.queue, cte.c.rank, events.c.dead_at.is_(None))
        firsts = select(cte.c.queue, cte.c.rank, due_at.label("due_at"))
        return _with_due_in(firsts.where(cte.c.rank.is_not(None)).subquery("firsts"))

    def spans(self, spans: Sequence[Span]) -> dict[str, Any]:
        """Return ``spans`` as parameters of :attr:`exchange`."""
        raise NotImplementedError

    def firsts_above(self, connection: Connection, spans: Sequence[Span]) -> Sequence[Any]:
        """Return the same for the ranks of ``spans``, above their floors.

        Each row has in ``new_rank`` a rank between its own and the next one, if it was looked for
        and there is any.
        """
        raise NotImplementedError

    @abstractmethod
    def names(self, queues: Sequence[str]) -> Any:
        """Return ``queues`` as the parameter ``queues``."""

    @functools.cached_property
    @abstractmethod
    def _names(self) -> Any:
        """The elements of ``queues``, as a table with the column ``value``."""

    @functools.cached_property
    def lease_due(self) -> Update | Select[Any]:
        """Lease rows that are due, from ``floor`` on."""
        return self._lease(self.due_from_floor)

    @functools.cached_property
    def due_from_floor(self) -> ColumnElement[bool]:
        """Whether a row is due, and not below ``floor``: all below are leased, deleted or dead."""
        return and_(self.due, events.c.available_at >= _FLOOR)

    @functools.cached_property
    def first_due(self) -> Select[Any]:
        """The numbers of the oldest ``at_most`` rows that ``lease_due`` may lease, in order."""
        row = events.c
        oldest = select(row.seq).where(self.due_from_floor).order_by(row.available_at, row.seq)
        return self.by_due(oldest.limit(_AT_MOST))

    @functools.cached_property
    def lease_chosen(self) -> Update | Select[Any]:
        """Lease chosen rows."""
        return self._lease(self.chosen)

    @functools.cached_property
    def lease_due_named(self) -> Update | Select[Any]:
        """Lease those of ``numbers`` that are due."""
        # Without the queue, so that no database walks the index of what is due there to find them.
        row = events.c
        return self._lease(and_(self.is_one_of, row.dead_at.is_(None), row.available_at <= now()))

    @functools.cached_property
    def lease_first_chosen(self) -> Update | Select[Any]:
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
        due = self.due_from_floor
        oldest = select(row.seq, row.key).where(due).order_by(row.available_at, row.seq)
        window = self._materialized(self.by_due(oldest.limit(_AMONG)).cte("near"))
        keys = select(window.c.key).where(window.c.key.is_not(None)).distinct().subquery("keys")
        unkeyed = select(window.c.seq).where(window.c.key.is_(None))
        heads = select(self._due_head_of(keys.c.key)).select_from(keys)  # NULL where it isn't due
        found = union_all(unkeyed, heads).subquery("found")
        size = select(func.count()).select_from(window).scalar_subquery()
        return select(
            self._gather(found.c.seq).label("numbers"),
            func.count().label("found"),
            size.label("size"),
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
        return select(keys.c.key, self._due_head_of(keys.c.key).label("seq")).where(
            keys.c.key.is_not(None)
        )

    @functools.cached_property
    def keys_in_hand(self) -> Select[Any]:
        """The keys in ``of_queue`` of which a row is leased, for at most ``seconds``.

        Seeks what is leased, which is due soon, in every rank there may be.
        """
        row = events.c
        in_hand = and_(row.queue == _QUEUE, self._in_hand, row.key.is_not(None))
        return self.by_due(select(row.key).where(in_hand)).distinct()

    @functools.cached_property
    def held(self) -> Select[Any]:
        """The rows in ``queues`` that ``owners`` lease, for at most ``seconds``."""
        row = events.c
        owner = func.substr(row.lease_token, 1, OWNER_LENGTH)
        return self.by_due(
            select(row.seq, row.lease_token).where(
                row.queue.in_(bindparam("queues", type_=String, expanding=True)),
                self._in_hand,
                owner.in_(bindparam("owners", type_=String, expanding=True)),
            )
        )

    @functools.cached_property
    def _in_hand(self) -> ColumnElement[bool]:
        """Whether a row is leased for at most ``seconds``: such a row is due soon."""
        row = events.c
        return and_(
            row.rank.in_(_RANKS),
            row.dead_at.is_(None),
            row.available_at > now(),
            # Twice, since the clock may have been set back.
            row.available_at <= in_seconds(2 * _SECONDS),
            row.lease_token.is_not(None),
        )

    @functools.cached_property
    def lease_free_named(self) -> Update | Select[Any]:
        """The same as ``lease_due_named``, without rows of the keys ``in_hand``."""
        row = events.c
        in_hand = bindparam("in_hand", type_=String, expanding=True)
        is_free = or_(row.key.is_(None), row.key.not_in(in_hand))
        return self._lease(
            and_(self.is_one_of, row.dead_at.is_(None), row.available_at <= now(), is_free)
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
    def passed(self) -> Select[Any]:
        """Of the ``among`` due rows behind a position: those without a key, and else the last one.

        The position is ``behind_at`` and ``behind_seq``. Of those without a key at most ``at_most``
        come. ``size`` is how many rows were looked at, and ``late`` a moment a second before a row
        was due.
        """
        row = events.c
        exact = type_coerce(row.available_at, ExactTimestamp)
        position: ColumnElement[Any] = tuple_(
            bindparam("behind_at", type_=ExactTimestamp), bindparam("behind_seq", type_=BigInteger)
        )
        oldest = (
            select(row.seq, row.key, exact.label("due_at"))
            .where(self.due, tuple_(exact, row.seq) > position)
            .order_by(row.available_at, row.seq)
            .limit(_AMONG)
        )
        window = self._materialized(self.by_due(oldest).cte("passed"))
        latest = select(window.c.seq).order_by(window.c.due_at.desc(), window.c.seq.desc()).limit(1)
        is_last = window.c.seq == latest.scalar_subquery()
        late = seconds_after(window.c.due_at, literal(-1.0))
        return (
            select(
                *window.c,
                type_coerce(late, ExactTimestamp).label("late"),
                select(func.count()).select_from(window).scalar_subquery().label("size"),
            )
            .where(or_(window.c.key.is_(None), is_last))
            .order_by(window.c.due_at, window.c.seq)
            .limit(_AT_MOST)
        )

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
        return select(*_CLAIMED).where(events.c.seq == bindparam("number"))

    @functools.cached_property
    def named(self) -> Select[Any]:
        """The rows ``numbers``, as a claim returns them."""
        return select(*_CLAIMED).where(self.is_one_of)

    @functools.cached_property
    def complete(self) -> Delete:
        """Delete ``numbers`` of the lease ``of_token``."""
        return delete(events).where(self._ours)

    @functools.cached_property
    def exchange(self) -> Update | None:
        """Delete ``numbers`` of the leases ``of_tokens``, and lease rows of ``of_queue``.

        Those rows are due, of the highest rank of the spans that has any, and not leased by
        ``of_owner``; none if there is a rank beside the spans. Each comes as a :class:`ClaimedRow`,
        its rank, the seconds for which it was due, and the seconds of the server's clock. None
        except on PostgreSQL.
        """
        return None

    @functools.cached_property
    def keep(self) -> Insert:
        """Copy ``numbers`` of the lease ``of_token`` to those that are kept, for ``seconds``."""
        return moving(self._ours)

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
    def back_off(self) -> Update:
        """The same as ``release``, with other headers."""
        return self.release.values(headers=bindparam("new_headers", type_=Text))

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

    @abstractmethod
    def _lease(self, condition: ColumnElement[bool]) -> Update | Select[Any]:
        """Lease the oldest rows that meet ``condition``, up to ``at_most`` and ``max_bytes``."""

    @abstractmethod
    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        """Rows of ``keys`` from the first on, in order, and whether they meet ``condition``."""

    @abstractmethod
    def _gather(self, numbers: ColumnElement[int]) -> ColumnElement[Any]:
        """Gather ``numbers`` in one value."""

    def _materialized(self, cte: CTE) -> CTE:
        """Have ``cte`` evaluated once."""
        return cte.prefix_with("MATERIALIZED")

    def by_due(self, statement: Select[Any]) -> Select[Any]:
        """Have rows read in the order of the index of what is due."""
        return statement

    def _by_key(self, statement: Select[Any], table: Any = events) -> Select[Any]:
        """Have rows read in the order of the index of the keys."""
        return statement

    def _is_key(self, column: ColumnElement[Any], key: ColumnElement[Any]) -> ColumnElement[bool]:
        """Whether ``column`` equals ``key``, in a query that orders by column and number."""
        # With a plain ``=`` PostgreSQL may decide to walk the primary key until it meets the key,
        # since that has the right order, too: past a whole backlog.
        return and_(column >= key, column <= key)

    def _order_of_heads(self, row: Any) -> Sequence[ColumnElement[Any]]:
        """The order of the rows of one key, so that it comes from the index of the keys."""
        return (row.key, row.seq)

    def _unkeyed(self, *conditions: ColumnElement[bool]) -> Select[Any]:
        row = events.c
        oldest = select(row.seq).where(row.key.is_(None), *conditions)
        return oldest.order_by(row.available_at, row.seq).limit(_AT_MOST)

    def _behind(self, condition: ColumnElement[bool]) -> Select[Any]:
        """Rows that have their place, and whether they meet ``condition`` and are free."""
        row = events.c
        free = or_(row.lease_token.is_(None), row.available_at <= now())
        return select(
            row.seq,
            row.key,
            func.length(row.payload).label("size"),
            and_(condition, free).label("ready"),
        ).where(row.queue == _QUEUE, row.dead_at.is_(None), _has_its_place(events))

    def _due_head_of(self, key: ColumnElement[str]) -> Any:
        """The number of the first row of ``key``; NULL if it isn't due."""
        head = events.alias("head")
        is_due = and_(head.c.rank == _RANK, head.c.available_at <= now())
        first = (
            select(case((is_due, head.c.seq)).label("seq"))
            .where(
                head.c.queue == _QUEUE,
                self._is_key(head.c.key, key),
                head.c.dead_at.is_(None),
                _has_its_place(head),
            )
            .order_by(*self._order_of_heads(head.c))
            .limit(1)
        )
        return self._by_key(first, head).scalar_subquery()


class _InOneStatement(Statements):
    """Those of databases that return what they update."""

    _lock = False  # whether to lock the rows first, and to skip those that others have locked

    def _lease(self, condition: ColumnElement[bool]) -> Update | Select[Any]:
        row = events.c
        oldest = (
            select(row.seq, row.available_at, func.length(row.payload).label("size"))
            .where(condition)
            .order_by(row.available_at, row.seq)
            .limit(_AT_MOST)
        )
        if self._lock:
            oldest = oldest.with_for_update(skip_locked=True)
        bounded = self._bounded(oldest)
        return (
            _leased_rows()
            .where(row.seq.in_(select(bounded.c.seq).where(bounded.c.before < _MAX_BYTES)))
            .returning(*_CLAIMED)
        )

    def _bounded(self, oldest: Select[Any]) -> Any:
        """Add to rows what those before them have in bytes."""
        # A plan that evaluates it twice would lease more rows than the limit.
        due = self._materialized(oldest.cte("due"))
        before = func.sum(due.c.size).over(order_by=(due.c.available_at, due.c.seq)) - due.c.size
        return select(*due.c, before.label("before")).subquery("bounded")


class _PostgreSQLStatements(_InOneStatement):
    _lock = True

    def put_rows(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        # The server would parse and plan the statement for each row, since it can't be prepared.
        if len(rows) < _FEW:
            super().put_rows(connection, rows)
        else:
            connection.execute(_put_columns(tuple(rows[0])), _columns(rows))

    def put_rows_if(
        self,
        connection: Connection,
        rows: Sequence[dict[str, Any]],
        condition: ColumnElement[bool],
        parameters: Mapping[str, Any],
    ) -> bool:
        names = tuple(rows[0])
        if len(rows) == 1:
            statement, values = _put_one_if(names, condition), _new(rows[0])
        else:
            statement, values = _put_columns(names, condition), _columns(rows)
        return execute_alone(connection, statement, {**values, **parameters}) > 0

    def names(self, queues: Sequence[str]) -> Any:
        return list(queues)

    @functools.cached_property
    def _names(self) -> Any:
        names = func.unnest(bindparam("queues", type_=ARRAY(Text)))
        return names.table_valued("value", name="names").render_derived()

    def firsts_above(self, connection: Connection, spans: Sequence[Span]) -> Sequence[Any]:
        return connection.execute(self._firsts_above, self.spans(spans)).all()

    def spans(self, spans: Sequence[Span]) -> dict[str, Any]:
        return {
            "queues": [span.queue for span in spans],
            "ranks": [span.rank for span in spans],
            "nexts": [span.next for span in spans],
            "floors": [span.floor for span in spans],
        }

    @functools.cached_property
    def _firsts_above(self) -> Select[Any]:
        return _with_due_in(self._firsts_of_spans.subquery("firsts"))

    @functools.cached_property
    def _firsts_of_spans(self) -> Select[Any]:
        spans = (
            func.unnest(
                bindparam("queues", type_=ARRAY(Text)),
                bindparam("ranks", type_=ARRAY(Integer)),
                bindparam("nexts", type_=ARRAY(Integer)),
                bindparam("floors", type_=ARRAY(Timestamp)),
            )
            .table_valued(
                "queue",
                column("rank", Integer),
                column("next", Integer),
                column("floor", Timestamp),
                name="spans",
            )
            .render_derived()
        )
        span = spans.c
        row = events.c
        alive = row.dead_at.is_(None)
        between = and_(row.queue == span.queue, row.rank > span.rank, row.rank < span.next, alive)
        above = row.available_at >= span.floor
        return select(
            span.queue,
            span.rank,
            _first_due_at(span.queue, span.rank, alive, above).label("due_at"),
            select(func.min(row.rank)).where(between).scalar_subquery().label("new_rank"),
        )

    @functools.cached_property
    def exchange(self) -> Update:
        row = events.c
        tokens = any_(bindparam("of_tokens", type_=ARRAY(Text)))
        settled = delete(events).where(self.is_one_of, row.lease_token == tokens).cte("settled")
        firsts = self._materialized(self._firsts_of_spans.cte("firsts"))
        has_new_rank = exists(select(firsts.c.rank).where(firsts.c.new_rank.is_not(None)))
        first = self._materialized(
            select(firsts.c.rank, firsts.c.due_at)
            .where(firsts.c.due_at <= now(), ~has_new_rank)
            .order_by(firsts.c.rank.desc())
            .limit(1)
            .cte("first")
        )
        # A row of which the worker itself has the lease, ended or not, is in hand here;
        # among them are those that are deleted, which one statement must not change twice.
        owner = bindparam("of_owner", type_=String)
        is_not_ours = func.left(row.lease_token, func.length(owner)).is_distinct_from(owner)
        due = self._bounded(
            select(row.seq, row.rank, row.available_at, func.length(row.payload).label("size"))
            .where(
                row.queue == _QUEUE,
                row.rank == select(first.c.rank).scalar_subquery(),
                row.dead_at.is_(None),
                row.available_at <= now(),
                row.available_at >= select(first.c.due_at).scalar_subquery(),
                is_not_ours,
            )
            .order_by(row.available_at, row.seq)
            .limit(_AT_MOST)
            .with_for_update(skip_locked=True)
        )
        # As SET LOCAL does, without a round trip: of the transaction that this statement is.
        no_wait = select(func.set_config("synchronous_commit", "off", True)).scalar_subquery()
        return (
            _leased_rows()
            .where(row.seq == due.c.seq, due.c.before < _MAX_BYTES, no_wait == "off")
            .returning(
                *_CLAIMED,
                due.c.rank,
                seconds_since(due.c.available_at).label("due_for"),
                cast(extract("epoch", now()), Float).label("clock"),
            )
            .add_cte(settled)
        )

    def numbers(self, seqs: Sequence[int]) -> Any:
        return list(seqs)

    def marks(self, ids: Mapping[int, str]) -> Any:
        return _marks(ids)

    def firsts(self, heads: dict[str, int]) -> dict[str, Any]:
        return {"keys": list(heads), "firsts": list(heads.values())}

    @functools.cached_property
    def is_one_of(self) -> ColumnElement[bool]:
        return events.c.seq == any_(bindparam("numbers", type_=ARRAY(BIGINT)))

    @functools.cached_property
    def is_marked(self) -> ColumnElement[bool]:
        return and_(self.is_one_of, _mark() == any_(bindparam("marks", type_=ARRAY(Text))))

    def _gather(self, numbers: ColumnElement[int]) -> ColumnElement[Any]:
        return func.array_agg(numbers)

    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        firsts = (
            func.unnest(
                bindparam("keys", type_=ARRAY(Text)), bindparam("firsts", type_=ARRAY(BIGINT))
            )
            .table_valued("key", "seq", name="firsts")
            .render_derived()
        )
        # Key by key, in the order of the index: no key's rows are all read to be sorted, as they
        # would be with an IN.
        row = events.c
        of_key = (
            self._behind(condition)
            .where(self._is_key(row.key, firsts.c.key), row.seq > firsts.c.seq)
            .order_by(row.key, row.seq)
            .limit(_AT_MOST)
            .lateral("behind")
        )
        return select(of_key).select_from(firsts.join(of_key, true())).limit(_AT_MOST)


class _SQLiteStatements(_InOneStatement):
    def names(self, queues: Sequence[str]) -> Any:
        return json.dumps(list(queues))

    @functools.cached_property
    def _names(self) -> Any:
        return func.json_each(bindparam("queues", type_=Text)).table_valued("value")

    def numbers(self, seqs: Sequence[int]) -> Any:
        return json.dumps(list(seqs))

    def marks(self, ids: Mapping[int, str]) -> Any:
        return json.dumps(_marks(ids))

    def firsts(self, heads: dict[str, int]) -> dict[str, Any]:
        return {"keys": json.dumps(list(heads))}

    @functools.cached_property
    def is_one_of(self) -> ColumnElement[bool]:
        return events.c.seq.in_(_each_of("numbers"))

    @functools.cached_property
    def is_marked(self) -> ColumnElement[bool]:
        return and_(self.is_one_of, _mark().in_(_each_of("marks")))

    def _gather(self, numbers: ColumnElement[int]) -> ColumnElement[Any]:
        return func.json_group_array(numbers)

    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        # Key by key, in the order of the index: no key's rows are all read to be sorted.
        of_keys = self._behind(condition).where(events.c.key.in_(_each_of("keys")))
        return of_keys.order_by(events.c.key, events.c.seq).limit(_AT_MOST)


class _MariaDBStatements(Statements):
    """Those of MariaDB, which returns nothing from an UPDATE.

    The order of a claim must come from an index: if the rows were sorted, one claim would lock all
    that are due, and the others would find none. The optimizer prefers sorting in small tables.
    """

    indexes_all_unkeyed = True

    def names(self, queues: Sequence[str]) -> Any:
        return list(queues)

    @functools.cached_property
    def _names(self) -> Any:
        raise NotImplementedError

    @functools.cached_property
    def firsts_of_ranks(self) -> Select[Any]:
        # MariaDB jumps from group to group, if they are the first columns of an index; seeking from
        # rank to rank, it would read all rows up to each. Dead rows are due in the year 9999.
        row = events.c
        firsts = (
            self.by_due(select(row.queue, row.rank, func.min(row.available_at).label("due_at")))
            .where(row.queue.in_(bindparam("queues", type_=String, expanding=True)))
            .group_by(row.queue, row.rank)
        )
        return _with_due_in(firsts.subquery("firsts"))

    def firsts_above(self, connection: Connection, spans: Sequence[Span]) -> Sequence[Any]:
        # It looks for no new rank: in a range without rows, InnoDB reads on through all remains of
        # the next rank. Those are found when the index is read through.
        known = [span for span in spans if span.rank >= 0]
        parameters = {
            f"{name}{number}": value
            for number, span in enumerate(known)
            for name, value in (("queue", span.queue), ("rank", span.rank), ("floor", span.floor))
        }
        return connection.execute(_firsts_above_each(len(known)), parameters).all() if known else []

    def lease(
        self, connection: Connection, statement: Any, parameters: dict[str, Any]
    ) -> Sequence[Any]:
        size, seqs = 0, []
        for row in connection.execute(statement, parameters).all():
            if size >= parameters["max_bytes"]:
                break
            size += row.size
            seqs.append(row.seq)
        if not seqs:
            return []
        named = {
            "numbers": seqs,
            "seconds": parameters["seconds"],
            "of_token": parameters["of_token"],
        }
        connection.execute(self._lease_named, named)
        return connection.execute(self.named, {"numbers": seqs}).all()

    def numbers(self, seqs: Sequence[int]) -> Any:
        return list(seqs)

    def gathered(self, numbers: Any) -> Any:
        return json.loads(numbers)

    def marks(self, ids: Mapping[int, str]) -> Any:
        return list(ids.items())

    def firsts(self, heads: dict[str, int]) -> dict[str, Any]:
        return {"keys": list(heads)}

    @functools.cached_property
    def is_one_of(self) -> ColumnElement[bool]:
        return events.c.seq.in_(bindparam("numbers", type_=Integer, expanding=True))

    @functools.cached_property
    def is_marked(self) -> ColumnElement[bool]:
        marked = tuple_(events.c.seq, events.c.id).in_(bindparam("marks", expanding=True))
        return and_(self.is_one_of, marked)

    @functools.cached_property
    def put(self) -> Insert | ReturningInsert[Any]:
        # Only with RETURNING SQLAlchemy writes more than one row in a statement here. Not too many,
        # since the server accepts no more than max_allowed_packet.
        return insert(events).returning(events.c.seq).execution_options(**_FEW_ROWS)

    @functools.cached_property
    def heads(self) -> Select[Any]:
        row = events.c
        # MariaDB jumps from key to key, too, if it groups by all the first columns of an index. The
        # queue must not be a plain "=": then it would drop out of the columns, and the result be
        # sorted. In the recursive form MariaDB would read all rows up to each key.
        keys = (
            self._by_key(select(row.queue, row.key))
            .where(row.queue >= _QUEUE, row.queue <= _QUEUE, row.key >= _AFTER)
            .group_by(row.queue, row.key)
            .order_by(row.queue, row.key)
            .limit(_AMONG)
            .subquery("keys")
        )
        return select(keys.c.key, self._due_head_of(keys.c.key).label("seq")).order_by(keys.c.key)

    @functools.cached_property
    def unkeyed(self) -> Select[Any]:
        return _forced(self._unkeyed(self.due), events, "outbox_events_unkeyed")

    @functools.cached_property
    def bury(self) -> Update:
        # Out of the index of what is due, which has no condition here.
        return super().bury.values(available_at=NEVER)

    @functools.cached_property
    def _lease_named(self) -> Update:
        return _leased_rows().where(self.is_one_of)

    def _lease(self, condition: ColumnElement[bool]) -> Update | Select[Any]:
        row = events.c
        oldest = select(row.seq, func.length(row.payload).label("size")).where(condition)
        ordered = oldest.order_by(row.available_at, row.seq).limit(_AT_MOST)
        if condition is self.due_from_floor:
            ordered = self.by_due(ordered)
        return ordered.with_for_update(skip_locked=True)

    def _gather(self, numbers: ColumnElement[int]) -> ColumnElement[Any]:
        return func.json_arrayagg(numbers)

    def _materialized(self, cte: CTE) -> CTE:
        return cte

    def by_due(self, statement: Select[Any]) -> Select[Any]:
        return _forced(statement, events, "outbox_events_due")

    def _by_key(self, statement: Select[Any], table: Any = events) -> Select[Any]:
        return _forced(statement, table, "outbox_events_heads")

    def _is_key(self, column: ColumnElement[Any], key: ColumnElement[Any]) -> ColumnElement[bool]:
        return column == key  # with a range, it would read all keys

    def _order_of_heads(self, row: Any) -> Sequence[ColumnElement[Any]]:
        return (row.seq,)

    def _following(self, condition: ColumnElement[bool]) -> Select[Any]:
        is_of_keys = events.c.key.in_(bindparam("keys", type_=String, expanding=True))
        of_keys = self._by_key(self._behind(condition).where(is_of_keys))
        # Of alive rows dead_at has one value, but only by its name the order is that of the index.
        row = events.c
        return of_keys.order_by(row.key, row.dead_at, row.seq).limit(_AT_MOST)


_KINDS: dict[str, type[Statements]] = {
    "postgresql": _PostgreSQLStatements,
    "mariadb": _MariaDBStatements,
    "sqlite": _SQLiteStatements,
}


@functools.cache
def statements(dialect: str) -> Statements:
    """Return the statements for one of ``DIALECTS``, built once per process."""
    return _KINDS[dialect]()


@functools.lru_cache(maxsize=64)
def _put_columns(names: Sequence[str], condition: ColumnElement[bool] | None = None) -> Insert:
    """Insert rows with these columns that come as an array for each column."""
    types = {name: ArrayOf(events.c[name].type) for name in names}
    rows = (
        func.unnest(*(bindparam(_parameter(name), type_=type_) for name, type_ in types.items()))
        .table_valued(*(column(name, type_.item) for name, type_ in types.items()))
        .render_derived(name="new")
    )
    return _put({name: rows.c[name] for name in names}, condition)


@functools.lru_cache(maxsize=64)
def _put_one_if(names: Sequence[str], condition: ColumnElement[bool]) -> Insert:
    """Insert a row with these columns."""
    # Half the time of _put_columns, for the server and here.
    values = {name: bindparam(_parameter(name), type_=events.c[name].type) for name in names}
    return _put(values, condition)


def _put(values: dict[str, Any], condition: ColumnElement[bool] | None) -> Insert:
    values = {"stored_at": now(), "available_at": now(), **values}
    rows = select(*values.values())
    if condition is not None:
        rows = rows.where(condition)
    return insert(events).from_select(list(values), rows, include_defaults=False)


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {_parameter(name): [row[name] for row in rows] for name in rows[0]}


def _new(row: dict[str, Any]) -> dict[str, Any]:
    return {_parameter(name): value for name, value in row.items()}


def _parameter(name: str) -> str:
    """Return the parameter with the value, or the values, of a column."""
    return f"new_{name}"


def _with_due_in(firsts: Any) -> Select[Any]:
    """Add the seconds until the rows of ``firsts`` are due, and the database's time."""
    return select(firsts, (-seconds_since(firsts.c.due_at)).label("due_in"), now().label("now"))


def _first_due_at(
    queue: ColumnElement[str], rank: ColumnElement[int], *conditions: ColumnElement[bool]
) -> Any:
    row = events.c
    of_rank = and_(row.queue == queue, row.rank == rank, *conditions)
    return select(func.min(row.available_at)).where(of_rank).scalar_subquery()


@functools.lru_cache(maxsize=64)
def _firsts_above_each(count: int) -> Select[Any]:
    """A union of ``count`` spans, since MariaDB seeks only for values that it knows beforehand."""

    def first(number: int) -> Select[Any]:
        queue: Any = bindparam(f"queue{number}", type_=String)
        rank: Any = bindparam(f"rank{number}", type_=Integer)
        # Without a look at dead_at, which isn't in the index: dead rows are due in the year 9999.
        above = events.c.available_at >= bindparam(f"floor{number}", type_=Timestamp)
        return select(
            queue.label("queue"),
            rank.label("rank"),
            _first_due_at(queue, rank, above).label("due_at"),
            null().label("new_rank"),
        )

    return _with_due_in(union_all(*map(first, range(count))).subquery("firsts"))


def _leased_rows() -> Update:
    return update(events).values(
        lease_token=_TOKEN,
        available_at=in_seconds(_SECONDS),
        deliveries=events.c.deliveries + 1,
    )


def _marks(ids: Mapping[int, str]) -> list[str]:
    return [f"{seq} {id}" for seq, id in ids.items()]


def _mark() -> ColumnElement[str]:
    return cast(events.c.seq, Text) + " " + events.c.id


def _each_of(parameter: str) -> Select[Any]:
    """The elements of a parameter that is a JSON array."""
    each = func.json_each(bindparam(parameter, type_=Text)).table_valued("value")
    return select(each.c.value)


def _forced(statement: Select[Any], table: Any, index: str) -> Select[Any]:
    for dialect in ("mariadb", "mysql"):
        statement = statement.with_hint(table, f"FORCE INDEX ({index})", dialect)
    return statement


def _has_its_place(row: Any) -> ColumnElement[bool]:
    """Whether ``row`` stands in the order of its key: not if it is scheduled for later.

    A row that has been claimed keeps its place while it backs off, and so does a new one in its
    grace period, which only those for relays have.
    """
    at_once: ColumnElement[float] = case(
        (row.c.queue == literal_column("''"), literal_column(str(GRACE + 0.01))),
        else_=literal_column("0.01"),
    )
    return or_(
        row.c.deliveries > 0,
        row.c.available_at <= now(),
        row.c.available_at <= seconds_after(row.c.stored_at, at_once),
    )
