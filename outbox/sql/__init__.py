"""The durable outbox: events in a table of the application's own database.

Needs the extra ``outbox-events[sql]``, which is SQLAlchemy 2, and the database's driver.
"""

from __future__ import annotations

import outbox.storage as _storage  # first, because it reports a missing extra
from outbox.sql.handover import drain
from outbox.sql.inbox import Inbox
from outbox.sql.relay import Relay, RelayStats
from outbox.sql.transaction import bind
from outbox.storage.schema import events, metadata, metadata_of
from outbox.storage.store import Claimed, Status, Store

__all__ = [
    "Claimed",
    "Inbox",
    "Relay",
    "RelayStats",
    "Status",
    "Store",
    "bind",
    "drain",
    "events",
    "metadata",
    "metadata_of",
]

del _storage
