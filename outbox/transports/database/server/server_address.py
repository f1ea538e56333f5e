"""The database that a ``postgresql://`` or ``mariadb://`` URL names, and its options."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Self

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool, Pool, QueuePool

from outbox.errors import UsageError
from outbox.storage.engines import open_engine
from outbox.url import BrokerURL

__all__ = ["ServerAddress"]

_POLL = 0.1
_LONGEST_POLL = 60.0
# Who only listens sends nothing that would show that the server is gone.
_KEEPALIVE = {"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "2"}


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A database on a server, and how it is used.

    Attributes:
        url: the URL without outbox's own options, which may hold a password.
        schema: the schema of the tables; None for the connection's own.
        poll: the longest time in seconds between two looks for events.
        listens: whether workers are woken by notifications, if the server has them.
        listen_url: the URL to listen at; None for ``url``.
    """

    url: URL
    schema: str | None
    poll: float
    listens: bool = True
    listen_url: URL | None = None

    @classmethod
    def of(cls, url: BrokerURL) -> Self:
        """Return the address for a URL such as ``postgresql://user@host/shop?schema=events``.

        Options that aren't outbox's are the driver's.

        Raises:
            UsageError: the URL names no database, or an option is invalid.
        """
        options: dict[str, Any] = dict(url.options)
        schema, poll = options.pop("schema", None), options.pop("poll", None)
        listen = options.pop("listen", None) or os.environ.get("OUTBOX_LISTEN_URL")
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
        listens, listen_url = listen != "no", None
        if listen and listens:
            elsewhere = BrokerURL.parse(listen)
            if elsewhere.scheme != "postgresql":
                raise UsageError(
                    "the URL to listen at (listen= in the database URL, or OUTBOX_LISTEN_URL) is "
                    f"a {elsewhere.scheme}:// URL; use one of PostgreSQL, or no"
                )
            # Not with what is set here again, or it would name itself.
            options = {**elsewhere.options, "listen": "no"}
            listen_url = cls.of(replace(elsewhere, options=options)).url
        seconds = _POLL if poll is None else _seconds(poll, url.scheme)
        return cls(found, schema, seconds, listens, listen_url)

    def open_engine(self, *, pool: type[Pool] = QueuePool) -> Engine:
        """Return an engine for the database, not connected yet.

        Args:
            pool: the pool class.

        Raises:
            MissingExtra: the driver isn't installed.
        """
        engine = open_engine(self._named(), pool=pool)
        if self.schema is None:
            return engine
        return engine.execution_options(schema_translate_map={None: self.schema})

    @property
    def connection_name(self) -> str:
        """The name of the connections on PostgreSQL, unless the URL or PGAPPNAME has another."""
        return "outbox" if self.schema is None else f"outbox in {self.schema}"

    def _named(self) -> URL:
        if self.url.get_backend_name() != "postgresql":
            return self.url
        name = {"fallback_application_name": self.connection_name}
        return self.url.update_query_dict({**name, **self.url.query})

    def open_listening_engine(self) -> Engine | None:
        """Return an engine to listen with, not connected yet; None if workers don't listen.

        Raises:
            MissingExtra: the driver isn't installed.
        """
        if not self.listens or self.url.get_backend_name() != "postgresql":
            return None
        url = self.listen_url or self.url
        return open_engine(url.update_query_dict({**_KEEPALIVE, **url.query}), pool=NullPool)


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
