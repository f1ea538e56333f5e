"""The application context in which a consumer handles a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask

from outbox.backlog.notifier import ids
from outbox.errors import UsageError

__all__ = ["message_context"]


@contextmanager
def message_context(app: Flask, *, stores: bool) -> Iterator[None]:
    """Run the body in an application context, at whose end Flask-SQLAlchemy removes its session.

    Raises:
        UsageError: the body has succeeded, but left stored events without a commit. The message
            must not be done then.
    """
    with app.app_context():
        yield
        if stores:
            _check_committed(app)


def _check_committed(app: Flask) -> None:
    from outbox.sql.transaction import uncommitted_events

    sessions = app.extensions["sqlalchemy"].session
    events = uncommitted_events(sessions()) if sessions.registry.has() else ()
    if events:
        raise UsageError(
            f"the handler has left {len(events)} stored event(s) uncommitted: {ids(events)}; call "
            "db.session.commit() at its end, or enqueue with session=None what doesn't belong to "
            "its transaction"
        )
