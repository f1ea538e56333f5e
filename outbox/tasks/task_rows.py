"""The rows of tasks, where they wait in a database: seen, and taken away before a worker has them.

One statement does both the look and the deed, so that a worker which claims the row at the same
time has either all of it or nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from outbox.event import Event
from outbox.messages.headers import TASK
from outbox.messages.rows import headers_of
from outbox.observer import seam
from outbox.results.result_row import args_of, cut
from outbox.settings import Settings
from outbox.system import process
from outbox.unit_of_work.unit_of_work import UnitOfWork
from outbox.url import BrokerURL

__all__ = ["delete", "engine_of", "note_dropped", "usable", "waits"]


def engine_of(settings: Settings) -> Any:
    """Return an engine for the database that is the broker, or None if the broker is none."""
    if settings.url is None:
        return None
    if not BrokerURL.parse(settings.url).is_database:
        return None
    return _store_of_broker(settings.url, process.pid).engine


@functools.lru_cache(maxsize=16)
def _store_of_broker(url: str, pid: int) -> Any:
    from outbox.storage.engines import dispose_with
    from outbox.transports.database.kinds import store_at

    store = store_at(BrokerURL.parse(url))
    dispose_with(store, store.engine)
    return store


def usable(engine: Any) -> Any:
    """Return ``engine``, or one that needs no event loop in its place; None if there can't be."""
    if not engine.dialect.is_async:
        return engine
    from outbox.storage.engines import engine_beside

    return engine_beside(engine)


def waits(engine: Any, event_id: str) -> bool:
    """Return whether a row of this id is there that no worker has."""
    from outbox.storage.task_statements import count_waiting

    return count_waiting(engine, event_id) > 0


def delete(engine: Any, event_id: str) -> dict[str, Any] | None:
    """Delete the row of this id that no worker has.

    Returns:
        What it has called: ``task``, ``queue`` and ``args``, as they are kept; None if there was
        no row.
    """
    from outbox.storage.task_statements import delete_waiting

    rows = delete_waiting(engine, event_id)
    return _call_in(rows[0]) if rows else None


def _call_in(row: Any) -> dict[str, Any]:
    try:
        task = str(headers_of(row.headers).get(TASK, ""))
    except ValueError:  # another program wrote it
        task = ""
    body = row.payload.encode() if isinstance(row.payload, str) else bytes(row.payload)
    return {"task": cut(task)[:255], "queue": row.type, "args": args_of(body)}


def note_dropped(unit: UnitOfWork, event: Event) -> None:
    """Note an event that was taken out of its unit of work, for a test that observes it."""
    if unit.dropped is not None:
        unit.dropped.append(event.id)
    observer = unit.observer or seam.observer
    if observer is not None:
        observer.cleared([event])
