"""The durable outbox: events in a table of the application's own database.

Needs the extra ``outbox-events[sql]``, which is SQLAlchemy 2, and the database's driver.
"""

from __future__ import annotations

from outbox.errors import MissingExtra

try:
    import sqlalchemy
except ModuleNotFoundError as error:
    raise MissingExtra(
        "SQLAlchemy is not installed, which tables of events need: pip install 'outbox-events[sql]'"
    ) from error
if sqlalchemy.__version__ < "2.":
    raise MissingExtra(
        f"SQLAlchemy {sqlalchemy.__version__} is too old, 2.0 is needed: "
        "pip install 'outbox-events[sql]'"
    )

from outbox.sql.handover import drain
from outbox.sql.inbox import Inbox
from outbox.sql.relay import Relay, RelayStats
from outbox.sql.schema import events, metadata
from outbox.sql.store import Claimed, Status, Store
from outbox.sql.transaction import bind

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
]
