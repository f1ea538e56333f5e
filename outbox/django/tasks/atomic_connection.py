"""SQLAlchemy's statements in a transaction of Django's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from django.db import connections

from outbox.django.connecting import engine_of
from outbox.telemetry import tracing

__all__ = ["AtomicConnection"]


class AtomicConnection:
    """As much of a connection of SQLAlchemy's as writing a result takes.

    For one thread. The statement belongs to the ``atomic()`` block that is open.

    Attributes:
        engine: an engine for the same database.
    """

    def __init__(self, alias: str) -> None:
        """Prepare to write over Django's connection.

        Raises:
            UsageError: the database is in memory, or none of those that outbox knows.
        """
        self.engine = engine_of(alias)
        self._alias = alias

    def get_execution_options(self) -> Mapping[str, Any]:
        """Return those of the engine."""
        return self.engine.get_execution_options()

    def execute(self, statement: Any, parameters: Mapping[str, Any]) -> None:
        """Execute a statement whose parameters are numbers and strings; return nothing."""
        dialect: Any = type(self.engine.dialect)
        compiled = _compiled(statement, dialect)
        with tracing.hidden(), connections[self._alias].cursor() as cursor:
            cursor.execute(str(compiled), compiled.construct_params(parameters))


@functools.lru_cache(maxsize=16)
def _compiled(statement: Any, dialect: Any) -> Any:
    # Cursors of Django take this style of parameters, whatever the driver's is.
    return statement.compile(dialect=dialect(paramstyle="pyformat"))
