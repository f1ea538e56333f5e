"""Transactions of outbox alone, which are independent of how the application configured its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from outbox.storage.schema import dialect_of
from outbox.telemetry import tracing

__all__ = ["READS_ONLY", "is_conflict", "own_transaction", "reading", "try_again"]

_T = TypeVar("_T")

READS_ONLY = "outbox_reads_only"
"""The option of a connection whose transactions read only: on SQLite they wait for no writer."""

_CONFLICTS = ("40001", "40P01")  # serialization_failure, deadlock_detected
_MARIADB_CONFLICTS = (1205, 1213)  # ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK
_TRIES = 8
_PAUSE = (0.005, 0.5)  # seconds between two tries: the first time, and at most


@contextmanager
def own_transaction(engine: Engine, *, durable: bool = True) -> Iterator[Connection]:
    """Run a block in a new transaction, and commit at its end.

    On a server it is READ COMMITTED, even if the engine or the server has another default: a
    claim skips the rows of other claims, so it needs no snapshot, and a stricter level would make
    it fail, and the application's transactions with it. MariaDB's default also locks gaps between
    rows, into which the application inserts.

    Args:
        engine: the engine, which may be the application's.
        durable: whether the commit waits for the disk. If not, a power cut may undo the
            transaction. PostgreSQL only.
    """
    dialect = dialect_of(engine.dialect.name)
    is_server = dialect != "sqlite"
    with tracing.hidden(), engine.connect() as connection:
        if is_server and not (dialect == "mariadb" and _is_read_committed(engine)):
            connection.execution_options(isolation_level="READ COMMITTED")
        try:
            with connection.begin():
                if dialect == "postgresql" and not durable:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
                yield connection
        except DBAPIError as error:
            # The server itself may be the reason, without closing the connection: after a failover
            # it is a standby, and refuses to write for as long as the connection is used. A new
            # connection leads to the server that is right now.
            if is_server and not is_conflict(error):
                connection.invalidate(error)
            raise


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Run a block of one statement that only reads; on SQLite it needs no lock."""
    if dialect_of(engine.dialect.name) == "sqlite":
        with own_transaction(engine.execution_options(**{READS_ONLY: True})) as connection:
            yield connection
        return
    with tracing.hidden(), engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def _is_read_committed(engine: Engine) -> bool:
    """Return whether the engine itself sets the level, on each connection that it opens."""
    level = getattr(engine.dialect, "_on_connect_isolation_level", None)
    return level == "READ COMMITTED" and "isolation_level" not in engine.get_execution_options()


def is_conflict(error: BaseException) -> bool:
    """Return whether the server rolled the transaction back so that another one could go on.

    After a lock wait that took too long, MariaDB has undone only the statement.
    """
    cause = getattr(error, "orig", None)
    number = (getattr(cause, "args", None) or (None,))[0]  # PyMySQL, mysqlclient
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)  # psycopg, psycopg2
    return state in _CONFLICTS or number in _MARIADB_CONFLICTS


def try_again(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns; run it again, at most 8 times, after a conflict.

    Args:
        work: a function that runs one transaction.
    """
    pause = _PAUSE[0]
    for _ in range(_TRIES - 1):
        try:
            return work()
        except DBAPIError as error:
            if not is_conflict(error):
                raise
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _PAUSE[1])
    return work()
