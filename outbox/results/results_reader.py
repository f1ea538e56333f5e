"""Reads rows for many that wait for results, in few queries."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

from outbox.results.result_row import ResultRow
from outbox.results.results_store import ResultsStore

__all__ = ["ResultsReader"]

_SHORTEST = 0.004
_LONGEST = (0.025, 0.25)
"""Seconds between two looks: at most, and at most after a minute."""
_SQLITE_TAKES = 2  # times as long: a look there is a look at the file
_GROWTH = 1.25
_LONG = 60.0
_EACH = 0.0002  # seconds of pause for each that waits, so that many don't take all of the time


class ResultsReader:
    """Reads rows of one store. Thread-safe.

    Of those who ask while a query runs, one asks for all with the next one.
    """

    def __init__(self, store: ResultsStore) -> None:
        """Read from ``store``."""
        self._store = store
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        self._next = _Batch()
        self._waiting = 0

    def read(self, id_: str) -> ResultRow | None:
        """Return a row, or None.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database can't be read.
        """
        with self._lock:
            batch = self._next
            batch.ids.add(id_)
            if len(batch.ids) >= _MOST:
                self._next = _Batch()
        with self._reading:
            if batch.rows is None:
                with self._lock:
                    if self._next is batch:
                        self._next = _Batch()
                batch.rows = self._store.read(batch.ids)
        return batch.rows.get(id_)

    def wait(self, id_: str, timeout: float | None) -> ResultRow | None:
        """Wait for the final row of a task; None if there is none within ``timeout`` seconds."""
        self._waiting += 1
        try:
            for pause in self._pauses(timeout):
                row = self.read(id_)
                if row is not None and row.is_final:
                    return row
                time.sleep(pause)
            return self._last(id_)
        finally:
            self._waiting -= 1

    async def wait_async(self, id_: str, timeout: float | None) -> ResultRow | None:  # noqa: ASYNC109
        """Await the same, with the queries on other threads."""
        self._waiting += 1
        try:
            for pause in self._pauses(timeout):
                row = await asyncio.to_thread(self.read, id_)
                if row is not None and row.is_final:
                    return row
                await asyncio.sleep(pause)
            return await asyncio.to_thread(self._last, id_)
        finally:
            self._waiting -= 1

    def _last(self, id_: str) -> ResultRow | None:
        row = self.read(id_)
        return row if row is not None and row.is_final else None

    def _pauses(self, timeout: float | None) -> Iterator[float]:
        """Yield how long to pause after each look, until the time is up."""
        began = time.monotonic()
        scale = _SQLITE_TAKES if self._store.is_sqlite else 1
        pause = _SHORTEST
        while True:
            elapsed = time.monotonic() - began
            if timeout is not None and elapsed >= timeout:
                return
            longest = max(_LONGEST[elapsed > _LONG] * scale, self._waiting * _EACH)
            pause = min(pause * _GROWTH, longest)
            yield pause if timeout is None else min(pause, timeout - elapsed)


class _Batch:
    """Ids that one query reads, and the rows that it has found."""

    __slots__ = ("ids", "rows")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.rows: dict[str, ResultRow] | None = None


_MOST = 500
