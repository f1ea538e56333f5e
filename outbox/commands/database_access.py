"""Access to the database of stored events, with its errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from outbox.commands.options import DATABASE_VARIABLE
from outbox.errors import BrokerError, UsageError
from outbox.url import BrokerURL

if TYPE_CHECKING:
    from outbox.commands.application import Application
    from outbox.sql import Store

__all__ = [
    "DatabaseUnavailable",
    "NoDatabase",
    "open_named_engine",
    "open_store",
    "translate_errors",
]


class DatabaseUnavailable(BrokerError):
    """The database cannot be reached, or the connection was lost."""


class NoDatabase(UsageError):
    """Neither the command line nor the application names a database."""


@contextlib.contextmanager
def open_store(options: argparse.Namespace, *, check: bool = True) -> Iterator[Store]:
    """Yield the store that ``--database`` names.

    Args:
        options: the options of the command line.
        check: True to check the table first.

    Raises:
        UsageError: no database is named, or it cannot be used.
        DatabaseUnavailable: the database failed; raised instead of SQLAlchemy's errors.
    """
    from outbox.sql import Store

    engine, is_applications = _engine(options)
    try:
        with translate_errors():
            store = Store(engine)
            if check:
                store.check()
            yield store
    finally:
        if not is_applications:
            engine.dispose()


def _engine(options: argparse.Namespace) -> tuple[Any, bool]:
    """Return the engine of the database, and whether it is the application's, to be left open."""
    application: Application = options.application
    if application.engine_of is not None:
        return application.engine_of(options.database), True
    url = options.database or application.database_url
    if not url and application.engine is not None:
        return application.engine(), True
    url = url or os.environ.get(DATABASE_VARIABLE)
    if url:
        from outbox.storage.engines import open_engine

        return open_engine(url), False
    broker = _broker_on_server()
    if broker is None:
        raise NoDatabase(f"no database is named; pass --database URL, or set {DATABASE_VARIABLE}")
    from outbox.transports.database.kinds import engine_at

    return engine_at(broker), False


def _broker_on_server() -> BrokerURL | None:
    """Return the URL of the broker if that is a database on a server; a file has its tables."""
    try:
        broker = BrokerURL.parse(os.environ.get("OUTBOX_URL", ""))
    except UsageError:
        return None
    return broker if broker.is_database and broker.scheme != "sqlite" else None


def open_named_engine(options: argparse.Namespace) -> Callable[[], tuple[Any, bool]] | None:
    """Return a function for the engine of the database that the command line names.

    It returns the engine, and whether to leave it open, and raises ``UsageError`` as ``open_store``
    does, of which ``NoDatabase`` is one. The result is None if neither the command line nor the
    application names a database.
    """
    application: Application = options.application
    is_named = options.database or application.database_url or os.environ.get(DATABASE_VARIABLE)
    is_named = is_named or application.engine is not None or application.engine_of is not None
    if not is_named and _broker_on_server() is None:
        return None
    return lambda: _engine(options)


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Reduce database errors to one line, without the statement and its parameters."""
    from outbox.storage.failures import DatabaseError, reason_of

    try:
        yield
    except DatabaseError as error:
        raise DatabaseUnavailable(f"the database failed: {reason_of(error)}") from error
