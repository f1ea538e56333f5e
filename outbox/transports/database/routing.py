"""Routes events to queues: the table of bindings, and lookups in it.

Exchanges are topic exchanges, as in RabbitMQ. A queue exists if it is bound to the exchange ``""``
by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Text,
    and_,
    bindparam,
    cast,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from outbox.errors import UsageError
from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.messages.topics import matches
from outbox.storage.schema import bindings, dialect_of, exists

__all__ = [
    "ARE_KNOWN",
    "Binding",
    "Routes",
    "add",
    "check",
    "load",
    "load_with_digest",
    "of_consumer",
    "of_queue",
    "take_turns",
]

_CACHED = 10_000  # addresses; limited because targets may contain user data


class Binding(NamedTuple):
    """A row of the table: ``queue`` gets the events on ``exchange`` whose target matches."""

    queue: str
    exchange: str
    pattern: str


def of_queue(name: str) -> Binding:
    """Return the binding that makes ``name`` a queue."""
    return Binding(name, "", name)


def of_consumer(queue: QueueSpec) -> list[Binding]:
    """Return the bindings of a consumer's queue, and that which makes its dead-letter queue."""
    bindings = [of_queue(name) for name in (dead_letter_queue(queue.name), queue.name)]
    if queue.exchange:
        topics = dict.fromkeys((queue.name, *queue.topics))
        bindings += [Binding(queue.name, queue.exchange, topic) for topic in topics]
    return bindings


def check(connection: Connection) -> None:
    """Check that the table exists.

    Raises:
        UsageError: it doesn't; the message says how to create it.
    """
    if not exists(connection, bindings):
        raise UsageError(
            f"the table {bindings.name} does not exist; create it with `outbox sql upgrade`, or "
            "with your migrations (outbox.sql.metadata)"
        )


def load(connection: Connection) -> list[Binding]:
    """Return all bindings."""
    return [Binding(*row) for row in connection.execute(select(bindings))]


def load_with_digest(connection: Connection) -> tuple[list[Binding], bytes | None]:
    """Return all bindings, and a digest for :data:`ARE_KNOWN`; None if there is none to compare."""
    if connection.dialect.name != "postgresql":
        return load(connection), None
    # In one statement, so that both are of one moment.
    rows = connection.execute(select(bindings, _DIGEST.label("digest"))).all()
    return [Binding(*row[:-1]) for row in rows], bytes(rows[0].digest) if rows else None


def add(connection: Connection, new: Sequence[Binding]) -> None:
    """Add bindings, except those that exist."""
    # In order, so that others who add the same ones wait instead of meeting in a deadlock.
    missing = sorted(set(new).difference(load(connection)))
    if missing:
        statement = _ADD[dialect_of(connection.dialect.name) or ""]
        connection.execute(statement, [binding._asdict() for binding in missing])


def take_turns(connection: Connection, queues: Sequence[str]) -> None:
    """Wait until no other transaction has its turn with one of ``queues``; ours ends with it."""
    row = bindings.c
    is_queue = and_(row.exchange == "", row.pattern == row.queue, row.queue.in_(queues))
    # In one order, so that others wait instead of meeting in a deadlock.
    connection.execute(select(row.queue).where(is_queue).order_by(row.queue).with_for_update())


def _digest() -> ColumnElement[bytes]:
    """Return a digest of all bindings; PostgreSQL only."""
    row = bindings.c
    columns = (row.queue, row.exchange, row.pattern)
    # As text, a row has quotes where they are needed: no two rows look alike.
    binding = cast(func.row(*columns), Text)
    together = func.string_agg(binding, postgresql.aggregate_order_by(literal(","), *columns))
    return select(func.sha256(func.convert_to(together, "UTF8"))).scalar_subquery()


_DIGEST = _digest()

ARE_KNOWN = bindparam("of_known", type_=LargeBinary) == _DIGEST
"""Whether the bindings are those with the digest ``of_known``; PostgreSQL only."""

_ADD = {
    "postgresql": postgresql.insert(bindings).on_conflict_do_nothing(),
    "mariadb": insert(bindings).prefix_with("IGNORE"),
    "sqlite": sqlite.insert(bindings).on_conflict_do_nothing(),
}


class Routes:
    """Finds the queues for an event: by topic, or by name on the exchange ``""``.

    For one thread; no I/O.
    """

    def __init__(self) -> None:
        self._bindings: frozenset[Binding] = frozenset()
        self._by_exchange: dict[str, list[Binding]] = {}
        self._cache: dict[tuple[str, str], tuple[str, ...]] = {}

    def update(self, bindings: Sequence[Binding]) -> None:
        """Use these bindings from now on."""
        new = frozenset(bindings)
        if new == self._bindings:
            return
        self._bindings = new
        self._by_exchange = {}
        for binding in new:
            self._by_exchange.setdefault(binding.exchange, []).append(binding)
        self._cache.clear()

    def has_queue(self, name: str) -> bool:
        """Return whether the queue ``name`` exists."""
        return of_queue(name) in self._bindings

    def queues(self, exchange: str, target: str) -> tuple[str, ...]:
        """Return the names of the queues for an event, sorted, each once; empty if unroutable."""
        if not exchange:
            return (target,) if self.has_queue(target) else ()
        address = (exchange, target)
        queues = self._cache.get(address)
        if queues is None:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            bound = self._by_exchange.get(exchange, ())
            queues = tuple(sorted({each.queue for each in bound if matches(each.pattern, target)}))
            self._cache[address] = queues
        return queues
