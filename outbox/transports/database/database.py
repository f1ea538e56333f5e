"""What a publisher or worker needs of its database, whichever kind that is."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine

from outbox.storage.floors import Floors
from outbox.storage.store import Claimed, Store
from outbox.transports.database.listeners import listeners_at
from outbox.transports.database.routing import Binding

__all__ = ["UNLIMITED", "Database", "Room"]

_T = TypeVar("_T")


class Room(NamedTuple):
    """The bytes of events that may be written; 0 or less if none.

    Attributes:
        for_new: bytes of events that come in addition.
        for_copies: bytes of events each of which is about to replace a message.
    """

    for_new: int
    for_copies: int

    def without(self, size: int) -> Room:
        """Return the room that remains after events of ``size`` bytes."""
        return Room(self.for_new - size, self.for_copies - size)


UNLIMITED = Room(sys.maxsize, sys.maxsize)


class Database(ABC):
    """A connection to one database, opened when needed, and again after a failure.

    For one thread, except for :meth:`published`, :meth:`listen` and :meth:`stop_listening`.

    Attributes:
        name: the database in log lines and error messages; without a password.
        address: the same as a URL.
        lease: the seconds until the messages of a worker that died are redelivered.
        idle_timeout: the seconds after which a connection that isn't used is closed; None if never.
        floors: where claims that are repeated begin; None if nothing is left of claimed rows.
    """

    lease: ClassVar[float]
    idle_timeout: ClassVar[float | None] = None
    floors: Floors | None = None

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._listeners = listeners_at(address)

    @property
    def poll(self) -> float:
        """The longest time in seconds between two looks for events of other processes."""
        return 0.1

    @property
    @abstractmethod
    def store(self) -> Store:
        """The store of the events in the database."""

    @abstractmethod
    def open(self) -> None:
        """Connect, unless that has been done.

        Raises:
            BrokerError: the database can't be used now; the cause is a UsageError if retrying is
                useless.
        """

    @abstractmethod
    def run(self, work: Callable[[Connection], _T], *, durable: bool = True) -> _T:
        """Return what ``work`` returns, called in a transaction that is committed at its end.

        Args:
            work: a function of the connection. It may be called again, after everything it has
                written was rolled back.
            durable: whether the commit waits for the disk. If not, a power cut may undo it.

        Raises:
            BrokerError: the database can't be written now; nothing has changed, unless the commit
                itself failed.
        """

    @abstractmethod
    def changed(self) -> bool:
        """Return whether others may have committed since the last call (True at first).

        Raises:
            BrokerError: the database can't be used now.
        """

    @abstractmethod
    def due_in(self, queues: Sequence[str]) -> float | None:
        """Return the seconds until a row of one of ``queues`` is due; None if they are empty.

        0 or less means that a row is due now. Leased rows count, because they are due again when
        their lease ends. Takes no lock.

        Raises:
            BrokerError: the database can't be used now.
        """

    def put_rows(self, rows: Sequence[dict[str, Any]], connection: Connection) -> None:
        """Store rows in the transaction of ``connection``, in their order.

        Raises:
            ValueError: a row is larger than the database allows.
        """
        self.store.put_rows(rows, connection=connection)

    def put_known(self, rows: Sequence[dict[str, Any]], digest: bytes) -> bool:
        """Store rows in their order, in one round trip, if the bindings are those with ``digest``.

        Returns:
            Whether they are committed. If not, nothing has changed; also where that needs a
            transaction.

        Raises:
            BrokerError: the database can't be written now; nothing has changed, unless the
                connection was lost.
        """
        return False

    def exchanges(self, queues: Sequence[str]) -> bool:
        """Return whether :meth:`exchange` does now what a claim would for all ``queues``."""
        return False

    def exchange(self, done: Sequence[Claimed], limit: int, queue: str) -> list[Claimed]:
        """Delete rows that are processed, and claim others, in one round trip.

        The commit doesn't wait for the disk. Call it if :meth:`exchanges`.

        Args:
            done: the claimed rows to delete.
            limit: the maximum number of rows to claim; there may be more than come.
            queue: the queue to claim from.

        Raises:
            BrokerError: the database can't be written now. It may have been committed.
        """
        raise NotImplementedError

    def room(self) -> Room:
        """Return the room for events.

        Raises:
            BrokerError: the database can't be used now.
        """
        return UNLIMITED

    @abstractmethod
    def holds(self, engine: Engine, options: Mapping[str, Any]) -> bool:
        """Return whether ``engine``, an application's, writes events to the tables used here.

        URLs don't tell: a pooler, an alias or a socket leads to the same tables, and a search path
        to others.

        Args:
            engine: the engine.
            options: what a connection's execution options add to the engine's.

        Raises:
            BrokerError: the database can't be used now.
            sqlalchemy.exc.SQLAlchemyError: the application's can't.
            Unfit: it can't be used from this thread.
            UsageError: the tables are those of an earlier version.
        """

    def bindings(self) -> list[Binding] | None:
        """Return the bindings of the moment; None if that could keep the application waiting.

        Raises:
            BrokerError: the database can't be used now.
        """
        return None

    def published(self, queues: Collection[str]) -> None:
        """Wake those who listen: events were committed to ``queues``. Never blocks."""
        self._listeners.wake()

    def listen(self, event: threading.Event, queues: Collection[str]) -> None:
        """Set ``event`` whenever events are published to ``queues``, and maybe to others.

        Until :meth:`stop_listening`. Those of other processes may not be noticed, so polling goes
        on.
        """
        self._listeners.add(event)

    def stop_listening(self, event: threading.Event) -> None:
        """Undo :meth:`listen`."""
        self._listeners.remove(event)

    @abstractmethod
    def note_found(self) -> None:
        """Note that a look for rows has found some: who finds none is woken after others."""

    @abstractmethod
    def make_ready(self) -> None:
        """Start the threads now that may be needed later: Python may refuse that, while it exits.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
        """

    def end(self) -> None:
        """Close the connections for good, after :meth:`published` has had its effect."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the connection, if there is one. It is opened again when needed."""
