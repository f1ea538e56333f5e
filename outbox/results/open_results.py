"""Where the results of tasks are: in the database of the setting, or in that of the queues."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from outbox.errors import UsageError
from outbox.settings import Settings
from outbox.system import process
from outbox.url import BrokerURL

if TYPE_CHECKING:
    from outbox.results.results_store import ResultsStore
    from outbox.results.results_writer import ResultsWriter

__all__ = ["results_store_of", "results_writer_of"]

logger = logging.getLogger("outbox.consumer")

OFF = "off"
"""The setting with which a database that holds the queues keeps no results."""


def results_store_of(settings: Settings) -> ResultsStore | None:
    """Return the store of results, not connected yet; None if none are kept.

    Raises:
        UsageError: results can't be kept in the database of the setting.
        MissingExtra: SQLAlchemy or the database's driver is not installed.
    """
    if settings.results == OFF:
        return None
    if settings.results:
        return _store(settings.results, process.pid)
    if settings.url is None:
        return None
    url = BrokerURL.parse(settings.url)
    if url.scheme == "sqlite":
        return _store_in_file(os.path.abspath(url.path), process.pid)
    return _store_on_server(settings.url, process.pid) if url.is_database else None


def results_writer_of(settings: Settings) -> ResultsWriter | None:
    """Return what writes the results of a worker's tasks, not started; None if none are kept.

    An unavailable database is not an error: tasks are held until it is back.

    Raises:
        UsageError: results can't be kept in the database of the setting, or the table is missing.
        MissingExtra: SQLAlchemy or the database's driver is not installed.
    """
    store = results_store_of(settings)
    if store is None:
        return None
    from outbox.results.results_writer import ResultsWriter
    from outbox.storage.failures import DatabaseError, reason_of

    try:
        store.prepare()
    except DatabaseError as error:
        logger.warning(
            "the database of results is unavailable; tasks are held until it is back: %s",
            reason_of(error),
        )
    return ResultsWriter(store)


@functools.lru_cache(maxsize=16)
def _store_in_file(path: str, pid: int) -> ResultsStore:
    """Return the store in the file that is the broker.

    An ack waits for the disk, and with it all that was written to the file's log before. So what is
    written here needs no wait.
    """
    from outbox.results.results_store import ResultsStore
    from outbox.storage.engines import open_sqlite

    return _closing(ResultsStore(open_sqlite(path, synchronous="NORMAL")))


@functools.lru_cache(maxsize=16)
def _store_on_server(url: str, pid: int) -> ResultsStore:
    from outbox.results.results_store import ResultsStore
    from outbox.transports.database.server.server_address import ServerAddress

    address = ServerAddress.of(BrokerURL.parse(url))
    return _closing(ResultsStore(address.open_engine(), address.open_listening_engine()))


@functools.lru_cache(maxsize=16)
def _store(where: Any, pid: int) -> ResultsStore:
    from sqlalchemy import NullPool, make_url
    from sqlalchemy.exc import ArgumentError

    from outbox.results.results_store import ResultsStore
    from outbox.storage.engines import engine_beside, open_engine, open_sqlite

    if not isinstance(where, str):
        engine = engine_beside(where)
        if engine is None:
            raise UsageError(
                "results can't be kept with this engine, since outbox can't connect in threads as "
                "it does; give its URL, or an engine with a synchronous driver"
            )
        return ResultsStore(engine, engine)
    if where.startswith("sqlite"):
        engine = open_engine(where)  # which checks the URL
        engine.dispose()
        return _closing(ResultsStore(open_sqlite(os.path.abspath(make_url(where).database or ""))))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        return ResultsStore(open_engine(where))  # which says what is wrong with it
    listen = url.query.get("listen")
    if url.get_backend_name() != "postgresql" or not (listen is None or isinstance(listen, str)):
        return _closing(ResultsStore(open_engine(url)))
    url = url.difference_update_query(["listen"])
    listening = None if listen == "no" else open_engine(listen or url, pool=NullPool)
    return _closing(ResultsStore(open_engine(url), listening))


def _closing(store: ResultsStore) -> ResultsStore:
    """Return a store whose engine is disposed of when nothing refers to the store any more."""
    from outbox.storage.engines import dispose_with

    dispose_with(store, store.engine)
    return store
