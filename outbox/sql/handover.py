"""The fast path: a process publishes what it has stored itself, right after the commit.

It is told the numbers of rows and nothing else: what it finds in the table is what was committed.
Whatever it cannot do, a relay does: rows that this process leaves are due a moment later.
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
"""Where PostgreSQL's LISTEN hears of new rows."""

_BATCH = 1000
_LINGER = 0.2  # seconds
_GATHER = 0.003
_LEASE = 10.0  # seconds, beside what a stalled connection takes to be given up
_PAUSE = 0.5
_AGAIN = 0.01  # seconds until events are looked for again that are behind others of their key
_TRIES = 10


_by_publisher: weakref.WeakKeyDictionary[Publisher, Handover] = weakref.WeakKeyDictionary()
_lock = threading.Lock()

Rows = tuple[Engine, Sequence[int]]
"""Numbers of committed rows, and the engine of their database."""


class Handover:
    """Publishes rows through one publisher, on a thread of its own. Thread-safe.

    The thread is there while there is something to do, and a moment longer. Neither publisher nor
    engine is kept alive by it.
    """

    _lock: threading.Lock
    _queue: queue.SimpleQueue[Rows]
    _thread: threading.Thread | None
    _left: int
    _idle: threading.Event

    def __init__(self, publisher: Publisher) -> None:
        """Begin nothing yet."""
        self._publisher = weakref.ref(publisher)
        self._reset()

    def submit(self, engine: Engine, seqs: Sequence[int]) -> None:
        """Have the committed rows ``seqs`` published soon; never raises, never waits."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="outbox-handover", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads, or the interpreter is going down
                    logger.warning("stored events are left to the relay: %s", error)
                    return
                self._thread = thread
            self._left += len(seqs)
            self._idle.clear()
            self._queue.put((engine, seqs))

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is left to do, at most ``timeout`` seconds; return whether so."""
        return self._idle.wait(timeout)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue = queue.SimpleQueue()
        self._thread = None
        self._left = 0  # rows that are waiting, or being published
        self._idle = threading.Event()
        self._idle.set()

    def _run(self) -> None:
        ours: set[Engine] = set()  # made by us, beside one of the application's
        while True:
            try:
                first = self._queue.get(timeout=_LINGER)
            except queue.Empty:
                for engine in ours:
                    engine.dispose()
                ours.clear()
                with self._lock:
                    if self._queue.empty():
                        self._thread = None
                        return
                continue
            for engine, seqs in self._take_more(first).items():
                try:
                    self._serve(engine, seqs, ours)
                except (DatabaseError, OutboxError) as error:
                    # They are committed: a relay publishes them.
                    reason = reason_of(error)
                    logger.warning(
                        "%d stored event(s) are left to the relay: %s", len(seqs), reason
                    )
                except Exception:
                    logger.exception("%d stored event(s) are left to the relay", len(seqs))
                self._note_done(len(seqs))
            del first, engine
            if not self._queue.empty():
                # Transactions follow closely upon each other: published together they cost each
                # other less.
                time.sleep(_GATHER)

    def _note_done(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if not self._left:
                self._idle.set()

    def _take_more(self, first: Rows) -> dict[Engine, list[int]]:
        """Take what else has been committed meanwhile: one claim and one chunk for all of it."""
        found = {first[0]: list(first[1])}
        while len(found[first[0]]) < _BATCH:
            try:
                engine, seqs = self._queue.get_nowait()
            except queue.Empty:
                break
            found.setdefault(engine, []).extend(seqs)
        return found

    def _serve(self, engine: Engine, seqs: list[int], ours: set[Engine]) -> None:
        beside = engine_beside(engine)
        publisher = self._publisher()
        if beside is None or publisher is None:
            return
        if beside is not engine:
            ours.add(beside)
        store = Store(beside)
        if publisher.settings.after_commit == "notify":
            _notify(store)
        else:
            self._publish(store, publisher, seqs)

    def _publish(self, store: Store, publisher: Publisher, seqs: list[int]) -> None:
        left = seqs
        for _ in range(_TRIES):
            lease = _LEASE + 2 * publisher.settings.stall_timeout
            claimed = store.claim(len(left), only=left, lease=lease, ordered=True)
            if claimed and not _settle(store, publisher, claimed):
                self._give_up()
                return
            found = {row.seq for row in claimed}
            left = [seq for seq in left if seq not in found]
            if not left:
                return
            if not found:
                # Behind others of their key that are just being published; or not there any more.
                time.sleep(_AGAIN)

    def _give_up(self) -> None:
        """Leave to the relay what is waiting, and what comes in the next moment."""
        logger.warning("the broker is away: stored events are left to the relay")
        time.sleep(_PAUSE)
        while not self._queue.empty():
            self._note_done(len(self._queue.get()[1]))


def _settle(store: Store, publisher: Publisher, claimed: list[Claimed]) -> bool:
    """Publish rows and settle them; return whether the broker took them."""
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
    time.sleep(0.02)  # one hint is enough for all that is committed meanwhile


def handover_for(engine: Engine, publisher: Publisher | None) -> Handover | None:
    """Return what publishes rows of ``engine``'s database with ``publisher``, or None for nothing.

    There is none without a publisher, where it is switched off, and where the database can be
    reached by its own session alone.
    """
    if publisher is None or publisher.settings.after_commit == "nothing":
        return None
    if engine_beside(engine) is None:
        return None
    with _lock:
        found = _by_publisher.get(publisher)
        if found is None:
            found = _by_publisher[publisher] = Handover(publisher)
        return found


def drain(timeout: float = 5.0) -> bool:
    """Wait until what this process has committed is published by it, or left to a relay.

    To be called before an engine is disposed of. The exit of the process does it by itself.

    Args:
        timeout: seconds at most.

    Returns:
        Whether nothing is left to do.
    """
    deadline = time.monotonic() + timeout
    waits = [
        one.wait(max(0.0, deadline - time.monotonic())) for one in list(_by_publisher.values())
    ]
    return all(waits)


process.at_exit(drain)  # after the publisher's own, and so called before it


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()
    for handover in list(_by_publisher.values()):
        handover._reset()


process.after_fork(_begin_anew)
