"""Reads rows for many that wait for results, in few queries."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator

from outbox.results.result_row import ResultRow
from outbox.results.results_listener import ResultsListener
from outbox.results.results_store import ResultsStore

__all__ = ["ResultsReader"]

_SHORTEST = 0.004
_GROWTH = 1.25
_LONGEST = (0.025, 0.25)
"""Seconds between two looks: at most, and at most after a minute."""
_ONLY_LOOKS = 0.01
"""The same while it isn't worth to listen: a result is often there within 30 ms."""
_LISTENING = 1.0
"""The same while notifications say when to look: some writers can't notify."""
_LONG = 60.0
_FILE = 0.02
"""Seconds between two looks at an SQLite file's times, which take next to nothing."""
_FILE_SETTLES = 1_000_000_000
"""Nanoseconds for which the file is read anyway after it was written: a commit is seen only once
its write has reached the disk, and a second write may have the same time."""
_FILE_ANYWAY = 1.0  # seconds after which the file is read, whatever its times
_EACH = 0.0002  # seconds of pause for each that waits, so that many don't take all of the time


class ResultsReader:
    """Reads rows of one store. Thread-safe.

    Of those who ask while a query runs, one asks for all with the next one.
    """

    def __init__(self, store: ResultsStore) -> None:
        """Read from ``store``."""
        self._store = store
        self._listener = ResultsListener(store.listening, store.engine)
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
        woken = threading.Event()
        looks = self._looks()
        self._waiting += 1
        try:
            with self._listener.calling(woken.set):
                for pause in self._pauses(timeout):
                    woken.clear()  # before the look: what is written after it sets it again
                    if looks.is_due():
                        row = self.read(id_)
                        if row is not None and row.is_final:
                            return row
                    if pause > _ONLY_LOOKS:
                        self._listener.listen()
                    if woken.wait(pause):
                        time.sleep(min(pause, self._waiting * _EACH))
                return self._last(id_)
        finally:
            self._waiting -= 1

    async def wait_async(self, id_: str, timeout: float | None) -> ResultRow | None:  # noqa: ASYNC109
        """Await the same, with the queries on other threads."""
        woken = asyncio.Event()
        loop = asyncio.get_running_loop()
        looks = self._looks()
        self._waiting += 1
        try:
            with self._listener.calling(lambda: loop.call_soon_threadsafe(woken.set)):
                for pause in self._pauses(timeout):
                    woken.clear()
                    if looks.is_due():
                        row = await asyncio.to_thread(self.read, id_)
                        if row is not None and row.is_final:
                            return row
                    if pause > _ONLY_LOOKS:
                        self._listener.listen()
                    try:
                        async with asyncio.timeout(pause):
                            await woken.wait()
                    except TimeoutError:
                        continue
                    await asyncio.sleep(min(pause, self._waiting * _EACH))
                return await asyncio.to_thread(self._last, id_)
        finally:
            self._waiting -= 1

    def _last(self, id_: str) -> ResultRow | None:
        row = self.read(id_)
        return row if row is not None and row.is_final else None

    def _looks(self) -> _Looks | _LooksAtFile:
        path = self._store.engine.url.database
        return _LooksAtFile(path) if self._store.is_sqlite and path else _Looks()

    def _pauses(self, timeout: float | None) -> Iterator[float]:
        """Yield how long to pause after each look, until the time is up."""
        began = time.monotonic()
        pause = _SHORTEST
        while True:
            elapsed = time.monotonic() - began
            if timeout is not None and elapsed >= timeout:
                return
            if self._store.is_sqlite:
                longest = _FILE
            elif self._listener.is_proven:
                longest = _LISTENING
            else:
                longest = _LONGEST[elapsed > _LONG]
            pause = min(pause * _GROWTH, max(longest, self._waiting * _EACH))
            yield pause if timeout is None else min(pause, timeout - elapsed)


class _Looks:
    """Each look is at the table."""

    def is_due(self) -> bool:
        """Return True."""
        return True


class _LooksAtFile:
    """A look at an SQLite file's table is due when the file may have been written."""

    def __init__(self, path: str) -> None:
        self._paths = (path, f"{path}-wal")
        self._seen: object = None
        self._looked_at = 0.0

    def is_due(self) -> bool:
        """Return whether to look now."""
        now = time.monotonic()
        times = [_time_of(path) for path in self._paths]
        # Taken before the look, so that what is written during it is seen the next time.
        seen = None if time.time_ns() - max(times)[0] < _FILE_SETTLES else times
        if seen is not None and seen == self._seen and now - self._looked_at < _FILE_ANYWAY:
            return False
        self._seen, self._looked_at = seen, now
        return True


def _time_of(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # the log is deleted when the last connection is closed
        return 0, 0
    return status.st_mtime_ns, status.st_size


class _Batch:
    """Ids that one query reads, and the rows that it has found."""

    __slots__ = ("ids", "rows")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.rows: dict[str, ResultRow] | None = None


_MOST = 500
