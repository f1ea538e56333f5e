"""The kinds of databases: a SQLite file, or one on a server."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from outbox.storage.engines import open_sqlite
from outbox.storage.store import Store
from outbox.transports.database.database import Database
from outbox.transports.database.server.server_address import ServerAddress
from outbox.transports.database.server.server_database import ServerDatabase
from outbox.transports.database.sqlite.location import Location
from outbox.transports.database.sqlite.sqlite_file import SQLiteFile
from outbox.url import BrokerURL

__all__ = ["database_at", "engine_at", "store_at"]


def database_at(
    url: BrokerURL,
    given_up: Callable[[], bool] = lambda: False,
    on_reopened: Callable[[bool], None] = lambda _: None,
    *,
    owner: str = "",
    must_exist: bool = False,
) -> Database:
    """Return the database that ``url`` names, not yet connected.

    Args:
        url: the URL.
        given_up: a function that returns whether to stop waiting for others.
        on_reopened: called when the database was opened again, with whether it is another one,
            because a file was deleted or replaced.
        owner: the owner of the rows that are leased there; see ``Store``.
        must_exist: whether a file must exist already.

    Raises:
        UsageError: the URL has an unknown option, or the database can't be used.
    """
    if url.scheme != "sqlite":
        return ServerDatabase(url, on_reopened, owner=owner)
    location = Location.of(url)
    if must_exist:
        location.check_exists()
    return SQLiteFile(location, given_up, on_reopened, owner=owner)


def engine_at(url: BrokerURL) -> Engine:
    """Return an engine for the database that ``url`` names, for what is kept beside the queues.

    Raises:
        UsageError: the URL has an unknown option, or the database can't be used.
        MissingExtra: the driver isn't installed.
    """
    if url.scheme != "sqlite":
        return ServerAddress.of(url).open_engine()
    return open_sqlite(Location.of(url).path)


def store_at(url: BrokerURL) -> Store:
    """Return the store of the rows in the database that ``url`` names, with a new engine.

    Raises:
        UsageError, MissingExtra: see :func:`engine_at`.
    """
    return Store(engine_at(url))
