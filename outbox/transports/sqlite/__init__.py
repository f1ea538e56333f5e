"""The embedded transport: a file of SQLite, which publishers and workers of one machine share.

Needs the extra ``outbox-events[sql]``.
"""

import outbox.sql as _sql  # first of all: it says which extra is missing
from outbox.transports.sqlite.consuming import SQLiteSubscription
from outbox.transports.sqlite.parked import SQLiteParkedQueues
from outbox.transports.sqlite.publishing import SQLiteTransport

__all__ = ["SQLiteParkedQueues", "SQLiteSubscription", "SQLiteTransport"]

del _sql
