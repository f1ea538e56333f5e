"""Deduplication: the inbox, in which consumers note the messages that they have done."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from outbox import UsageError, sinks
from outbox.consumers.definition import Consumer
from outbox.messages.received_event import ReceivedEvent
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["Inbox", "InboxEntry", "open_inbox"]

logger = logging.getLogger("outbox.consumer")


class InboxEntry(Protocol):
    """The entry of an inbox for one message and one consumer."""

    @property
    def committed(self) -> bool:
        """Whether the handler's transaction has noted the message."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """The error that the last attempt to note it in the handler's transaction has met."""
        ...

    def is_done(self) -> bool:
        """Return whether the message has been done. Waits for the database."""
        ...

    def join(self) -> None:
        """Note the message in the handler's transaction, if there will be one. Doesn't block."""
        ...

    def accompany(self, write: Callable[[Any], None]) -> None:
        """Have ``write`` called with the connection on which the message is noted.

        It belongs to the same transaction, and is not called if that is not SQLAlchemy's.
        """
        ...

    def leave(self) -> None:
        """End what :meth:`join` began: the attempt is over."""
        ...

    def note(self) -> None:
        """Note the message, unless the handler's transaction has. Waits for the database."""
        ...

    def give_up(self) -> bool:
        """Prevent any note from now on: a transaction that would make one fails. Thread-safe.

        Returns:
            Whether it is too late: a transaction has noted the message, or is just about to.
        """
        ...


class Inbox(Protocol):
    """A record of the messages that consumers have done."""

    def entry(self, consumer: Consumer, event: ReceivedEvent) -> InboxEntry:
        """Return the entry of ``event``, without a look at the database yet."""
        ...


def open_inbox(settings: Settings, consumers: Iterable[Consumer]) -> Inbox | None:
    """Return the inbox that ``consumers`` need; None if none of them deduplicates.

    It is in the database of the framework that is set up; otherwise in that of
    ``OUTBOX_DATABASE_URL``, or else in the database that is consumed from.

    An unavailable database is not an error: messages are held until it is back.

    Raises:
        UsageError: there is no database for it, or the table is missing.
        MissingExtra: SQLAlchemy or the database's driver is not installed.
    """
    deduplicating = [consumer for consumer in consumers if consumer.deduplicate]
    if not deduplicating:
        return None
    if sinks.inbox is not None:
        inbox_of_framework: Inbox = sinks.inbox()
        return inbox_of_framework
    url = os.environ.get("OUTBOX_DATABASE_URL")
    broker = BrokerURL.parse(settings.url or "memory://")
    if not url and not broker.is_database:
        raise UsageError(
            f"the consumer of {deduplicating[0].queue!r} deduplicates, which needs a database; set "
            "OUTBOX_DATABASE_URL, or pass Worker(inbox=outbox.sql.Inbox(engine))"
        )
    from outbox import sql
    from outbox.storage.failures import DatabaseError, reason_of
    from outbox.transports.database.kinds import engine_at

    inbox = sql.Inbox(url or engine_at(broker))
    if not url and broker.scheme == "sqlite":
        inbox.create()
        return inbox
    try:
        inbox.check()
    except DatabaseError as error:
        logger.warning(
            "the inbox is unavailable; messages are held until it is back: %s", reason_of(error)
        )
    return inbox
