"""Statements that PostgreSQL keeps prepared, executed through psycopg's libpq.

The server takes longer to parse and plan a short statement than to execute it. psycopg has it
prepared only under names that it counts; behind a pooler that gives each transaction another
connection of the server, such a name may be that of another client's statement. Here the name is a
digest of the statement. So a statement with that name is the same, or missing: an error, after
which nothing has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from psycopg import DatabaseError
from psycopg.adapt import PyFormat, Transformer
from psycopg.generators import execute
from psycopg.pq import ExecStatus

__all__ = ["Prepared"]

_MOST = 100
"""The most statements that are prepared over a connection: each takes memory of the server."""


class Prepared:
    """The statements that are prepared over a connection. For one thread.

    Psycopg's ``Connection.execute`` does what this does, and checks more of it.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._most = _MOST

    def execute(self, connection: Any, text: str, values: Sequence[Any]) -> int:
        """Execute a statement; return the rows that it has changed.

        Args:
            connection: psycopg's connection, not in a transaction.
            text: the statement, with ``$1`` for its first parameter.
            values: the parameters.

        Raises:
            Exception: the statement was refused, and nothing has changed; or the connection is
                lost.
        """
        transformer = Transformer.from_context(connection)
        given = transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
        types, formats = transformer.types or (), transformer.formats
        libpq = connection.pgconn
        name = self._name(connection, text, types)
        if name is None:
            return _run(connection, libpq.send_query_params, text.encode(), given, types, formats)
        try:
            return _run(connection, libpq.send_query_prepared, name, given, formats)
        except DatabaseError:
            self._prepare_no_more()
            raise

    def _name(self, connection: Any, text: str, types: tuple[int, ...]) -> bytes | None:
        """Return the name of the statement, prepared if need be; None if it can't be prepared."""
        name = self._names.get((text, types))
        if name is not None or len(self._names) >= self._most:
            return name
        digest = hashlib.sha256(f"{types} {text}".encode()).hexdigest()
        name = f"outbox_{digest[:32]}".encode()
        try:
            _run(connection, connection.pgconn.send_prepare, name, text.encode(), types)
        except DatabaseError:
            self._prepare_no_more()
            raise
        self._names[text, types] = name
        return name

    def _prepare_no_more(self) -> None:
        """After an error: there may be a pooler, which would cause another one each time."""
        self._names.clear()
        self._most = 0


def _run(connection: Any, send: Callable[..., None], *arguments: Any) -> int:
    send(*arguments)
    (result,) = connection.wait(execute(connection.pgconn))
    if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
        raise DatabaseError(f"refused with status {result.status}")
    return result.command_tuples or 0
