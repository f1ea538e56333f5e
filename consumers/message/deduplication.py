"""Deduplication: the inbox, in which consumers note what they have done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Protocol

from outbox import UsageError
from outbox.consumers.definition import Consumer
from outbox.consumers.received_event import ReceivedEvent
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["Inbox", "InboxEntry", "open_inbox"]

logger = logging.getLogger("outbox.consumer")


class InboxEntry(Protocol):
    """What an inbox knows of one message and one consumer."""

    @property
    def committed(self) -> bool:
        """Whether the handler's own transaction has noted it."""
        ...

    def is_done(self) -> bool:
        """Return whether the message has been done. Waits for the database."""
        ...

    def join(self) -> None:
        """Have it noted in the handler's own transaction, if it has one. Waits for nothing."""
        ...

    def leave(self) -> None:
        """End what :meth:`join` began: the attempt is over."""
        ...

    def note(self) -> None:
        """Note that it is done, unless the handler's transaction has. Waits for the database."""
        ...

    def give_up(self) -> bool:
        """Have nothing noted any more: a transaction that would do so fails. Thread-safe.

        Returns:
            Whether it is too late for that: a transaction has noted it, or is just about to.
        """
        ...


class Inbox(Protocol):
    """Remembers which messages a consumer has done."""

    def entry(self, consumer: Consumer, event: ReceivedEvent) -> InboxEntry:
        """Return what is known of ``event``; asks nobody yet."""
        ...


def open_inbox(settings: Settings, consumers: Iterable[Consumer]) -> Inbox | None:
    """Return the inbox that ``consumers`` need; None if none of them deduplicates.

    It is in the database ``OUTBOX_DATABASE_URL``, or in the file of SQLite that is consumed from.

    A database that is away is no error: messages are held for as long as it is.

    Raises:
        UsageError: nobody names a database, or its table is missing.
        MissingExtra: SQLAlchemy or the database's driver is not installed.
    """
    needing = [one for one in consumers if one.deduplicate]
    if not needing:
        return None
    url = os.environ.get("OUTBOX_DATABASE_URL")
    broker = BrokerURL.parse(settings.url or "memory://")
    if not url and broker.scheme != "sqlite":
        raise UsageError(
            f"the consumer of {needing[0].queue!r} deduplicates, and nobody says where: set "
            "OUTBOX_DATABASE_URL, or give Worker(inbox=outbox.sql.Inbox(engine))"
        )
    from outbox import sql
    from outbox.storage.engines import open_sqlite
    from outbox.storage.failures import DatabaseError, reason_of

    if url:
        inbox = sql.Inbox(url)
        try:
            inbox.check()
        except DatabaseError as error:  # messages are held until it is there
            logger.warning("the inbox cannot be looked at for now: %s", reason_of(error))
        return inbox

    inbox = sql.Inbox(open_sqlite(os.path.abspath(broker.path)))
    inbox.create()
    return inbox
