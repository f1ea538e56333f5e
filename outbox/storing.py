"""The seam between collecting an event and storing it in the application's own transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from outbox.errors import UsageError

if TYPE_CHECKING:
    from outbox.event import Event
    from outbox.publisher import Publisher

__all__ = ["Sink", "bind", "bound", "remove", "sink_of"]

Sink = Callable[["Event", "Publisher | None"], None]
"""Stores an event in an open transaction; the publisher is the process's, if it has one."""

bound: Callable[[], Sink | None] | None = None
"""Returns where plain events go while a transaction is open here, else None; see ``bind``."""


remove: Callable[[], Any] | None = None
"""Ends the present session of a scoped one that was bound, if there is one."""


def bind(
    provider: Callable[[], Sink | None] | None, removing: Callable[[], Any] | None = None
) -> None:
    """Have every event that is enqueued in a transaction stored in it; None ends that."""
    global bound, remove
    bound = provider
    remove = removing


def sink_of(session: Any, connection: Any) -> Sink:
    """Return what stores events in the transaction of ``session`` or of ``connection``.

    Raises:
        UsageError: both are given, or one of them is none that events can be stored with.
        MissingExtra: SQLAlchemy is not installed.
    """
    if session is not None and connection is not None:
        raise UsageError("give session or connection, not both")
    from outbox.sql.transaction import sink_of_connection, sink_of_session

    return sink_of_session(session) if connection is None else sink_of_connection(connection)
