"""Wakes the workers of a database in PostgreSQL when events were committed for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable

from sqlalchemy.pool import NullPool

from outbox.storage.notifications import Listener, Sender, can_listen, channel_of
from outbox.transports.database.server.server_address import ServerAddress

__all__ = ["Waking"]

logger = logging.getLogger("outbox.consumer")

_REMEDY = (
    "looking for messages every {poll} s instead. Behind a pooler in transaction mode, where "
    "notifications don't arrive, name a URL that leads to PostgreSQL itself with ?listen= or "
    "OUTBOX_LISTEN_URL, or ?listen=no"
)


class Waking:
    """Notifies workers in other processes, and listens for them. Thread-safe.

    It opens a connection for each of the two while they are used.
    """

    def __init__(self, address: ServerAddress, *, idle_timeout: float) -> None:
        """Prepare; nothing is connected yet, and no thread runs.

        Args:
            address: the database.
            idle_timeout: the seconds after which a connection that notifies is closed.
        """
        self._address = address
        self._engine = address.open_engine(pool=NullPool)
        self._sender: Sender | None = None
        if can_listen(self._engine):
            self._sender = Sender(self._engine, idle_timeout=idle_timeout)
        self._listener: Listener | None = None

    @property
    def is_proven(self) -> bool:
        """Whether what is committed for this worker's queues is known to wake it."""
        return self._listener is not None and self._listener.is_proven

    def make_ready(self) -> None:
        """Start the thread now that notifies, since Python may refuse that later.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
        """
        if self._sender is not None:
            self._sender.make_ready()

    def notify(self, queues: Iterable[str]) -> None:
        """Wake the workers of ``queues`` soon; never wait or raise."""
        if self._sender is not None:
            schema = self._address.schema
            self._sender.notify([channel_of(queue, schema) for queue in queues])

    def listen(self, event: threading.Event, queues: Collection[str]) -> None:
        """Set ``event`` when events were committed to ``queues``, until :meth:`stop_listening`.

        And whenever :attr:`is_proven` changes.
        """
        engine = self._address.open_listening_engine()
        if engine is None or not can_listen(engine):
            return
        self._listener = Listener(
            engine,
            [channel_of(queue, self._address.schema) for queue in queues],
            event.set,
            logger=logger,
            remedy=_REMEDY.format(poll=self._address.poll),
            notifying=self._engine,
        )
        self._listener.start()

    def note_found(self) -> None:
        """Note that a look has found rows: who finds none leaves the next ones to others."""
        if self._listener is not None:
            self._listener.has_found = True

    def stop_listening(self) -> None:
        """Undo :meth:`listen`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def close(self) -> None:
        """Send what is still to be sent, for a second at most, and disconnect."""
        if self._sender is not None:
            self._sender.close()
