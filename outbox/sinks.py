"""Sinks: the seam between collecting events and storing them in a transaction."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from outbox.event import Event
    from outbox.publisher import Publisher

__all__ = [
    "BOUND",
    "Bound",
    "OpenRow",
    "Sink",
    "bind",
    "bound",
    "framework",
    "has_session",
    "inbox",
    "is_begun",
    "remove",
    "session",
    "sink_using",
]

Sink = Callable[["Event", "Publisher | None"], bool]
"""A function that takes an event, with the publisher of the unit or the process, if any.

It returns whether it has stored the event in a transaction, which the observer has yet to learn.
"""


class OpenRow(Protocol):
    """A row that was stored in a transaction that was open then."""

    @property
    def is_open(self) -> bool:
        """Whether the transaction is open, so that the row may be committed or dropped."""
        ...

    @property
    def is_dropped(self) -> bool:
        """Whether the row was rolled back; False if that isn't known for certain."""
        ...


class Bound(enum.Enum):
    """The type of :data:`BOUND`."""

    BOUND = enum.auto()


BOUND: Final = Bound.BOUND
"""The default of ``session=`` and ``using=``: what was bound, or configured, decides."""

sink_using: Callable[[str | Bound], Sink | None] | None = None
"""Returns the sink of a framework's database by its alias, with BOUND of the configured one.

None if no framework is set up; its result is None if events are to be collected.
"""

bound: Callable[[], Sink | None] | None = None
"""Returns the sink of the transaction that is open here, or None; see ``bind``."""


remove: Callable[[], Any] | None = None
"""Removes the current session of the scoped session that was bound, if one was."""


session: Callable[[], Any] | None = None
"""Returns the current session of what was bound, which a scoped session creates if need be."""


inbox: Callable[[], Any] | None = None
"""Returns the inbox in a framework's database; None if no framework is set up."""


framework: Any = None
"""What a framework knows of its mapped classes and its own tasks; None if none is set up.

See ``outbox.django.tasks.project_tasks.ProjectTasks``.
"""


has_session: Callable[[], bool] | None = None
"""Returns whether the scoped session that was bound, if one was, has a session in this scope."""


is_begun: Callable[[], bool] | None = None
"""Returns whether a session's transaction that was begun explicitly in this context is open."""


def bind(
    provider: Callable[[], Sink | None] | None,
    removing: Callable[[], Any] | None = None,
    having: Callable[[], bool] | None = None,
    current: Callable[[], Any] | None = None,
) -> None:
    """Store each event that is enqueued in a transaction in that one; None ends this."""
    global bound, has_session, remove, session
    bound = provider
    has_session = having
    remove = removing
    session = current
