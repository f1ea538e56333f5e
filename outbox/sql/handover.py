"""The fast path: a process publishes what it has stored itself, right after the commit.

It is told the numbers of rows and nothing else: what it finds in the table is what was committed.
Whatever it cannot do, a relay does: rows that this process leaves are due a moment later.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Sequence

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outbox import process
from outbox.errors import OutboxError
from outbox.publisher import Publisher
from outbox.sql.engines import engine_beside
from outbox.sql.outcome import settle
from outbox.sql.store import Claimed, Store
from outbox.sql.waves import publish_in_waves

__all__ = ["CHANNEL", "Handover", "drain", "handover_for"]

logger = logging.getLogger("outbox.handover")

CHANNEL = "outbox_events"
"""Where PostgreSQL's LISTEN hears of new rows."""

_BATCH = 1000
_LEASE = 10.0  # seconds, beside what a stalled connection takes to be given up
_PAUSE = 0.5
_AGAIN = 0.01  # seconds until events are looked for again that are behind others of their key
_TRIES = 10


_all: weakref.WeakSet[Handover] = weakref.WeakSet()
_found: weakref.WeakKeyDictionary[Engine, weakref.WeakKeyDictionary[Publisher, Handover]]
_found = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Handover:
    """Publishes rows of one database through one publisher, on a thread of its own. Thread-safe.

    The thread is there while there is something to do, and a moment longer.
    """

    _lock: threading.Lock
    _queue: queue.SimpleQueue[Sequence[int]]
    _thread: threading.Thread | None
    _idle: threading.Event

    def __init__(self, store: Store, publisher: Publisher, *, owns_engine: bool) -> None:
        """Begin nothing yet.

        Args:
            store: of the rows.
            publisher: of the events.
            owns_engine: whether the store's engine is there for this alone.
        """
        self._store = store
        self._owns_engine = owns_engine
        self._publisher = publisher
        self._notifies = publisher.settings.after_commit == "notify"
        self._reset()
        _all.add(self)

    def submit(self, seqs: Sequence[int]) -> None:
        """Have the committed rows ``seqs`` published soon; never raises, never waits."""
        with self._lock:
            self._queue.put(seqs)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="outbox-handover", daemon=True
                )
                self._idle.clear()
                self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is left to do, at most ``timeout`` seconds; return whether so."""
        return self._idle.wait(timeout)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue = queue.SimpleQueue()
        self._thread = None
        self._idle = threading.Event()
        self._idle.set()

    def _run(self) -> None:
        while True:
            try:
                seqs = list(self._queue.get(timeout=0.2))
            except queue.Empty:
                if self._owns_engine:
                    self._store.engine.dispose()
                with self._lock:
                    if self._queue.empty():
                        self._thread = None
                        self._idle.set()
                        return
                continue
            try:
                self._take_more(seqs)
                if self._notifies:
                    self._notify()
                else:
                    self._publish(seqs)
            except (SQLAlchemyError, OutboxError) as error:
                # They are committed: a relay publishes them.
                logger.warning("%d stored event(s) are left to the relay: %s", len(seqs), error)
            except Exception:
                logger.exception("%d stored event(s) are left to the relay", len(seqs))

    def _take_more(self, seqs: list[int]) -> None:
        """Take what else has been committed meanwhile: one claim and one chunk for all of it."""
        while len(seqs) < _BATCH:
            try:
                seqs += self._queue.get_nowait()
            except queue.Empty:
                return

    def _publish(self, seqs: list[int]) -> None:
        left = seqs
        for _ in range(_TRIES):
            lease = _LEASE + 2 * self._publisher.settings.stall_timeout
            claimed = self._store.claim(len(left), only=left, lease=lease, ordered=True)
            if claimed and not self._settle(claimed):
                self._give_up()
                return
            found = {row.seq for row in claimed}
            left = [seq for seq in left if seq not in found]
            if not left:
                return
            if not found:
                # Behind others of their key that are just being published; or not there any more.
                time.sleep(_AGAIN)

    def _settle(self, claimed: list[Claimed]) -> bool:
        """Publish rows and settle them; return whether the broker took them."""
        try:
            outcome = publish_in_waves(self._publisher, claimed)
        except BaseException:
            self._store.release(claimed)
            raise
        settle(self._store, outcome)
        return outcome.error is None

    def _give_up(self) -> None:
        """Leave to the relay what is waiting, and what comes in the next moment."""
        logger.warning("the broker is away: stored events are left to the relay")
        time.sleep(_PAUSE)
        while not self._queue.empty():
            self._queue.get()

    def _notify(self) -> None:
        with self._store.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"NOTIFY {CHANNEL}")
        time.sleep(0.02)  # one hint is enough for all that is committed meanwhile


def handover_for(engine: Engine, publisher: Publisher | None) -> Handover | None:
    """Return what publishes rows of ``engine``'s database with ``publisher``, or None for nothing.

    Made once for both. There is none without a publisher, where it is switched off, and where the
    database can be reached by its own session alone.
    """
    if publisher is None or publisher.settings.after_commit == "nothing":
        return None
    with _lock:
        of_engine = _found.setdefault(engine, weakref.WeakKeyDictionary())
        found = of_engine.get(publisher)
        if found is None:
            beside = engine_beside(engine)
            if beside is None:
                return None
            found = of_engine[publisher] = Handover(
                Store(beside), publisher, owns_engine=beside is not engine
            )
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
    waits = [one.wait(max(0.0, deadline - time.monotonic())) for one in list(_all)]
    return all(waits)


atexit.register(drain)  # after the publisher's own, and so called before it


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()
    for handover in list(_all):
        handover._reset()


process.after_fork(_begin_anew)
