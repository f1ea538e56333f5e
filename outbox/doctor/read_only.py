"""SQLite files, opened so that nothing can change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from outbox.doctor.finding import NotChecked
from outbox.errors import UsageError
from outbox.storage.engines import names_memory
from outbox.storage.failures import DatabaseError, reason_of

__all__ = ["path_of", "read_only", "read_only_file", "reading"]


def path_of(url: URL) -> str:
    """Return the path of the file that a database URL names.

    Raises:
        NotChecked: it is a database in memory.
    """
    if names_memory(url):
        raise NotChecked("the database is in memory, so only its process can see it")
    path = str(url.database).removeprefix("file:").partition("?")[0]
    return os.path.abspath(path)


def read_only(url: URL) -> Engine:
    """Return an engine for the file that ``url`` names; see :func:`read_only_file`."""
    return read_only_file(path_of(url))


def read_only_file(path: str) -> Engine:
    """Return an engine for a file, which can't write.

    Raises:
        UsageError: there is no such file.
    """
    if not os.path.exists(path):
        raise UsageError(f"there is no file {path}")
    name = f"file:{quote(path)}?mode=ro"
    return create_engine(
        URL.create("sqlite", database=name, query={"uri": "true"}), poolclass=NullPool
    )


@contextlib.contextmanager
def reading(path: str) -> Iterator[Connection]:
    """Connect to a file that nothing may change.

    Raises:
        NotChecked: the file can't be read.
    """
    try:
        engine = read_only_file(path)
        with engine.connect() as connection:
            yield connection
    except (DatabaseError, UsageError) as error:
        why = reason_of(error) if isinstance(error, DatabaseError) else str(error)
        raise NotChecked(f"{path} can't be read: {why}") from None
