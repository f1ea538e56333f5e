"""Lists and deletes the rows of recurring tasks, also of tasks that no program has any more."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Self

from sqlalchemy import Connection

from outbox.recurring.recurring_task import TickRecord
from outbox.settings import Settings
from outbox.storage import tick_statements
from outbox.transports.database.kinds import database_at
from outbox.url import BrokerURL

__all__ = ["DatabaseTickRecords"]

_SEEN_WITHIN = datetime.timedelta(seconds=30)


class DatabaseTickRecords:
    """The rows of recurring tasks. For one thread."""

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        """Create it, without connecting yet.

        Raises:
            UsageError: the URL is invalid, or there is no such file.
        """
        self._database = database_at(url, must_exist=True)

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            BrokerError: the database can't be used.
        """
        self._database.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.end()

    def all(self, queue: str) -> Sequence[TickRecord]:
        """Return the rows of ``queue``, by name."""

        def read(connection: Connection) -> list[TickRecord]:
            tick_statements.check(connection)
            now = tick_statements.clock(connection)
            return [
                TickRecord(
                    row.name,
                    row.schedule,
                    row.next_at,
                    row.last_at,
                    has_worker=now - row.seen_at < _SEEN_WITHIN,
                )
                for row in tick_statements.rows(connection, queue).values()
            ]

        return self._database.run(read)

    def forget(self, queue: str, name: str) -> bool:
        """Delete the row of a task; return whether there was one."""

        def remove(connection: Connection) -> bool:
            tick_statements.check(connection)
            return tick_statements.remove(connection, queue, name)

        return self._database.run(remove)
