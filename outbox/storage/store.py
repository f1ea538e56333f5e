"""The store: what is done with rows of events, each in one short transaction."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    Connection,
    Delete,
    Engine,
    Update,
    delete,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DataError

from outbox.errors import UsageError
from outbox.event import Event
from outbox.storage.clock import now, seconds_since
from outbox.storage.rows import event_of, values_of
from outbox.storage.schema import DIALECTS, ddl, events, metadata
from outbox.storage.statements import statements

__all__ = ["Claimed", "Status", "Store"]

logger = logging.getLogger("outbox.sql")

_WINDOW = 4  # times the limit: among how many due rows the first ones of their keys are looked for


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that is leased to the caller.

    Attributes:
        seq: the row's own number; rises with the order of insertion.
        queue: it waits in; ``""`` for the relay.
        event: as it was stored.
        token: of the lease: the row can be changed with it for as long as nobody else claims it.
        deliveries: how often it has been claimed, this time included.
        attempts: how often it has failed by itself.
        age: seconds since it was stored, at the time of the claim.
    """

    seq: int
    queue: str
    event: Event
    token: str
    deliveries: int
    attempts: int
    age: float


@dataclass(frozen=True, slots=True)
class Status:
    """What is in the table, as of one moment.

    Attributes:
        waiting: due, and claimed by nobody.
        scheduled: for later: delayed, or backing off.
        leased: being published or processed.
        dead: by reason, the most frequent first.
        oldest: seconds since the oldest event that waits was stored; None if none waits.
        queues: how many are alive in each queue; ``""`` for the relay.
    """

    waiting: int
    scheduled: int
    leased: int
    dead: dict[str, int]
    oldest: float | None
    queues: dict[str, int]


class Store:
    """The table of events in one database. Thread-safe, as far as its engine is.

    A row is *alive* until it is completed (deleted) or buried (*dead*, with a reason). It is *due*
    from ``available_at`` on, which is schedule, back-off and the end of a lease in one.

    Every method is one transaction of its own, but for ``put`` with a connection. Errors of the
    database are SQLAlchemy's.
    """

    def __init__(self, engine: Engine) -> None:
        """Make a store of the table in the database of ``engine``, which stays the caller's.

        Args:
            engine: for SQLite one of :func:`outbox.storage.engines.open_engine`: its transactions
                begin by taking the lock, without which two claims could get the same row.

        Raises:
            UsageError: it is no database for which there is a store.
        """
        if engine.dialect.name not in DIALECTS:
            raise UsageError(
                f"events cannot be stored in {engine.dialect.name}, only in {' or '.join(DIALECTS)}"
            )
        self.engine = engine
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._ask = statements(is_postgresql=self._is_postgresql)

    def create(self, *, connection: Connection | None = None) -> bool:
        """Create the tables and their indexes unless they are there.

        Returns:
            Whether the table of events was not there.
        """
        if connection is None:
            with self.engine.begin() as connection:
                return self.create(connection=connection)
        was_there = inspect(connection).has_table(events.name)
        metadata.create_all(connection)
        return not was_there

    def check(self, *, connection: Connection | None = None) -> None:
        """See that the table is there, with all that is needed.

        Raises:
            UsageError: names what is missing, and how to make it.
        """
        if connection is None:
            with self.engine.connect() as connection:
                self.check(connection=connection)
                return
        found = inspect(connection)
        if not found.has_table(events.name):
            raise UsageError(
                f"there is no table {events.name}: make it with `outbox sql create`, or with "
                "your migrations (outbox.sql.metadata, `outbox sql ddl`)"
            )
        columns = {one["name"] for one in found.get_columns(events.name)}
        indexes = {one["name"] for one in found.get_indexes(events.name)}
        missing = [f"column {one.name}" for one in events.columns if one.name not in columns]
        missing += [f"index {one.name}" for one in events.indexes if one.name not in indexes]
        if missing:
            raise UsageError(
                f"the table {events.name} lacks {', '.join(sorted(missing))}; as it should be:\n"
                + ddl(self.engine.dialect.name)
            )

    def put(self, found: Iterable[Event], *, connection: Connection | None = None) -> None:
        """Store events for the relay, in the transaction of ``connection`` if one is given."""
        self.put_rows([values_of(event) for event in found], connection=connection)

    def put_rows(
        self, rows: Sequence[dict[str, Any]], *, connection: Connection | None = None
    ) -> None:
        """Store rows made by :func:`outbox.storage.rows.values_of`, in their order."""
        if connection is None:
            with self.engine.begin() as connection:
                self.put_rows(rows, connection=connection)
            return
        # Rows of one statement have the same columns; in order, since it is the rows' order too.
        for _, alike in itertools.groupby(rows, key=lambda row: "available_at" in row):
            connection.execute(insert(events), list(alike))

    def claim(
        self,
        limit: int,
        *,
        queue: str = "",
        lease: float = 60.0,
        max_bytes: int = 16 * 1024 * 1024,
        ordered: bool = False,
        only: Sequence[int] | None = None,
        connection: Connection | None = None,
    ) -> list[Claimed]:
        """Lease due rows to the caller, the oldest first, and return them in their order.

        Nobody else gets a leased row before its lease ends, wherever he claims. Rows that others
        are claiming at this moment are passed over.

        Args:
            limit: how many at most, 1 or more.
            queue: from which.
            lease: seconds.
            max_bytes: rows are taken until their payloads reach it: at least one.
            ordered: of the events of one key, take only what has none of its key before it that
                is alive and not in the same claim, so that the order within a key can be kept.
            only: the numbers of the rows to choose from, due or not, unless they are leased.
            connection: in whose transaction; by default in one of its own.
        """
        if connection is None:
            with self._begin() as connection:
                return self.claim(
                    limit, queue=queue, lease=lease, max_bytes=max_bytes, ordered=ordered,
                    only=only, connection=connection,
                )  # fmt: skip
        asked = {
            "of_queue": queue,
            "seconds": float(lease),
            "max_bytes": max_bytes,
        }
        if only is not None:
            # Within their grace: not due, and not leased.
            asked["numbers"] = self._ask.numbers(only)
            return self._take(connection, limit, asked, ordered=ordered)
        found: list[Claimed] = []
        for rank in self._ranks(connection, queue):
            asked["of_rank"] = rank
            found += self._take(connection, limit - len(found), asked, ordered=ordered)
            if len(found) >= limit:
                break
        return found

    def complete(self, rows: Iterable[Claimed], *, connection: Connection | None = None) -> int:
        """Delete rows that have reached their aim; return how many were still ours."""
        return self._settle(rows, self._ask.complete, {}, connection)

    def release(
        self,
        rows: Iterable[Claimed],
        delay: float = 0.0,
        *,
        reason: str | None = None,
        failed: bool = False,
        in_place: bool = False,
        connection: Connection | None = None,
    ) -> int:
        """Give rows back, due in ``delay`` seconds; return how many were still ours.

        Args:
            rows: as they were claimed.
            delay: seconds.
            reason: why, for people.
            in_place: due at once instead, in the place that their age gives them: before what was
                stored after them.
            failed: whether the row itself is to blame: an attempt is counted.
            connection: in whose transaction; by default in one of its own.
        """
        asked: dict[str, Any] = {"why": reason, "failures": int(failed)}
        if in_place:
            return self._settle(rows, self._ask.release_in_place, asked, connection)
        asked["seconds"] = float(delay)
        return self._settle(rows, self._ask.release, asked, connection)

    def extend(
        self, rows: Iterable[Claimed], lease: float, *, connection: Connection | None = None
    ) -> int:
        """Let leases end ``lease`` seconds from now; return how many were still ours."""
        return self._settle(rows, self._ask.extend, {"seconds": float(lease)}, connection)

    def leased(self, rows: Iterable[Claimed], *, connection: Connection | None = None) -> set[int]:
        """Return the numbers of those ``rows`` that are still ours."""
        if connection is None:
            with self.engine.begin() as connection:
                return self.leased(rows, connection=connection)
        wanted = {row.seq: row.token for row in rows}
        numbers = {"numbers": self._ask.numbers(list(wanted))}
        found = connection.execute(self._ask.leases, numbers)
        return {row.seq for row in found if row.lease_token == wanted[row.seq]}

    def bury(
        self, rows: Iterable[Claimed], reason: str, *, connection: Connection | None = None
    ) -> int:
        """Mark rows dead: they are never claimed again; return how many were still ours."""
        return self._settle(rows, self._ask.bury, {"why": reason}, connection)

    def status(self) -> Status:
        """Return what is in the table."""
        row = events.c
        alive = row.dead_at.is_(None)
        leased = alive & row.lease_token.is_not(None) & (row.available_at > now())
        scheduled = alive & row.lease_token.is_(None) & (row.available_at > now())
        waiting = alive & (row.available_at <= now())
        with self.engine.begin() as connection:
            counts = connection.execute(
                select(
                    func.count().filter(waiting).label("waiting"),
                    func.count().filter(scheduled).label("scheduled"),
                    func.count().filter(leased).label("leased"),
                    seconds_since(func.min(row.stored_at).filter(waiting)).label("oldest"),
                )
            ).one()
            dead = connection.execute(
                select(row.reason, func.count().label("count"))
                .where(row.dead_at.is_not(None))
                .group_by(row.reason)
                .order_by(text("2 DESC"), row.reason)
            ).all()
            queues = connection.execute(
                select(row.queue, func.count().label("count"))
                .where(alive)
                .group_by(row.queue)
                .order_by(row.queue)
            ).all()
        return Status(
            waiting=counts.waiting,
            scheduled=counts.scheduled,
            leased=counts.leased,
            dead={one[0] or "": one[1] for one in dead},
            oldest=None if counts.oldest is None else max(0.0, float(counts.oldest)),
            queues={one[0]: one[1] for one in queues},
        )

    def dead(
        self,
        *,
        ids: Sequence[str] = (),
        reason: str | None = None,
        target: str | None = None,
        limit: int | None = None,
    ) -> list[tuple[int, str, str, str]]:
        """Return number, id, target and reason of dead rows, the oldest first.

        Args:
            ids: only events of these ids.
            reason: only those whose reason contains this.
            target: only those to this target.
            limit: how many at most.
        """
        row = events.c
        statement = (
            select(row.seq, row.id, row.type, row.reason)
            .where(row.dead_at.is_not(None))
            .order_by(row.seq)
            .limit(limit)
        )
        if ids:
            statement = statement.where(row.id.in_(ids))
        if reason is not None:
            statement = statement.where(row.reason.contains(reason, autoescape=True))
        if target is not None:
            statement = statement.where(row.type == target)
        with self.engine.begin() as connection:
            return [
                (one.seq, one.id, one.type, one.reason or "")
                for one in connection.execute(statement)
            ]

    def retry(self, seqs: Sequence[int]) -> int:
        """Make dead rows alive and due again; return how many there were."""
        values = {"dead_at": None, "available_at": now(), "attempts": 0, "deliveries": 0}
        statement = update(events).where(self._ask.is_one_of, events.c.dead_at.is_not(None))
        asked = {"numbers": self._ask.numbers(seqs)}
        with self.engine.begin() as connection:
            return connection.execute(statement.values(values), asked).rowcount

    def purge(self, seqs: Sequence[int]) -> int:
        """Delete dead rows; return how many there were."""
        statement = delete(events).where(self._ask.is_one_of, events.c.dead_at.is_not(None))
        asked = {"numbers": self._ask.numbers(seqs)}
        with self.engine.begin() as connection:
            return connection.execute(statement, asked).rowcount

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        """Begin a transaction of whose work nothing is lost when a power cut takes it back.

        A lease, or that an event has reached its aim: at worst it is published once more, with the
        same id. So the commit need not wait for the disk.
        """
        with self.engine.begin() as connection:
            if self._is_postgresql:
                connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
            yield connection

    def _ranks(self, connection: Connection, queue: str) -> Iterator[int]:
        """Yield the ranks that are in ``queue``, the highest first; the relay's has one."""
        if not queue:
            yield 0
            return
        rank: int | None = 1 << 15  # more than any
        while True:
            asked = {"of_queue": queue, "of_rank": rank}
            rank = connection.execute(self._ask.highest_rank, asked).scalar()
            if rank is None:
                return
            yield rank

    def _take(
        self, connection: Connection, limit: int, asked: dict[str, Any], *, ordered: bool
    ) -> list[Claimed]:
        ask = self._ask
        chosen = "numbers" in asked
        asked = {**asked, "at_most": limit}
        if not ordered:
            return self._lease(connection, ask.lease_chosen if chosen else ask.lease_due, asked)
        # The first of each key; what others are claiming right now is still alive for us.
        if chosen:
            heads = self._lease(connection, ask.lease_first_chosen, asked)
        else:
            # A backlog of few keys has few such rows: look near its beginning first.
            near = {**asked, "among": _WINDOW * limit}
            heads = self._lease(connection, ask.lease_first_due_near, near)
            heads = heads or self._lease(connection, ask.lease_first_due, asked)
        size = sum(len(one.event.body) for one in heads)
        keyed = {one.event.key: one.seq for one in heads if one.event.key is not None}
        if not keyed or len(heads) >= limit or size >= asked["max_bytes"]:
            return heads
        # While the first of a key is ours, nobody else claims any of that key.
        following = connection.execute(
            ask.following_chosen if chosen else ask.following_due, {**asked, "keys": list(keyed)}
        ).all()
        more: list[int] = []
        for key, rows in itertools.groupby(following, key=lambda one: one.key):
            behind = [one for one in rows if one.seq > keyed[key]]
            for one in itertools.takewhile(lambda one: one.ready, behind):
                size += one.size
                if len(heads) + len(more) >= limit or size > asked["max_bytes"]:
                    break
                more.append(one.seq)
        if more:
            named = {**asked, "numbers": ask.numbers(more)}
            heads += self._lease(connection, ask.lease_named, named)
            heads.sort(key=_number)
        return heads

    def _lease(
        self, connection: Connection, statement: Update, asked: dict[str, Any]
    ) -> list[Claimed]:
        token = str(uuid.uuid4())
        asked = {**asked, "of_token": token}
        try:
            rows: Iterable[Any] = connection.execute(statement, asked).all()
        except _UNREADABLE:
            rows = self._read_one_by_one(connection, token)
        found: list[Claimed] = []
        for row in rows:
            try:
                event = event_of(row)
            except _UNREADABLE as error:
                self._bury_unreadable(connection, token, row.seq, error)
                continue
            found.append(
                Claimed(
                    row.seq, row.queue, event, token, row.deliveries, row.attempts, float(row.age)
                )
            )
        found.sort(key=_number)
        return found

    def _read_one_by_one(self, connection: Connection, token: str) -> Iterator[Any]:
        """Yield the rows that were leased with ``token``, but for those that cannot be loaded."""
        leased = select(events.c.seq).where(events.c.lease_token == token)
        for number in connection.execute(leased).scalars().all():
            try:
                yield connection.execute(self._ask.leased, {"number": number}).one()
            except _UNREADABLE as error:
                self._bury_unreadable(connection, token, number, error)

    def _bury_unreadable(
        self, connection: Connection, token: str, number: int, error: Exception
    ) -> None:
        # It must not hold up the others. Of a driver's error not the statement, which has values.
        reason = f"no event: {getattr(error, 'orig', None) or error}"
        asked = {"why": reason, "of_token": token, "numbers": self._ask.numbers([number])}
        connection.execute(self._ask.bury, asked)
        logger.error("the row %d is %r", number, reason)

    def _settle(
        self,
        rows: Iterable[Claimed],
        statement: Delete | Update,
        asked: dict[str, Any],
        connection: Connection | None,
    ) -> int:
        by_token: dict[str, list[int]] = {}
        for row in rows:
            by_token.setdefault(row.token, []).append(row.seq)
        if not by_token:
            return 0
        with nullcontext(connection) if connection is not None else self._begin() as connection:
            return sum(
                connection.execute(
                    statement, {**asked, "of_token": token, "numbers": self._ask.numbers(seqs)}
                ).rowcount
                for token, seqs in by_token.items()
            )


# What drivers and SQLAlchemy raise for a value that is not of its column's type: text where SQLite
# was to hold bytes, a timestamp that Python has no type for.
_UNREADABLE = (TypeError, ValueError, OverflowError, OSError, DataError)

_number = attrgetter("seq")
