"""The transport over a database: a SQLite file shared by the processes of one machine.

Needs the extra ``outbox-events[sql]``.
"""

import outbox.storage as _storage  # first, because it reports a missing extra
from outbox.transports.database.kinds import store_at
from outbox.transports.database.parked_queues import DatabaseParkedQueues as ParkedQueues
from outbox.transports.database.presence.presence_records import (
    DatabasePresenceRecords as PresenceRecords,
)
from outbox.transports.database.recurring.tick_records import DatabaseTickRecords as TickRecords
from outbox.transports.database.recurring.ticker import DatabaseTicker as Ticker
from outbox.transports.database.subscription import DatabaseSubscription as Subscription
from outbox.transports.database.transport import DatabaseTransport as Transport

__all__ = [
    "ParkedQueues",
    "PresenceRecords",
    "Subscription",
    "TickRecords",
    "Ticker",
    "Transport",
    "store_at",
]

del _storage
