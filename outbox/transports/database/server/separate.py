"""A schema or database for one test, with outbox's tables and nothing else in it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from sqlalchemy import Engine, make_url

from outbox.errors import ConnectFailed, UsageError
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.store import Store
from outbox.transports.database.server.server_address import ServerAddress
from outbox.url import BrokerURL

__all__ = ["separate"]


@contextlib.contextmanager
def separate(url: str) -> Iterator[str]:
    """Create a place for events on a server, for a block; yield its URL.

    It is a schema of a PostgreSQL database, or a database beside that of MariaDB. It is dropped at
    the end of the block.

    Raises:
        UsageError: the URL names no database on a server.
        ConnectFailed: the server can't be reached, or refuses to create it.
    """
    parsed = BrokerURL.parse(url)
    if not parsed.is_database or parsed.scheme == "sqlite":
        raise UsageError(f"{parsed} names no database on a server")
    name = f"outbox_test_{uuid.uuid4().hex[:12]}"
    kind, end = ("SCHEMA", " CASCADE") if parsed.scheme == "postgresql" else ("DATABASE", "")
    its_url = make_url(url)
    if kind == "SCHEMA":
        its_url = its_url.update_query_dict({"schema": name})
    else:
        its_url = its_url.set(database=name)
    address = its_url.render_as_string(hide_password=False)
    engine = ServerAddress.of(parsed).open_engine()
    try:
        _execute(engine, f"CREATE {kind} {name}", parsed)
        try:
            own = ServerAddress.of(BrokerURL.parse(address)).open_engine()
            Store(own).create()
            own.dispose()
            yield address
        finally:
            _execute(engine, f"DROP {kind} {name}{end}", parsed)
    finally:
        engine.dispose()


def _execute(engine: Engine, statement: str, url: BrokerURL) -> None:
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    except DatabaseError as error:
        raise ConnectFailed(f"{url}: {reason_of(error)}") from error
