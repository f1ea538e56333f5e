"""The fast path: a process publishes the events it stored, right after the commit.

It receives only the numbers of the rows and reads the rows from the table, so that it publishes
nothing but what was committed. A relay publishes all rows that are left: they are due a moment
later.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Sequence

from sqlalchemy import Engine

from outbox.errors import OutboxError
from outbox.publisher import Publisher
from outbox.sql.row_fates import write_fates
from outbox.sql.waves import publish_in_waves
from outbox.storage.engines import engine_beside
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.store import Claimed, Store
from outbox.system import process

__all__ = ["CHANNEL", "Handover", "drain", "handover_for"]

logger = logging.getLogger("outbox.handover")

CHANNEL = "outbox_events"
"""The PostgreSQL channel on which new rows are announced (NOTIFY, LISTEN)."""

_BATCH = 1000
_LINGER = 0.2  # seconds
_GATHER = 0.003
_LEASE = 10.0  # seconds, plus the time until a stalled connection is closed
_PAUSE = 0.5
_RETRY = 0.01  # seconds until the next claim of rows that wait for others of their key
_TRIES = 10


_by_publisher: weakref.WeakKeyDictionary[Publisher, Handover] = weakref.WeakKeyDictionary()
_lock = threading.Lock()

Rows = tuple[Engine, Sequence[int]]
"""The engine of a database, and the numbers of rows committed there."""


class Handover:
    """Publishes rows through one publisher, on a background thread. Thread-safe.

    The thread ends a moment after its work is done. It keeps neither the publisher nor an engine
    alive.
    """

    _lock: threading.Lock
    _queue: queue.SimpleQueue[Rows]
    _thread: threading.Thread | None
    _pending: int
    _idle: threading.Event

    def __init__(self, publisher: Publisher) -> None:
        """Make a handover; its thread starts when rows are submitted."""
        self._publisher = weakref.ref(publisher)
        self._reset()

    def submit(self, engine: Engine, seqs: Sequence[int]) -> None:
        """Publish the committed rows ``seqs`` soon; this never raises and never waits."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="outbox-handover", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # too many threads, or the interpreter is exiting
                    logger.warning("leaving stored events to the relay: %s", error)
                    return
                self._thread = thread
            self._pending += len(seqs)
            self._idle.clear()
            self._queue.put((engine, seqs))

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until all work is done; return whether it is."""
        return self._idle.wait(timeout)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue = queue.SimpleQueue()
        self._thread = None
        self._pending = 0  # rows that are waiting, or being published
        self._idle = threading.Event()
        self._idle.set()

    def _run(self) -> None:
        created: set[Engine] = set()  # by outbox, where the application's can't be used here
        while True:
            try:
                first = self._queue.get(timeout=_LINGER)
            except queue.Empty:
                for engine in created:
                    engine.dispose()
                created.clear()
                with self._lock:
                    if self._queue.empty():
                        self._thread = None
                        return
                continue
            for engine, seqs in self._take_more(first).items():
                try:
                    self._serve(engine, seqs, created)
                except (DatabaseError, OutboxError) as error:
                    # The rows are committed: a relay publishes them.
                    reason = reason_of(error)
                    logger.warning("leaving %d stored event(s) to the relay: %s", len(seqs), reason)
                except Exception:
                    logger.exception("leaving %d stored event(s) to the relay", len(seqs))
                self._note_done(len(seqs))
            del first, engine
            if not self._queue.empty():
                # Transactions are committed in quick succession: gather their rows, which cost less
                # when they are published together.
                time.sleep(_GATHER)

    def _note_done(self, count: int) -> None:
        with self._lock:
            self._pending -= count
            if not self._pending:
                self._idle.set()

    def _take_more(self, first: Rows) -> dict[Engine, list[int]]:
        """Add what was committed meanwhile, to publish it all with one claim and one chunk."""
        batches = {first[0]: list(first[1])}
        while len(batches[first[0]]) < _BATCH:
            try:
                engine, seqs = self._queue.get_nowait()
            except queue.Empty:
                break
            batches.setdefault(engine, []).extend(seqs)
        return batches

    def _serve(self, engine: Engine, seqs: list[int], created: set[Engine]) -> None:
        beside = engine_beside(engine)
        publisher = self._publisher()
        if beside is None or publisher is None:
            return
        if beside is not engine:
            created.add(beside)
        store = Store(beside)
        if publisher.settings.after_commit == "notify":
            _notify(store)
        else:
            self._publish(store, publisher, seqs)

    def _publish(self, store: Store, publisher: Publisher, seqs: list[int]) -> None:
        remaining = seqs
        for _ in range(_TRIES):
            lease = _LEASE + 2 * publisher.settings.stall_timeout
            claimed = store.claim(len(remaining), only=remaining, lease=lease, ordered=True)
            if claimed and not _publish_claimed(store, publisher, claimed):
                self._give_up()
                return
            numbers = {row.seq for row in claimed}
            remaining = [seq for seq in remaining if seq not in numbers]
            if not remaining:
                return
            if not numbers:
                # They are behind rows of their key that are being published, or already gone.
                time.sleep(_RETRY)

    def _give_up(self) -> None:
        """Leave to the relay the rows that wait here or arrive within the pause."""
        logger.warning("the broker is unavailable: leaving stored events to the relay")
        time.sleep(_PAUSE)
        while not self._queue.empty():
            self._note_done(len(self._queue.get()[1]))


def _publish_claimed(store: Store, publisher: Publisher, claimed: list[Claimed]) -> bool:
    """Publish rows and write their fates; return whether the broker was available."""
    try:
        fates = publish_in_waves(publisher, claimed)
    except BaseException:
        store.release(claimed)
        raise
    write_fates(store, fates)
    return fates.error is None


def _notify(store: Store) -> None:
    with store.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"NOTIFY {CHANNEL}")
    time.sleep(0.02)  # one notification is enough for all rows committed meanwhile


def handover_for(engine: Engine, publisher: Publisher | None) -> Handover | None:
    """Return the handover that publishes rows of ``engine``'s database with ``publisher``.

    It is None without a publisher, if ``after_commit`` is ``"nothing"``, and for a database in
    memory, which outbox's threads can't reach.
    """
    if publisher is None or publisher.settings.after_commit == "nothing":
        return None
    if engine_beside(engine) is None:
        return None
    with _lock:
        handover = _by_publisher.get(publisher)
        if handover is None:
            handover = _by_publisher[publisher] = Handover(publisher)
        return handover


def drain(timeout: float = 5.0) -> bool:
    """Wait until this process has published what it committed, or left it to a relay.

    Call this before you dispose of an engine. It runs automatically when the process exits.

    Args:
        timeout: the seconds to wait at most.

    Returns:
        Whether all work is done.
    """
    deadline = time.monotonic() + timeout
    waits = [
        handover.wait(max(0.0, deadline - time.monotonic()))
        for handover in list(_by_publisher.values())
    ]
    return all(waits)


process.at_exit(drain)  # registered after the publisher's, so it runs before that


def _reset_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for handover in list(_by_publisher.values()):
        handover._reset()


process.after_fork(_reset_after_fork)
