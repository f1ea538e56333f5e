"""The embedded transport: a SQLite file shared by the publishers and workers of one machine.

Needs the extra ``outbox-events[sql]``.
"""

import outbox.storage as _storage  # first, because it reports a missing extra
from outbox.transports.sqlite.parked_queues import SQLiteParkedQueues as ParkedQueues
from outbox.transports.sqlite.subscription import SQLiteSubscription as Subscription
from outbox.transports.sqlite.transport import SQLiteTransport as Transport

__all__ = ["ParkedQueues", "Subscription", "Transport"]

del _storage
