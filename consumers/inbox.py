"""Where consumers that deduplicate remember what they have done, unless they are told."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from outbox import UsageError
from outbox.consumers.consumer import Consumer
from outbox.consumers.life import Inbox
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["open_inbox"]

logger = logging.getLogger("outbox.consumer")


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
    from outbox.sql.engines import open_sqlite
    from outbox.sql.failures import DatabaseError, reason_of

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
