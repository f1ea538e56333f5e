"""The database that a ``postgresql://`` or ``mariadb://`` URL names, and its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Engine
from sqlalchemy.engine import URL

from outbox.errors import UsageError
from outbox.storage.engines import open_engine
from outbox.url import BrokerURL

__all__ = ["ServerAddress"]

_POLL = 0.1
_LONGEST_POLL = 60.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A database on a server, and how it is used.

    Attributes:
        url: the URL without outbox's own options, which may hold a password.
        schema: the schema of the tables; None for the connection's own.
        poll: the longest time in seconds between two looks for events.
    """

    url: URL
    schema: str | None
    poll: float

    @classmethod
    def of(cls, url: BrokerURL) -> Self:
        """Return the address for a URL such as ``postgresql://user@host/shop?schema=events``.

        Options that aren't outbox's are the driver's.

        Raises:
            UsageError: the URL names no database, or an option is invalid.
        """
        options: dict[str, Any] = dict(url.options)
        schema, poll = options.pop("schema", None), options.pop("poll", None)
        if not url.path:
            raise UsageError(
                f"the {url.scheme} URL names no database; use {url.scheme}://host/database"
            )
        if schema is not None and (url.scheme != "postgresql" or not schema):
            raise UsageError(
                f"invalid schema={schema} in the {url.scheme} URL; use the name of a schema of "
                "PostgreSQL, or leave it out"
            )
        host, port = url.hosts[0] if len(url.hosts) == 1 else (None, None)
        if len(url.hosts) > 1:
            if url.scheme != "postgresql":
                raise UsageError(f"the {url.scheme} URL names several hosts; use one")
            options["host"] = [f"{each}:{number}" for each, number in url.hosts]
        found = URL.create(
            url.scheme,
            url.user or None,
            url.password or None,
            host,
            port,
            url.path,
            options,
        )
        return cls(found, schema, _POLL if poll is None else _seconds(poll, url.scheme))

    def open_engine(self) -> Engine:
        """Return an engine for the database, not connected yet.

        Raises:
            MissingExtra: the driver isn't installed.
        """
        engine = open_engine(self.url)
        if self.schema is None:
            return engine
        return engine.execution_options(schema_translate_map={None: self.schema})


def _seconds(text: str, scheme: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= _LONGEST_POLL:
        raise UsageError(
            f"invalid poll={text} in the {scheme} URL; use seconds from 0.01 to {_LONGEST_POLL:.0f}"
        )
    return seconds
