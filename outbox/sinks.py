"""The seam between collecting an event and storing it in the application's own transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox.event import Event
    from outbox.publisher import Publisher

__all__ = ["bind", "bound", "remove", "Sink"]

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
