"""What a worker writes about its tasks: of many at once, in one transaction.

While a transaction is being committed, what comes meanwhile waits for the next one. A commit takes
longer than most tasks, so with one for each task a worker would do little else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import DataError

from outbox.results.pending_write import PendingWrite
from outbox.results.results_statements import LEASE
from outbox.results.results_store import ResultsStore
from outbox.sql.inbox import place_of
from outbox.storage.failures import reason_of
from outbox.storage.notifications import RESULTS_CHANNEL, Sender, can_listen
from outbox.system.backoff import backoff

__all__ = ["ResultsWriter"]

logger = logging.getLogger("outbox.consumer")

_MOST_ROWS = 500
_MOST_BYTES = 4 * 1024 * 1024  # MariaDB takes 16 MiB at once by default
_RENEW_EVERY = LEASE / 3
_PURGE_EVERY = 600.0  # seconds
_QUICK = 0.005  # seconds
_SCHEMAS = "schema_translate_map"
_WEIGHT = 0.1  # of the latest task in the mean


class _Row(NamedTuple):
    values: Mapping[str, Any]
    written: PendingWrite
    size: int


class ResultsWriter:
    """A thread that writes for the tasks of one worker. Thread-safe.

    A task that can't begin, because the database is unavailable, is refused at once; what has ended
    is kept, and tried again until the writer is stopped. A row that the database can't hold is
    written neither now nor later, and holds up no other.

    Attributes:
        store: the store.
        is_quick: whether tasks take so little time that it is worth beginning several at once.
    """

    def __init__(self, store: ResultsStore) -> None:
        """Make a writer, without starting its thread."""
        self.store = store
        self.is_quick = False
        self._sender: Sender | None = None
        if can_listen(store.engine):
            self._sender = Sender(
                store.engine, those="those who wait for results, who look for them"
            )
        self._place = place_of(store.engine.url)
        self._mean = 1.0
        self._begun: deque[_Row] = deque()
        self._ended: deque[_Row] = deque()
        self._running: dict[str, tuple[str, float]] = {}
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_waiting = False
        self._stopping = False
        self._until = math.inf
        self._connection: Connection | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._renew_at = time.monotonic() + _RENEW_EVERY
        self._purge_at = time.monotonic() + random.uniform(0, 10)
        self._thread = threading.Thread(target=self._run, name="outbox-results", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it has been started."""
        if not self._thread.is_alive() and not self._stopping:
            self._thread.start()

    def stop(self, deadline: float) -> None:
        """Write what is left until ``deadline``, of ``time.monotonic()``, and end."""
        self._until = deadline
        self._stopping = True
        self._wakes.put(None)
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._sender is not None:
            self._sender.close()

    def begin(self, values: Mapping[str, Any]) -> PendingWrite:
        """Write that an attempt begins; see ``results_statements`` for the values."""
        return self._put(self._begun, values, len(values["args"] or ""))

    def end(self, values: Mapping[str, Any]) -> PendingWrite:
        """Write how an attempt has ended; likewise."""
        size = len(values["value"] or "") + len(values.get("traceback") or "")
        return self._put(self._ended, values, size)

    def complete(self, id_: str) -> None:
        """Note that a task had been done before; waits for the database.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: it is unavailable.
        """
        self.store.complete(id_)
        self._announce()

    def shares(self, connection: Connection) -> bool:
        """Return whether ``connection`` leads to the database of the results."""
        engine = self.store.engine
        return place_of(connection.engine.url) == self._place and (
            engine.get_execution_options().get(_SCHEMAS)
            == connection.get_execution_options().get(_SCHEMAS)
        )

    def write_on(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Do the same as :meth:`end` in a transaction of the application."""
        self.store.write_on(connection, values)

    def note_on(self, connection: Connection, id_: str, token: str) -> None:
        """Note in a transaction of the application that an attempt succeeds; its value follows."""
        self.store.note_on(connection, id_, token)

    def over(self, token: str) -> None:
        """Note that the attempt with this token needs its lease no longer."""
        self._running.pop(token, None)
        self._announce()  # the application's transaction may have written how it ended

    def took(self, seconds: float) -> None:
        """Note how long a task has taken."""
        self._mean += _WEIGHT * (seconds - self._mean)
        self.is_quick = self._mean < _QUICK

    def _put(self, rows: deque[_Row], values: Mapping[str, Any], size: int) -> PendingWrite:
        written = PendingWrite()
        rows.append(_Row(values, written, size))
        if self._is_waiting:  # else the thread looks for it before it waits
            self._is_waiting = False
            self._wakes.put(None)
        return written

    def _run(self) -> None:
        while not self._is_over():
            self._is_waiting = True
            pause = self._pause()
            if pause > 0:
                with contextlib.suppress(queue.Empty):
                    self._wakes.get(timeout=pause)
                continue
            self._is_waiting = False
            begun, ended = _taken(self._begun), _taken(self._ended)
            if begun or ended:
                self._write(begun, ended)
            else:
                self._look_after()
        self._disconnect()

    def _is_over(self) -> bool:
        if not self._stopping:
            return False
        return not (self._begun or self._ended) or time.monotonic() >= self._until

    def _pause(self) -> float:
        """Return the seconds to wait for something to do."""
        if self._begun:
            return 0.0
        now = time.monotonic()
        at = min(self._renew_at, self._purge_at)
        if self._ended:
            at = min(at, self._retry_at)
        if self._stopping:
            at = min(at, max(self._until, now + 0.01))
        return at - now

    def _write(self, begun: list[_Row], ended: list[_Row]) -> None:
        try:
            if self._connection is None:
                self._connection = self.store.connect()
            refused = self.store.write(
                [row.values for row in begun], [row.values for row in ended], self._connection
            )
        except DataError as error:
            self._separate(error, begun, ended)
            return
        except Exception as error:
            self._disconnect(error)
            self._failed(error, begun, ended)
            return
        if self._failures:
            logger.info("results can be written again")
        self._failures, self._retry_at = 0, 0.0
        now = time.monotonic()
        for row in begun:
            token = row.values["token"]
            if token not in refused:
                self._running[token] = row.values["id"], now
        for row in ended:
            self._running.pop(row.values["token"], None)
        if ended:
            self._announce()
        for row in (*ended, *begun):
            row.written.end(refused.get(row.values["token"], "") if refused else "")

    def _announce(self) -> None:
        """Wake those who wait for results; never wait."""
        if self._sender is not None:
            self._sender.notify((RESULTS_CHANNEL,))

    def _disconnect(self, error: BaseException | None = None) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                if error is not None:  # another one may lead to another server
                    connection.invalidate(error)
                connection.close()

    def _failed(self, error: Exception, begun: list[_Row], ended: list[_Row]) -> None:
        """Refuse what was to begin, and keep what has ended."""
        if not self._failures:
            logger.error("results can't be written; tried again: %s", reason_of(error))
        self._retry_at = time.monotonic() + backoff(self._failures)
        self._failures += 1
        for row in begun:
            row.written.end(error=error)
        self._ended.extendleft(reversed(ended))

    def _separate(self, error: DataError, begun: list[_Row], ended: list[_Row]) -> None:
        """Write what was refused in two parts, down to the rows that can't be written.

        Each time it would be refused, and hold up all others. So a value that came in a message
        costs that message alone.
        """
        if len(begun) + len(ended) > 1:
            if begun and ended:
                parts = [([], ended), (begun, [])]
            elif begun:
                half = len(begun) // 2
                parts = [(begun[:half], ended), (begun[half:], ended)]
            else:
                half = len(ended) // 2
                parts = [(begun, ended[:half]), (begun, ended[half:])]
            for part in parts:
                self._write(*part)
            return
        reason = reason_of(error)
        for row in begun:
            row.written.reject(reason)
        for row in ended:
            logger.error("lost the result of %r: %s", row.values["id"], reason)
            self._running.pop(row.values["token"], None)
            row.written.end()

    def _look_after(self) -> None:
        """Extend leases, or delete old rows, as is due."""
        now = time.monotonic()
        try:
            if now >= self._renew_at:
                self._renew_at = now + _RENEW_EVERY
                self._renew(now)
            if now >= self._purge_at and not self._stopping:
                self._purge_at = now + _PURGE_EVERY * random.uniform(0.8, 1.2)
                if self.store.purge_some():
                    self._purge_at = now + 1.0
        except Exception as error:
            logger.warning("results can't be looked after: %s", reason_of(error))

    def _renew(self, now: float) -> None:
        running = [
            (id_, token)
            for token, (id_, since) in list(self._running.items())
            if now - since >= _RENEW_EVERY / 2
        ]
        if running:
            ids, tokens = zip(*running, strict=True)
            self.store.renew(ids, tokens)


def _taken(rows: deque[_Row]) -> list[_Row]:
    """Take rows for one statement: no id twice, which PostgreSQL refuses."""
    taken = [rows.popleft() for _ in range(min(len(rows), _MOST_ROWS))]
    if len({row.values["id"] for row in taken}) < len(taken) or (
        sum([row.size for row in taken]) > _MOST_BYTES
    ):
        first = _first_of(taken)
        rows.extendleft(reversed(taken[first:]))
        del taken[first:]
    return taken


def _first_of(rows: Sequence[_Row]) -> int:
    """Return how many of the first rows fit into one statement."""
    ids: set[str] = set()
    size = 0
    for number, row in enumerate(rows):
        size += row.size
        if row.values["id"] in ids or (number and size > _MOST_BYTES):
            return number
        ids.add(row.values["id"])
    return len(rows)
