"""The store: the operations on rows of events, each in one short transaction."""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Engine,
    Insert,
    Select,
    Update,
    delete,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import DataError

from outbox.errors import UsageError
from outbox.event import Event, Headers
from outbox.messages.rows import event_of, text_of, values_of
from outbox.storage.clock import now
from outbox.storage.creating import ADDED_LATER, check_server, create_missing, ddl
from outbox.storage.floors import NO_FLOOR, Floors
from outbox.storage.schema import events, known_dialect, metadata_of
from outbox.storage.statements import NEVER, OWNER_LENGTH, ClaimedRow, statements
from outbox.storage.transactions import READS_ONLY, own_transaction, try_again
from outbox.storage.upkeep import published_rows, row_counts
from outbox.storage.upkeep.row_counts import Status
from outbox.telemetry import tracing

__all__ = ["OWNER_LENGTH", "Claimed", "Status", "Store"]

logger = logging.getLogger("outbox.sql")

_T = TypeVar("_T")

_Position = tuple[Any, int]
"""When a row was due, as the database has it, and its number."""

_WINDOW = 500  # rows, or keys, at least: what an ordered claim looks at in one statement
_LOOKS = 8  # statements in which a claim searches for a free key; the next one goes on there
_TOKEN = 36  # the length of its column
_PASSED = 1000  # rows in which a claim searches for those without a key; the next one goes on there
_SEARCH = 0.1  # seconds for which one does so that finds nothing else
_PASS_AGAIN = 30.0  # seconds between two searches for those that came back behind others


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that is leased to the caller.

    Attributes:
        seq: the number of the row; rises in the order of insertion.
        queue: the queue that the row waits in; ``""`` for the relay.
        event: the event as it was stored.
        token: the lease: with it the row can be changed until another claim takes the row.
        deliveries: the number of times the row has been claimed, this claim included.
        attempts: the number of failures that the row itself caused.
        age: the seconds from when the row was stored to the claim.
    """

    seq: int
    queue: str
    event: Event
    token: str
    deliveries: int
    attempts: int
    age: float


class Store:
    """The table of events in one database. Thread-safe if its engine is.

    A row is *alive* until it is completed (deleted) or buried (*dead*, with a reason). It is *due*
    from ``available_at`` on. That one column holds the schedule, the back-off and the end of a
    lease, so that a row whose lease has ended is due again without any clean-up.

    Every method runs in a new transaction, unless it is passed a connection. Database errors are
    SQLAlchemy's.
    """

    def __init__(self, engine: Engine, owner: str = "") -> None:
        """Make a store of the table in the database of ``engine``, which the caller disposes of.

        Args:
            engine: the engine; for SQLite one from :func:`outbox.storage.engines.open_engine`,
                whose transactions take the lock when they begin: otherwise two claims could get
                the same row.
            owner: the name under which :meth:`held_by` finds the rows that this store leases:
                ``OWNER_LENGTH`` hexadecimal digits; empty if they are never looked for.

        Raises:
            UsageError: outbox can't store events in that database.
        """
        dialect = known_dialect(engine.dialect.name)
        self.engine = engine
        self._owner = owner
        self._statements = statements(dialect)
        # SQLite removes what is deleted from its indexes at once.
        self._leaves_remains = dialect != "sqlite"
        # Where an ordered claim goes on; threads that share them only look at some keys twice.
        self._next_key: dict[str, str] = {}
        # By queue and rank: no row without a key is before these positions in the order of what is
        # due. Rows that are given back in place may be, which the second search finds.
        self._passed: dict[tuple[str, int], _Position] = {}
        self._passed_again: dict[tuple[str, int], _Position] = {}
        self._pass_again_at = -math.inf
        self._looked_again = False

    def create(self, *, connection: Connection | None = None) -> bool:
        """Create the tables and their indexes if they don't exist.

        Returns:
            Whether the table of events is new.
        """
        if connection is None:
            with own_transaction(self.engine) as connection:
                return self.create(connection=connection)
        return events.name in create_missing(connection)

    def check(self, *, complete: bool = False, connection: Connection | None = None) -> None:
        """Check that the table exists, with all its columns and indexes.

        Args:
            complete: whether to raise also if only indexes are missing that a later version has
                added. Everything works without them, only slower, so by default that is logged.
            connection: the connection to use; by default a new transaction.

        Raises:
            UsageError: something is missing, and the message says what, and how to create it; or
                the server is MySQL, or MariaDB before 10.6.
        """
        if connection is None:
            with own_transaction(self.engine) as connection:
                self.check(complete=complete, connection=connection)
                return
        check_server(connection)
        inspector = inspect(connection)
        schema = connection.schema_for_object(events)
        if not inspector.has_table(events.name, schema=schema):
            raise UsageError(
                f"the table {events.name} does not exist; create it with `outbox sql create`, or "
                "with your migrations (outbox.sql.metadata, `outbox sql ddl`)"
            )
        columns = {each["name"] for each in inspector.get_columns(events.name, schema=schema)}
        indexes = {each["name"] for each in inspector.get_indexes(events.name, schema=schema)}
        lacking = [f"column {each.name}" for each in events.columns if each.name not in columns]
        wanted = metadata_of(connection.dialect.name).tables[events.name].indexes
        lacking += [f"index {each.name}" for each in wanted if each.name not in indexes]
        if not lacking:
            return
        complete = complete or any(each.split()[1] not in ADDED_LATER for each in lacking)
        what = f"the table {events.name} lacks {', '.join(sorted(lacking))}"
        if complete:
            raise UsageError(f"{what}; it should be:\n" + ddl(self.engine.dialect.name))
        logger.warning("%s; until `outbox sql upgrade` adds it, outbox may be slow", what)

    def put(self, new_events: Iterable[Event], *, connection: Connection | None = None) -> None:
        """Store events for the relay, in the transaction of ``connection`` if one is given."""
        self.put_rows([values_of(event) for event in new_events], connection=connection)

    def put_rows(
        self, rows: Sequence[dict[str, Any]], *, connection: Connection | None = None
    ) -> None:
        """Store rows made by :func:`outbox.messages.rows.values_of`, in their order."""
        if connection is None:
            with own_transaction(self.engine) as connection:
                self.put_rows(rows, connection=connection)
            return
        # The rows of one statement must have the same columns. Only neighbours are grouped, because
        # the order of insertion is the order of the rows.
        for _, alike in itertools.groupby(rows, key=dict.keys):
            self._statements.put_rows(connection, list(alike))

    def put_rows_if(
        self,
        rows: Sequence[dict[str, Any]],
        condition: ColumnElement[bool],
        parameters: Mapping[str, Any],
        *,
        connection: Connection,
    ) -> bool:
        """Store rows in one statement if ``condition`` holds; PostgreSQL only.

        Args:
            rows: rows made by :func:`outbox.messages.rows.values_of`.
            condition: the condition.
            parameters: its parameters.
            connection: the connection to use.

        Returns:
            Whether they are stored: not if they have different columns, either.
        """
        if any(row.keys() != rows[0].keys() for row in rows):
            return False
        return self._statements.put_rows_if(connection, rows, condition, parameters)

    def claim(
        self,
        limit: int,
        *,
        queue: str = "",
        lease: float = 60.0,
        max_bytes: int = 16 * 1024 * 1024,
        ordered: bool = False,
        one_a_key: bool = False,
        held: Mapping[int, int] | None = None,
        only: Mapping[int, str] | None = None,
        floors: Floors | None = None,
        connection: Connection | None = None,
    ) -> list[Claimed]:
        """Lease due rows to the caller, the oldest first, and return them in their order.

        No other claim, in any process, gets a leased row before its lease ends. Rows that another
        claim is taking at this moment are skipped.

        Args:
            limit: the maximum number of rows, 1 or more.
            queue: the queue to claim from; ``""`` is the relay's.
            lease: the seconds until the rows are due again.
            max_bytes: the total size of the payloads at which to stop, but at least one row is
                taken.
            ordered: whether to skip an event if an earlier event with the same key is alive and
                not in this claim; the order within a key can only be kept this way. An event that
                is scheduled takes its place in that order when it becomes due.
            one_a_key: whether to be ordered, and to take one row of each key at most, and none of a
                key of which another row is leased. No two such claims from a queue may run at the
                same time: the caller sees to that. Not for rows chosen with ``only``.
            held: by rank, how many rows the caller holds already. Then ``limit`` is for the rows of
                each rank and those above it, held ones included: so what is urgent is claimed
                although less urgent rows fill the limit. And the rows come in the order in which
                they are claimed: by rank, then by the time at which they were due.
            only: the rows to choose from, by number, with their ids: both must agree, because
                another schema has the same numbers. Rows within their grace count as due.
            floors: what the caller passes to each of the claims that it repeats. Most of them then
                begin where the last one found the first row, past the remains of others, and
                may miss rows below for a second, or for 5 s in a table that can't be cleaned up.
            connection: the connection whose transaction to use; by default a new transaction.
        """
        if connection is None:
            return self._in_own_transaction(
                lambda own: self.claim(
                    limit, queue=queue, lease=lease, max_bytes=max_bytes, ordered=ordered,
                    one_a_key=one_a_key, held=held, only=only, floors=floors, connection=own,
                )
            )  # fmt: skip
        parameters = {
            "of_queue": queue,
            "seconds": float(lease),
            "max_bytes": max_bytes,
        }
        if only is not None:
            parameters["numbers"] = self._statements.numbers(list(only))
            parameters["marks"] = self._statements.marks(only)
            return self._take(connection, limit, parameters, ordered=ordered)
        in_hand: set[str] | None = None
        if one_a_key:
            keys = connection.execute(self._statements.keys_in_hand, parameters).scalars()
            in_hand = set(keys)
        claimed: list[Claimed] = []
        is_full = False
        for rank, floor in self._due(connection, queue, floors):
            parameters.update(of_rank=rank, floor=floor)
            room = limit - len(claimed)
            if held is not None:
                room -= sum(count for each, count in held.items() if each >= rank)
            if room > 0:
                places = {} if held is None else self._places(connection, room, parameters)
                taken = self._take(connection, room, parameters, ordered=ordered, in_hand=in_hand)
                if places:
                    taken.sort(key=lambda row: places.get(row.seq, math.inf))
                claimed += taken
                room -= len(taken)
            if room <= 0:
                is_full = True
                break
        if floors is not None:
            floors.claimed(queue, all_wanted=is_full)
        return claimed

    def exchanges(self, queues: Sequence[str], floors: Floors) -> bool:
        """Return whether :meth:`exchange` does now what :meth:`claim` would for all ``queues``."""
        return (
            self._statements.exchange is not None
            and all(map(floors.are_known, queues))
            and not any(floors.is_time_to_look_through([queue]) for queue in queues)
        )

    def exchange(
        self,
        done: Iterable[Claimed],
        limit: int,
        *,
        queue: str,
        lease: float,
        floors: Floors,
        max_bytes: int = 16 * 1024 * 1024,
        connection: Connection,
    ) -> list[Claimed]:
        """Do the same as :meth:`complete` and :meth:`claim` in one statement.

        It claims rows of one rank, so it may return less than there is. No row comes back that is
        leased to the owner of this store. A power cut may undo it, if the statement is a
        transaction by itself.

        Args:
            done: the claimed rows to delete.
            limit: the maximum number of rows to claim.
            queue: the queue to claim from.
            lease: the seconds until they are due again.
            floors: as for :meth:`claim`.
            max_bytes: as for :meth:`claim`.
            connection: the connection to use.
        """
        sql = self._statements
        tokens = {row.seq: row.token for row in done}
        token = self._new_token()
        parameters = {
            **sql.spans(floors.spans([queue])),
            "numbers": sql.numbers(list(tokens)),
            "of_tokens": list(set(tokens.values())),
            "of_queue": queue,
            "of_owner": self._owner,
            "of_token": token,
            "seconds": float(lease),
            "at_most": limit,
            "max_bytes": max_bytes,
        }
        statement: Any = sql.exchange  # None only if exchanges() returns False
        try:
            found = connection.execute(statement, parameters).all()
        except _UNREADABLE:
            return self._claimed(connection, token, self._read_one_by_one(connection, token))
        if found:
            *_, rank, _, clock = found[0]
            due_for = max(row[-2] for row in found)
            floors.raise_to(queue, rank, _moment(clock - due_for), _moment(clock))
        floors.claimed(queue, all_wanted=len(found) >= limit)
        return self._claimed(connection, token, [row[:-3] for row in found])

    def due_in(
        self,
        queues: Sequence[str],
        *,
        floors: Floors | None = None,
        connection: Connection | None = None,
    ) -> float | None:
        """Return the seconds until a row of one of ``queues`` is due; None if they are empty.

        0 or less means that a row is due now. Leased rows count, because they are due again when
        their lease ends. The cost depends on the number of queues and ranks, not on that of rows.

        Args:
            queues: the queues.
            floors: as for :meth:`claim`.
            connection: the connection to use; by default a new transaction.
        """
        if connection is None:
            with own_transaction(self.engine) as connection:
                return self.due_in(queues, floors=floors, connection=connection)
        floors = floors if self._leaves_remains else None
        through = floors is None or floors.is_time_to_look_through(queues, idle=True)
        firsts = self._firsts(connection, queues, floors, through=through)
        return min((float(first.due_in) for first in firsts), default=None)

    def complete(
        self,
        rows: Iterable[Claimed],
        *,
        keep: float = 0.0,
        connection: Connection | None = None,
    ) -> int:
        """Delete rows that are published or processed; return how many the caller still leased.

        Args:
            rows: the claimed rows.
            keep: the seconds for which they are in ``outbox_published`` from now on; 0 for none.
            connection: the connection whose transaction to use; by default a new transaction.
        """
        first = self._statements.keep if keep else None
        parameters: dict[str, Any] = {"seconds": float(keep)} if keep else {}
        return self._change(rows, self._statements.complete, parameters, connection, first=first)

    def purge_published(self, limit: int) -> int:
        """Delete up to ``limit`` of the rows kept whose time is over; return how many."""
        return self._in_own_transaction(lambda own: published_rows.purge(own, limit))

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
        """Release rows, due in ``delay`` seconds; return how many the caller still leased.

        Args:
            rows: the claimed rows.
            delay: the seconds until they are due.
            reason: the reason, for people to read.
            in_place: whether the rows are due at once, and ahead of those that were stored after
                them; ``delay`` is ignored.
            failed: whether to count a failed attempt: the row itself is to blame.
            connection: the connection whose transaction to use; by default a new transaction.
        """
        parameters: dict[str, Any] = {"why": reason, "failures": int(failed)}
        if in_place:
            return self._change(rows, self._statements.release_in_place, parameters, connection)
        parameters["seconds"] = float(delay)
        return self._change(rows, self._statements.release, parameters, connection)

    def back_off(
        self,
        row: Claimed,
        delay: float,
        headers: Headers,
        *,
        connection: Connection | None = None,
    ) -> bool:
        """Release a row that has failed, in its place, for its next attempt.

        Args:
            row: the claimed row.
            delay: the seconds until it is due.
            headers: its headers from now on.
            connection: the connection whose transaction to use; by default a new transaction.

        Returns:
            Whether the caller still leased it.
        """
        parameters: dict[str, Any] = {
            "why": None,
            "failures": 1,
            "seconds": float(delay),
            "new_headers": text_of(headers),
        }
        return bool(self._change([row], self._statements.back_off, parameters, connection))

    def extend(
        self, rows: Iterable[Claimed], lease: float, *, connection: Connection | None = None
    ) -> int:
        """Make leases end ``lease`` seconds from now; return how many the caller still held."""
        return self._change(rows, self._statements.extend, {"seconds": float(lease)}, connection)

    def leased(self, rows: Iterable[Claimed], *, connection: Connection | None = None) -> set[int]:
        """Return the numbers of those ``rows`` that the caller still leases."""
        if connection is None:
            with own_transaction(self.engine) as connection:
                return self.leased(rows, connection=connection)
        tokens = {row.seq: row.token for row in rows}
        parameters = {"numbers": self._statements.numbers(list(tokens))}
        leases = connection.execute(self._statements.leases, parameters)
        return {row.seq for row in leases if row.lease_token == tokens[row.seq]}

    def held_by(
        self,
        owners: Sequence[str],
        queues: Sequence[str],
        lease: float,
        *,
        connection: Connection | None = None,
    ) -> list[Claimed]:
        """Return the rows that are leased to the stores with these owners.

        Without those whose lease has ended. The cost depends on the number of rows that are leased
        or become due soon, not on that of all.

        Args:
            owners: the owners.
            queues: the queues to look into.
            lease: the seconds for which they lease rows.
            connection: the connection to use; by default a new transaction.
        """
        if connection is None:
            with own_transaction(self.engine) as connection:
                return self.held_by(owners, queues, lease, connection=connection)
        parameters = {"owners": list(owners), "queues": list(queues), "seconds": float(lease)}
        by_token: dict[str, list[int]] = {}
        for seq, token in connection.execute(self._statements.held, parameters):
            by_token.setdefault(token, []).append(seq)
        held: list[Claimed] = []
        for token, seqs in by_token.items():
            named = {"numbers": self._statements.numbers(seqs)}
            try:
                rows: Iterable[Any] = connection.execute(self._statements.named, named).all()
            except _UNREADABLE:
                rows = self._read_one_by_one(connection, token, seqs)
            held += self._claimed(connection, token, rows)
        return held

    def alive(self, ids: Mapping[int, str], *, connection: Connection | None = None) -> set[int]:
        """Return the numbers of those rows, given by number and id, that are alive."""
        if connection is None:
            with tracing.hidden(), self.engine.begin() as connection:
                return self.alive(ids, connection=connection)
        parameters = {
            "numbers": self._statements.numbers(list(ids)),
            "marks": self._statements.marks(ids),
        }
        return set(connection.execute(self._statements.alive, parameters).scalars())

    def bury(
        self, rows: Iterable[Claimed], reason: str, *, connection: Connection | None = None
    ) -> int:
        """Mark rows dead, never to be claimed; return how many the caller still leased."""
        return self._change(rows, self._statements.bury, {"why": reason}, connection)

    def status(self, *, at_most: int | None = row_counts.AT_MOST) -> Status:
        """Return the numbers of rows in the table.

        Args:
            at_most: where counting stops, 1 or more: at that many rows with one priority in one
                queue, and at that many dead ones. So the cost depends on the number of queues, not
                on that of rows; and the age of the oldest event is that of those counted, which
                have been due longest. None counts all rows, which reads the whole table.
        """
        # On SQLite it waits for no writer, and keeps none waiting.
        with own_transaction(self.engine.execution_options(**{READS_ONLY: True})) as connection:
            return row_counts.count(connection, at_most)

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
            ids: the ids to select; all if empty.
            reason: a text that the reason contains.
            target: the target of the events.
            limit: the maximum number of rows.
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
        with own_transaction(self.engine) as connection:
            return [
                (dead.seq, dead.id, dead.type, dead.reason or "")
                for dead in connection.execute(statement)
            ]

    def retry(self, seqs: Sequence[int]) -> int:
        """Make dead rows alive and due again; return how many were dead."""
        values = {"dead_at": None, "available_at": now(), "attempts": 0, "deliveries": 0}
        statement = update(events).where(self._statements.is_one_of, events.c.dead_at.is_not(None))
        parameters = {"numbers": self._statements.numbers(seqs)}
        with own_transaction(self.engine) as connection:
            return connection.execute(statement.values(values), parameters).rowcount

    def purge(self, seqs: Sequence[int]) -> int:
        """Delete dead rows; return how many were dead."""
        statement = delete(events).where(self._statements.is_one_of, events.c.dead_at.is_not(None))
        parameters = {"numbers": self._statements.numbers(seqs)}
        with own_transaction(self.engine) as connection:
            return connection.execute(statement, parameters).rowcount

    def _in_own_transaction(self, work: Callable[[Connection], _T]) -> _T:
        """Run ``work`` in a transaction whose commit doesn't wait for the disk, if need be again.

        A power cut may undo it, which is harmless: it holds only leases and fates, so at worst an
        event is published twice, with the same id.
        """

        def once() -> _T:
            with own_transaction(self.engine, durable=False) as connection:
                return work(connection)

        return try_again(once)

    def _due(
        self, connection: Connection, queue: str, floors: Floors | None
    ) -> Iterator[tuple[int, datetime.datetime]]:
        """Yield the ranks of ``queue`` to claim from, the highest first, and where to begin.

        It may yield a rank again. A caller that has enough stops.
        """
        if not self._leaves_remains:
            yield from ((rank, NO_FLOOR) for rank in self._ranks(connection, queue))
            return
        if not queue and floors is None:
            yield 0, NO_FLOOR  # the relay's queue has only this rank
            return
        through = floors is None or floors.is_time_to_look_through([queue])
        while True:
            firsts = self._firsts(connection, [queue], floors, through=through)
            for first in sorted(firsts, key=_rank, reverse=True):
                if first.due_in <= 0:
                    yield first.rank, first.due_at
            if through or floors is None or not floors.is_time_to_look_through([queue], idle=True):
                return
            through = True

    def _ranks(self, connection: Connection, queue: str) -> Iterator[int]:
        """Yield the ranks in ``queue``, the highest first; the relay's queue has only rank 0."""
        if not queue:
            yield 0
            return
        rank: int | None = 1 << 15  # above every SMALLINT
        while True:
            parameters = {"of_queue": queue, "of_rank": rank}
            rank = connection.execute(self._statements.highest_rank, parameters).scalar()
            if rank is None:
                return
            yield rank

    def _firsts(
        self, connection: Connection, queues: Sequence[str], floors: Floors | None, *, through: bool
    ) -> list[Any]:
        """Return of each rank of ``queues`` the row that is due first.

        Args:
            connection: the connection.
            queues: the queues.
            floors: the floors to note, and to begin at.
            through: whether to begin at the beginning.
        """
        sql = self._statements
        if through or floors is None:
            began = time.monotonic()
            rows = connection.execute(sql.firsts_of_ranks, {"queues": sql.names(queues)}).all()
            if floors is not None:
                floors.looked_through(queues, began, time.monotonic())
        else:
            rows = sql.firsts_above(connection, floors.spans(queues))
            while new := [row for row in rows if row.new_rank is not None]:
                for row in new:
                    floors.add(row.queue, row.new_rank)
                rows = sql.firsts_above(connection, floors.spans(queues))
        if floors is not None:
            for row in rows:
                floors.raise_to(row.queue, row.rank, row.due_at, row.now)
        return [row for row in rows if row.due_at is not None and row.due_at < NEVER]

    def _places(
        self, connection: Connection, limit: int, parameters: dict[str, Any]
    ) -> dict[int, int]:
        """Return the places of the rows that a claim may take: no row says when it was due."""
        due = connection.execute(self._statements.first_due, {**parameters, "at_most": limit})
        return {seq: place for place, seq in enumerate(due.scalars())}

    def _take(
        self,
        connection: Connection,
        limit: int,
        parameters: dict[str, Any],
        *,
        ordered: bool,
        in_hand: set[str] | None = None,
    ) -> list[Claimed]:
        """Lease rows of one rank, or chosen ones.

        Args:
            connection: the connection.
            limit: the maximum number of rows.
            parameters: those of the statements.
            ordered: whether to keep the order within keys.
            in_hand: to take one row of each key, the keys of which to take none; those of what is
                taken are added.
        """
        sql = self._statements
        chosen = "numbers" in parameters
        parameters = {**parameters, "at_most": limit}
        if not ordered and in_hand is None:
            return self._lease(
                connection, sql.lease_chosen if chosen else sql.lease_due, parameters
            )
        if chosen:
            heads = self._lease(connection, sql.lease_first_chosen, parameters)
            return self._with_followers(connection, heads, parameters)
        # The oldest due rows usually hold enough that may be taken. If they don't, since they wait
        # for others of their keys, what is behind them is found by jumping from key to key:
        # reading through a backlog of one key would take seconds, at every look.
        among = max(limit, _WINDOW)
        near = connection.execute(sql.near, {**parameters, "among": among}).one()
        claimed: list[Claimed] = []
        if near.found:
            named = {**parameters, "numbers": sql.gathered(near.numbers)}
            claimed = self._take_named(connection, named, parameters, in_hand)
        room = limit - len(claimed)
        max_bytes = parameters["max_bytes"] - sum(len(row.event.body) for row in claimed)
        if near.size < among or room <= 0 or max_bytes <= 0:
            return claimed
        parameters = {**parameters, "at_most": room, "max_bytes": max_bytes, "among": among}
        found = self._due_heads(connection, parameters)
        found += self._unkeyed(connection, parameters, 0.0 if found or claimed else _SEARCH)
        if found:
            named = {**parameters, "numbers": sql.numbers(found)}
            claimed += self._take_named(connection, named, parameters, in_hand)
            claimed.sort(key=_number)
        return claimed

    def _take_named(
        self,
        connection: Connection,
        named: dict[str, Any],
        parameters: dict[str, Any],
        in_hand: set[str] | None,
    ) -> list[Claimed]:
        """Lease the first rows of keys, and rows without one; of no key ``in_hand`` if given."""
        sql = self._statements
        if in_hand is None:
            heads = self._lease(connection, sql.lease_due_named, named)
            return self._with_followers(connection, heads, parameters)
        heads = self._lease(connection, sql.lease_free_named, {**named, "in_hand": list(in_hand)})
        in_hand.update(row.event.key for row in heads if row.event.key is not None)
        return heads

    def _with_followers(
        self, connection: Connection, heads: list[Claimed], parameters: dict[str, Any]
    ) -> list[Claimed]:
        """Lease the rows behind the first of each key, as far as they are ready, too.

        Meanwhile no other ordered claim takes any row of these keys: to others, also before this
        transaction is committed, the first row of each is alive and can't be leased.
        """
        sql = self._statements
        size = sum(len(row.event.body) for row in heads)
        firsts = {row.event.key: row.seq for row in heads if row.event.key is not None}
        room = parameters["at_most"] - len(heads)
        if not firsts or room <= 0 or size >= parameters["max_bytes"]:
            return heads
        chosen = "numbers" in parameters
        following: Sequence[Any] = connection.execute(
            sql.following_chosen if chosen else sql.following_due,
            # Except on PostgreSQL the first rows are among them.
            {**parameters, **sql.firsts(firsts), "at_most": room + len(firsts)},
        ).all()
        following = [row for row in following if row.seq > firsts[row.key]]
        wanted: list[Any] = []
        for _, rows in itertools.groupby(sorted(following, key=_key), key=_key):
            for row in itertools.takewhile(lambda row: row.ready, sorted(rows, key=_number)):
                size += row.size
                if len(wanted) >= room or size > parameters["max_bytes"]:
                    break
                wanted.append(row)
        if not wanted:
            return heads
        named = {**parameters, "numbers": sql.numbers([row.seq for row in wanted])}
        statement = sql.lease_chosen if chosen else sql.lease_due_named
        followers = self._lease(connection, statement, named)
        return sorted(heads + self._without_gaps(connection, wanted, followers), key=_number)

    def _unkeyed(
        self, connection: Connection, parameters: dict[str, Any], seconds: float
    ) -> list[int]:
        """Return the numbers of due rows without a key, wherever they are in the backlog.

        It goes on searching for ``seconds`` while it finds none.
        """
        sql = self._statements
        if sql.indexes_all_unkeyed:
            return list(connection.execute(sql.unkeyed, parameters).scalars())
        found: list[int] = []
        if not parameters["of_queue"]:
            found += connection.execute(sql.new_unkeyed, parameters).scalars()
        # No index has just the other rows, so finding them reads through the backlog: a part of it
        # at a time.
        if len(found) >= parameters["at_most"]:
            return found
        # In turns, as long as the second search isn't over.
        looks_again = self._looked_again = (
            not self._looked_again and time.monotonic() >= self._pass_again_at
        )
        positions = self._passed_again if looks_again else self._passed
        until = time.monotonic() + seconds
        passed, is_end = self._pass_until(until, connection, parameters, positions)
        if looks_again and is_end:
            positions.clear()
            self._pass_again_at = time.monotonic() + _PASS_AGAIN
        return found + passed

    def _pass_until(self, until: float, *arguments: Any) -> tuple[list[int], bool]:
        """Do the same as :meth:`_pass`, again and again while it finds none, if there is time."""
        while True:
            found, is_end = self._pass(*arguments)
            if found or is_end or time.monotonic() >= until:
                return found, is_end

    def _pass(
        self,
        connection: Connection,
        parameters: dict[str, Any],
        positions: dict[tuple[str, int], _Position],
    ) -> tuple[list[int], bool]:
        """Search for due rows without a key from a position on, and go on up to the first of them.

        Returns:
            The numbers of those that are found, and whether the last row was looked at.
        """
        place = parameters["of_queue"], parameters["of_rank"]
        behind_at, behind_seq = positions.get(place, (NO_FLOOR, 0))
        position = {"behind_at": behind_at, "behind_seq": behind_seq, "among": _PASSED}
        rows = connection.execute(self._statements.passed, {**parameters, **position}).all()
        unkeyed = [row for row in rows if row.key is None]
        is_end = not unkeyed and (not rows or rows[-1].size < _PASSED)
        if unkeyed:
            # Not past them: they may be locked, or this transaction may be rolled back.
            positions[place] = unkeyed[0].due_at, unkeyed[0].seq - 1
        elif rows:
            # At the end, transactions may still commit rows that were due a bit earlier.
            last = rows[-1]
            positions[place] = (last.late, 0) if is_end else (last.due_at, last.seq)
        return [row.seq for row in unkeyed], is_end

    def _due_heads(self, connection: Connection, parameters: dict[str, Any]) -> list[int]:
        """Return the numbers of rows that are the first of their key and due.

        Each look goes on at the key where the last one ended, so that every key gets its turn.
        """
        queue = parameters["of_queue"]
        began = after = self._next_key.get(queue, "")
        # Usually most heads are due, and those that don't fit would cost as much.
        among = min(parameters["at_most"] * 5 // 4 + 1, parameters["among"])
        for _ in range(_LOOKS):
            look = {**parameters, "after": after, "among": among}
            keys = connection.execute(self._statements.heads, look).all()
            is_end = len(keys) < among
            self._next_key[queue] = after = "" if is_end else keys[-1].key
            found = [each.seq for each in keys if each.seq is not None]
            if found or (is_end and not began):
                return found
            if is_end:
                began = ""  # once more, from the first key on
            among = parameters["among"]
        return []

    def _without_gaps(
        self, connection: Connection, wanted: list[Any], leased: list[Claimed]
    ) -> list[Claimed]:
        """Return the leased rows up to the first of their key that wasn't leased; release others.

        Another claim may have taken a row meanwhile, if it began at a row that became the first of
        its key after ours had been leased.
        """
        numbers = {row.seq for row in leased}
        gaps: dict[str, int] = {}
        for row in wanted:
            if row.seq not in numbers:
                gaps.setdefault(row.key, row.seq)
        if not gaps:
            return leased
        behind = [row for row in leased if row.seq > gaps.get(row.event.key or "", row.seq)]
        self.release(behind, connection=connection)
        taken = {row.seq for row in behind}
        return [row for row in leased if row.seq not in taken]

    def _lease(
        self, connection: Connection, statement: Update | Select[Any], parameters: dict[str, Any]
    ) -> list[Claimed]:
        token = self._new_token()
        parameters = {**parameters, "of_token": token}
        try:
            rows: Iterable[Any] = self._statements.lease(connection, statement, parameters)
        except _UNREADABLE:
            rows = self._read_one_by_one(connection, token)
        return self._claimed(connection, token, rows)

    def _new_token(self) -> str:
        # Such a token begins with digits only, unlike one without an owner.
        return f"{self._owner}{uuid.uuid4().hex}"[:_TOKEN] if self._owner else str(uuid.uuid4())

    def _claimed(self, connection: Connection, token: str, rows: Iterable[Any]) -> list[Claimed]:
        """Return the leased ``rows`` in their order, and bury those that can't be read."""
        claimed: list[Claimed] = []
        for each in rows:
            row = ClaimedRow._make(each)
            try:
                event = event_of(row)
            except _UNREADABLE as error:
                self._bury_unreadable(connection, token, row.seq, error)
                continue
            claimed.append(
                Claimed(
                    row.seq, row.queue, event, token, row.deliveries, row.attempts, float(row.age)
                )
            )
        claimed.sort(key=_number)
        return claimed

    def _read_one_by_one(
        self, connection: Connection, token: str, numbers: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Yield rows leased with ``token``, and bury those that can't be loaded.

        Args:
            connection: the connection.
            token: the lease.
            numbers: those of its rows; without them, the whole table is read.
        """
        if numbers is None:
            leased = select(events.c.seq).where(events.c.lease_token == token)
            numbers = connection.execute(leased).scalars().all()
        for number in numbers:
            try:
                yield connection.execute(self._statements.leased, {"number": number}).one()
            except _UNREADABLE as error:
                self._bury_unreadable(connection, token, number, error)

    def _bury_unreadable(
        self, connection: Connection, token: str, number: int, error: Exception
    ) -> None:
        # It must not hold up the others. A driver's error without its statement, which has values.
        reason = f"no event: {getattr(error, 'orig', None) or error}"
        numbers = self._statements.numbers([number])
        parameters = {"why": reason, "of_token": token, "numbers": numbers}
        connection.execute(self._statements.bury, parameters)
        logger.error("row %d is dead, it can't be read as an event: %r", number, reason)

    def _change(
        self,
        rows: Iterable[Claimed],
        statement: Delete | Update,
        parameters: dict[str, Any],
        connection: Connection | None,
        *,
        first: Insert | None = None,
    ) -> int:
        """Run ``statement`` for each lease of ``rows``; return how many rows it changed.

        Args:
            rows: the claimed rows.
            statement: the statement.
            parameters: its parameters, and those of ``first``.
            connection: the connection whose transaction to use; by default a new transaction.
            first: a statement to run before it, or None.
        """
        by_token: dict[str, list[int]] = {}
        for row in rows:
            by_token.setdefault(row.token, []).append(row.seq)
        if not by_token:
            return 0

        def change(connection: Connection) -> int:
            changed = 0
            for token, seqs in by_token.items():
                ours = {"of_token": token, "numbers": self._statements.numbers(seqs)}
                if first is not None:
                    connection.execute(first, {**parameters, **ours})
                changed += connection.execute(statement, {**parameters, **ours}).rowcount
            return changed

        return self._in_own_transaction(change) if connection is None else change(connection)


def _moment(seconds: float) -> datetime.datetime:
    """Return a time given in seconds since the epoch, or a microsecond earlier."""
    return _EPOCH + datetime.timedelta(microseconds=math.floor(seconds * 1e6) - 1)


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

# Raised by drivers and SQLAlchemy for a value that doesn't fit its column's type, such as text in
# a column for bytes (SQLite), or a timestamp outside the range of datetime.
_UNREADABLE = (TypeError, ValueError, OverflowError, OSError, DataError)

_number = attrgetter("seq")
_rank = attrgetter("rank")
_key = attrgetter("key")
