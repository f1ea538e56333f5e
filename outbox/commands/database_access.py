"""What the commands about stored events have in common: the database, and how it fails."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from outbox.commands.options import DATABASE_VARIABLE
from outbox.errors import BrokerError, UsageError

if TYPE_CHECKING:
    from outbox.sql import Store

__all__ = ["DatabaseAway", "open_store", "told"]


class DatabaseAway(BrokerError):
    """The database cannot be reached, or was lost on the way."""


@contextlib.contextmanager
def open_store(options: argparse.Namespace, *, check: bool = True) -> Iterator[Store]:
    """Yield the store that ``--database`` names.

    Args:
        options: of the command line.
        check: see first that the table is there.

    Raises:
        UsageError: no database is named, or it cannot be used.
        DatabaseAway: it cannot be reached; raised in place of SQLAlchemy's errors.
    """
    url = options.database or os.environ.get(DATABASE_VARIABLE)
    if not url:
        raise UsageError(f"name the database: --database URL, or {DATABASE_VARIABLE}")
    from outbox.sql import Store
    from outbox.storage.engines import open_engine

    engine = open_engine(url)
    try:
        with told():
            store = Store(engine)
            if check:
                store.check()
            yield store
    finally:
        engine.dispose()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell errors of the database in a line, without statements and their parameters."""
    from outbox.storage.failures import DatabaseError, reason_of

    try:
        yield
    except DatabaseError as error:
        raise DatabaseAway(f"the database failed: {reason_of(error)}") from error
