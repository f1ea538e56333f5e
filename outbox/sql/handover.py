"""The fast path: a process publishes the events it stored, right after the commit.

It receives only the numbers and ids of the rows and reads the rows from the table, so that it
publishes nothing but what was committed. What it can't publish yet it tries again for as long as
the process lives; a relay publishes all rows that are left: they are due a moment later.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import ProgrammingError

from outbox.configuration import configured_publisher
from outbox.errors import OutboxError
from outbox.event import Event
from outbox.messages.rows import UNROUTED
from outbox.observer import seam
from outbox.publisher import Publisher, run_exit_hooks_in_child
from outbox.sql.row_fates import RowFates, write_fates
from outbox.sql.waves import Batch
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.notifications import RELAY_CHANNEL
from outbox.storage.schema import GRACE
from outbox.storage.side_engine import SideEngine, Unfit, refusal_of, refuse
from outbox.storage.store import Claimed, Store
from outbox.storage.upkeep.purging import Purging
from outbox.system import process
from outbox.system.background_thread import STARTS_NONE_AT_EXIT, let_start
from outbox.system.backoff import backoff
from outbox.system.fork_pause import Pause

__all__ = [
    "Handover",
    "Place",
    "Row",
    "doubt",
    "drain",
    "handover_for",
    "name_engine",
    "options_of",
    "place_of",
    "queue_for",
]

logger = logging.getLogger("outbox.handover")

_BATCH = 1000
_LINGER = 2.0  # seconds for which an idle thread keeps its connection
_LINGER_UNCONNECTED = 0.2  # seconds
_GATHER = 0.003
_LEASE = 10.0  # seconds; renewed while the broker takes its time
_RETRY = 0.01  # seconds until the next claim of rows that wait for others of their key
_TRIES = 10
_MOST_LEFT = 50_000  # rows that are remembered to be tried again, a few hundred bytes each
_BROKER = 0.5  # seconds between two looks whether the broker is connected
_COMMITTING = (0.001, 60.0)  # seconds between two looks whether a commit is over, and at most


_UNSEEN = (
    "if a search_path, a role or a tenant was chosen on the application's connection itself, "
    "choose it where the engine connects, or by schema_translate_map, or name an engine that finds "
    "the rows with outbox.sql.bind(..., engine=...)"
)

# What decides how a statement runs, not where it looks.
_NOT_CARRIED = frozenset(
    (
        "compiled_cache",
        "isolation_level",
        "max_row_buffer",
        "postgresql_deferrable",
        "postgresql_readonly",
        "stream_results",
        "yield_per",
    )
)


class Row(NamedTuple):
    """A row that was stored.

    Attributes:
        seq: its number.
        id: the id of its event.
        stored: the ``time.monotonic()`` before it was written.
        certain: whether it is in the table if the transaction was committed.
    """

    seq: int
    id: str
    stored: float
    certain: bool = True


@dataclass(frozen=True)
class Place:
    """Where rows were stored.

    Attributes:
        engine: the engine whose connection wrote them.
        options: what the connection's execution options add to the engine's, for instance a
            ``schema_translate_map``.
        queue: the queue of the rows: ``""``, the relay's; ``UNROUTED``, from which they are routed
            to those of workers; or one of these.
    """

    engine: Engine
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    queue: str = ""


def place_of(connection: Connection, queue: str) -> Place:
    """Return where ``connection`` stores rows for ``queue``."""
    return Place(connection.engine, options_of(connection), queue)


def options_of(connection: Connection) -> dict[str, Any]:
    """Return what the execution options of ``connection`` add to those of its engine."""
    options, usual = connection.get_execution_options(), connection.engine.get_execution_options()
    if options is usual or options == usual:
        return {}
    return {
        name: value
        for name, value in options.items()
        if name not in _NOT_CARRIED and not (name in usual and usual[name] == value)
    }


class _Submitted(NamedTuple):
    place: Place
    rows: list[Row]
    transaction: RootTransaction | None  # that is being committed
    since: float
    publisher: Publisher | None  # not forgotten before it has tried


@dataclass
class _Left:
    """What is to be tried again in a place.

    Attributes:
        rows: the rows, by number.
        unwritten: fates that the database has not taken yet.
        failures: the number of failures in a row.
        due: the ``time.monotonic()`` of the next attempt.
        blocked: whether other rows of the place would fail too.
        awaits_broker: whether the broker was unavailable.
        is_full: whether rows were left out, as too many are waiting.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    unwritten: RowFates = field(default_factory=RowFates)
    failures: int = 0
    due: float = 0.0
    blocked: bool = False
    awaits_broker: bool = False
    is_full: bool = False


class _Unavailable(Exception):
    """The broker is unavailable."""


_doubtful: weakref.WeakSet[RootTransaction] = weakref.WeakSet()
_by_publisher: weakref.WeakKeyDictionary[Publisher, Handover] = weakref.WeakKeyDictionary()
_named: Engine | None = None


class Handover:
    """Publishes rows through one publisher, on a background thread.

    Thread-safe, also in signal handlers and finalizers: callers only put something into a queue,
    and share no lock with the thread. The thread ends a moment after its work is done. Then it
    keeps neither the publisher nor an engine alive.
    """

    _queue: queue.SimpleQueue[_Submitted | _thread.LockType | None]  # None: see hurry()
    _starting: threading.Lock
    _running: bool

    def __init__(self, publisher: Publisher) -> None:
        """Make a handover; its thread starts when rows are submitted."""
        self._publisher = weakref.ref(publisher)
        self._reset()

    @property
    def publishes(self) -> bool:
        """Whether it publishes what is submitted, and doesn't only notify relays of it."""
        publisher = self._publisher()
        return publisher is not None and publisher.settings.after_commit == "publish"

    def submit(
        self, place: Place, rows: list[Row], transaction: RootTransaction | None = None
    ) -> None:
        """Publish committed rows soon; this never raises and never waits.

        Args:
            place: where they were stored.
            rows: the rows.
            transaction: a transaction whose commit has begun: nothing is done until it is over.
        """
        publisher = self._publisher()
        if publisher is not None and publisher.closed and _successor() is None:
            _warn_of_closed(len(rows))  # in a late exit handler, the thread could not any more
            return
        self._queue.put(_Submitted(place, rows, transaction, time.monotonic(), publisher))
        run_exit_hooks_in_child()
        try:
            self._run_soon()
            if STARTS_NONE_AT_EXIT and publisher is not None:
                publisher.make_ready()
        except (RuntimeError, OutboxError) as error:  # too many threads, or Python is exiting
            logger.warning("%d stored event(s) wait to be published: %s", len(rows), error)

    def announce(self, queues: Collection[str]) -> None:
        """Have workers look into ``queues``, where rows were committed; this never raises."""
        publisher = self._publisher()
        if publisher is not None:
            publisher.look_into(queues)

    def hurry(self) -> None:
        """Try again soon what is left."""
        if self._running:
            self._queue.put(None)

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until all rows were tried; return whether they were."""
        if not self._running and self._queue.empty():
            return True
        tried = _thread.allocate_lock()
        tried.acquire()
        self._queue.put(tried)
        with contextlib.suppress(RuntimeError):  # as in submit()
            self._run_soon()
        return tried.acquire(timeout=max(0.0, timeout))

    def _run_soon(self) -> None:
        """Have the thread started, unless it runs; a start isn't waited for.

        Raises:
            RuntimeError: the system has no more threads.
        """
        if not self._running:
            _thread.start_new_thread(self._start, ())
            let_start(lambda: self._running)

    def _start(self) -> None:
        with self._starting:
            if self._running:
                return
            thread = threading.Thread(target=self._run, name="outbox-handover", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.warning("stored events wait to be published: %s", error)
            else:
                self._running = True

    def _reset(self) -> None:
        self._queue = queue.SimpleQueue()
        self._starting = threading.Lock()  # never taken by callers
        self._running = False
        # Of the thread alone:
        self._waiters: list[_thread.LockType] = []
        self._sides: dict[tuple[Engine, Engine | None], SideEngine] = {}
        self._committing: list[_Submitted] = []
        self._left: dict[Place, _Left] = {}
        self._held: Publisher | None = None  # while anything is left for it
        self._purging: Purging | None = None

    def _run(self) -> None:
        self._pause = Pause()
        try:
            while not self._has_ended():
                try:
                    self._run_until_idle()
                except Exception:  # a bug in outbox must not end publishing
                    logger.exception("unexpected error")
        finally:
            self._pause.end()

    def _has_ended(self) -> bool:
        """End if there is nothing to do.

        In this order: a caller who still sees the thread running has put its rows in before.
        """
        if self._committing or self._left:
            return False
        with self._starting:
            self._running = False
            if self._queue.empty():
                return True
            self._running = True
        return False

    def _run_until_idle(self) -> None:
        rested = time.monotonic() + _LINGER
        while True:
            try:
                with self._pause:
                    first = [self._queue.get(timeout=self._next())]
            except queue.Empty:
                first = []
                rests = not self._sides or time.monotonic() >= rested
                if not self._committing and rests:
                    self._close_sides()
                    if not self._left:
                        return
            else:
                rested = time.monotonic() + _LINGER
            self._turn(first)
            first.clear()
            if not self._queue.empty():
                # Transactions are committed in quick succession: gather their rows, which cost less
                # when they are published together.
                time.sleep(_GATHER)

    def _turn(self, first: list[_Submitted | _thread.LockType | None]) -> None:
        batches, hurried = self._take(first)
        for place, rows in batches.items():
            self._serve(place, rows)
        if hurried:
            for left in self._left.values():
                left.due = 0.0
        if self._left:
            self._try_again()
        if not self._left and not self._committing:
            self._held = None
        if not self._committing and self._waiters:
            self._close_sides()  # the database may be dropped next
            while self._waiters:
                self._waiters.pop().release()

    def _next(self) -> float:
        """Return the seconds until there is something to do."""
        if self._committing:
            return _COMMITTING[0]
        due = min((left.due for left in self._left.values()), default=0.0)
        if not self._left:
            return _LINGER if self._sides else _LINGER_UNCONNECTED
        # Not longer, so that a publisher that was closed ends the thread.
        return min(max(due - time.monotonic(), _RETRY), _BROKER)

    def _take(
        self, first: list[_Submitted | _thread.LockType | None]
    ) -> tuple[dict[Place, list[Row]], bool]:
        """Take what was committed meanwhile, to publish it all with one claim and one chunk.

        Returns:
            The rows whose commit is over, and whether :meth:`hurry` was called.
        """
        submitted: list[_Submitted] = []
        hurried = False
        count = 0
        while first or count < _BATCH:
            try:
                each = first.pop() if first else self._queue.get_nowait()
            except queue.Empty:
                break
            if each is None:
                hurried = True
            elif isinstance(each, _Submitted):
                self._held = each.publisher
                submitted.append(each)
                count += len(each.rows)
            else:
                self._waiters.append(each)
        earliest = time.monotonic() - _COMMITTING[1]
        rows: dict[Place, list[Row]] = {}
        committing, self._committing = self._committing, []
        for each in (*committing, *submitted):
            if each.transaction is None:
                rows.setdefault(each.place, []).extend(each.rows)
            elif not each.transaction.is_active:
                certain = each.transaction not in _doubtful
                rows.setdefault(each.place, []).extend(
                    row._replace(certain=row.certain and certain) for row in each.rows
                )
            elif each.since > earliest:
                self._committing.append(each)
            else:
                logger.warning("leaving stored events to the relay: their commit takes too long")
        return rows, hurried

    def _serve(self, place: Place, rows: list[Row]) -> None:
        """Publish rows for the first time, unless others of the place wait for database or broker.

        Then these wait behind them.
        """
        left = self._left.setdefault(place, _Left())
        waiting = {row.seq: row for row in rows}
        if not left.blocked:
            self._attempt(place, left, waiting)
        excess = len(left.rows) + len(waiting) - _MOST_LEFT
        if excess > 0:
            if not left.is_full:
                logger.warning("leaving further stored events to the relay: too many are waiting")
            for _ in range(min(excess, len(waiting))):
                waiting.popitem()
        left.is_full = excess > 0
        left.rows.update(waiting)
        self._settle(place, left)

    def _try_again(self) -> None:
        """Publish what is left and due."""
        publisher = self._publisher()
        if publisher is None or publisher.closed:
            self._pass_on()
            return
        now = time.monotonic()
        for place, left in list(self._left.items()):
            if left.awaits_broker and not publisher.connected:
                left.due = now + _BROKER
            elif left.due <= now:
                left.blocked = left.awaits_broker = False
                for chunk in list(_chunks(left.rows)) or [{}]:
                    for seq in chunk:
                        del left.rows[seq]
                    self._attempt(place, left, chunk)
                    left.rows.update(chunk)
                    if left.blocked:
                        break
                self._settle(place, left)

    def _settle(self, place: Place, left: _Left) -> None:
        """Forget ``left`` if nothing is, or set its next attempt."""
        if not left.rows and not left.blocked:
            del self._left[place]
        elif left.due <= time.monotonic():
            left.due = time.monotonic() + backoff(left.failures)
            left.failures += 1

    def _pass_on(self) -> None:
        """Pass what is left to the publisher that has replaced this one, or to the relay."""
        successor = _successor()
        count = sum(len(left.rows) for left in self._left.values())
        if successor is not None:
            for place, left in self._left.items():
                handover = handover_for(place.engine, successor)
                if handover is not None and handover is not self and left.rows:
                    handover.submit(place, list(left.rows.values()))
        elif count:
            _warn_of_closed(count)
        self._left.clear()

    def _attempt(self, place: Place, left: _Left, rows: dict[int, Row]) -> None:
        """Publish ``rows`` and remove those that have their fate."""
        publisher = self._publisher()
        if publisher is None:
            rows.clear()
            return
        if place.queue not in ("", UNROUTED):
            publisher.look_into((place.queue,))  # they are routed, and delivered from there
            rows.clear()
            return
        side: SideEngine | None = None
        try:
            side = self._side_of(place.engine)
            if publisher.settings.after_commit == "notify":
                side.run(_notify, side.engine)
                rows.clear()
                time.sleep(0.02)  # one notification is enough for all rows committed meanwhile
            else:
                self._publish(side, place, publisher, left.unwritten, rows)
            return
        except (Unfit, ProgrammingError) as error:
            rows.clear()  # a relay publishes them, or a worker routes them
            if place.queue == UNROUTED:
                logger.debug("leaving stored events to workers: %s", reason_of(error))
            elif isinstance(error, Unfit):
                _warn_once(place.engine, str(error))
            else:
                # No table or no permission here: the same for another connection of the engine.
                _warn_once(place.engine, f"{reason_of(error)}; {_UNSEEN}")
            return
        except (DatabaseError, OutboxError, _Unavailable) as error:
            if not left.failures:
                logger.warning("%d stored event(s) wait to be published: %s", len(rows),
                               reason_of(error))  # fmt: skip
            left.awaits_broker = isinstance(error, _Unavailable)
        except Exception as error:
            source = _named or place.engine
            if source.dialect.is_async:
                # A connection that works only in the application's event loop.
                refuse(source, f"it can't connect in another event loop: {error!r:.200}")
                _warn_once(place.engine, refusal_of(source) or "")
                rows.clear()
                return
            if not left.failures:
                logger.exception("%d stored event(s) wait to be published", len(rows))
        finally:
            if side is not None:
                with contextlib.suppress(Exception):  # the thread must go on
                    side.rest()
        left.blocked = True
        left.due = time.monotonic() + backoff(left.failures)
        left.failures += 1

    def _side_of(self, engine: Engine) -> SideEngine:
        key = engine, _named
        side = self._sides.get(key)
        if side is None:
            side = self._sides[key] = SideEngine(*key)
        return side

    def _close_sides(self) -> None:
        while self._sides:
            _, side = self._sides.popitem()
            try:
                side.close()
            except Exception:
                logger.exception("unexpected error while closing a connection")

    def _publish(
        self,
        side: SideEngine,
        place: Place,
        publisher: Publisher,
        unwritten: RowFates,
        rows: dict[int, Row],
    ) -> None:
        """Publish ``rows`` and remove those that have their fate, as far as it goes now.

        Raises:
            _Unavailable: the broker is unavailable.
            OutboxError: the publisher is closed.
            sqlalchemy.exc.SQLAlchemyError: the database is unavailable.
        """
        store = Store(side.with_options(place.options))
        keep = publisher.settings.keep_published
        side.run(write_fates, store, unwritten, keep)
        tries = 0
        later: dict[int, Row] = {}
        try:
            while rows and tries < _TRIES:
                ids = {row.seq: row.id for row in rows.values()}
                claimed = side.run(
                    store.claim, len(ids), queue=place.queue, only=ids, lease=_LEASE, ordered=True
                )
                if not claimed:
                    self._forget(side, store, place, rows, first=not tries)
                    tries += 1
                    # They are behind rows of their key that are being published, or leased.
                    time.sleep(_RETRY if rows else 0)
                    continue
                fates = self._publish_claimed(side, store, publisher, claimed)
                for row in (*fates.done, *(row for row, _ in fates.rejected)):
                    rows.pop(row.seq, None)
                for row, _ in fates.nacked:
                    later[row.seq] = rows.pop(row.seq)
                unwritten.add(fates)
                side.run(write_fates, store, unwritten, keep)
                if keep:
                    self._purge(side, store, keep)
                if fates.error is not None:
                    raise _Unavailable(str(fates.error))
        finally:
            rows.update(later)

    def _purge(self, side: SideEngine, store: Store, keep: float) -> None:
        """Delete what need not be kept any longer, if it is time: no relay may do that."""
        if self._purging is None:
            self._purging = Purging(keep)
        with contextlib.suppress(DatabaseError):
            self._purging.turn(lambda limit: side.run(store.purge_published, limit))

    def _forget(
        self, side: SideEngine, store: Store, place: Place, rows: dict[int, Row], *, first: bool
    ) -> None:
        """Remove rows that are gone: published by a relay, or never to be seen from here."""
        alive = side.run(store.alive, {row.seq: row.id for row in rows.values()})
        gone = [rows.pop(seq) for seq in list(rows) if seq not in alive]
        # No relay takes a row before its grace is over.
        unseen = [row for row in gone if row.certain and row.stored > time.monotonic() - GRACE]
        if first and unseen:
            _warn_once(
                place.engine,
                "rows just committed are not there; if a statement of their transaction had failed "
                f"before, its commit was a rollback; {_UNSEEN}",
            )

    def _publish_claimed(
        self, side: SideEngine, store: Store, publisher: Publisher, claimed: list[Claimed]
    ) -> RowFates:
        """Publish rows and return their fates; meanwhile keep their leases."""
        reported = threading.Event()
        began = time.monotonic()
        batch = Batch(publisher, claimed, ordered=True, until=began + _LEASE / 2,
                      on_report=reported.set)  # fmt: skip
        renewal = began + _LEASE / 3
        try:
            while not batch.advance():
                if not reported.wait(max(0.0, renewal - time.monotonic())):
                    renewal = time.monotonic() + _LEASE / 3
                    with contextlib.suppress(DatabaseError):  # the lease goes on for a while
                        side.run(store.extend, claimed, _LEASE)
                        batch.until = time.monotonic() + _LEASE / 2
                reported.clear()
        except BaseException:
            side.run(write_fates, store, batch.abandon())
            raise
        return batch.fates


def _successor() -> Publisher | None:
    """Return the publisher that has replaced one that was closed, or None."""
    successor = configured_publisher()
    return None if successor is None or successor.closed else successor


def _warn_of_closed(count: int) -> None:
    logger.warning("leaving %d stored event(s) to the relay: the publisher is closed", count)


def _chunks(rows: Mapping[int, Row]) -> Iterator[dict[int, Row]]:
    items = iter(rows.items())
    while chunk := dict(itertools.islice(items, _BATCH)):
        yield chunk


_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _warn_once(engine: Engine, reason: str) -> None:
    warned = _warned.setdefault(engine.pool, set())
    if reason not in warned:
        warned.add(reason)
        logger.warning("leaving stored events of %r to the relay: %s", engine, reason)


def _notify(engine: Engine) -> None:
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"NOTIFY {RELAY_CHANNEL}")


def name_engine(engine: Engine | None) -> None:
    """Have the fast path connect with ``engine``; None ends this."""
    global _named
    _named = engine


def handover_for(engine: Engine, publisher: Publisher | None) -> Handover | None:
    """Return the handover that publishes rows of ``engine``'s database with ``publisher``.

    It is None without a publisher, if ``after_commit`` is ``"nothing"``, and for a database that
    outbox's threads can't use, which is logged once.
    """
    if publisher is None or publisher.settings.after_commit == "nothing":
        return None
    refusal = refusal_of(engine, _named)
    if refusal is not None:
        _warn_once(engine, refusal)
        return None
    handover = _by_publisher.get(publisher)
    return handover or _by_publisher.setdefault(publisher, Handover(publisher))


def queue_for(
    stored: Event, engine: Engine, options: Mapping[str, Any], publisher: Publisher | None
) -> str:
    """Return the queue of the row that is to be stored for an event: ``""`` is the relay's."""
    if publisher is None or not (seam.observer is None or seam.observer.hands_over):
        return ""
    return publisher.queue_for(stored, _named or engine, options)


def doubt(transaction: RootTransaction) -> None:
    """Note that rows of ``transaction`` may not be in the table after its commit."""
    _doubtful.add(transaction)


def drain(timeout: float = 5.0) -> bool:
    """Wait until this process has published what it committed, or has just tried.

    What can't be published is tried again later, or left to a relay. Call this before you
    dispose of an engine. It runs automatically when the process exits.

    Args:
        timeout: the seconds to wait at most.

    Returns:
        Whether all was tried.
    """
    deadline = time.monotonic() + timeout
    for handover in list(_by_publisher.values()):
        handover.hurry()
    waits = [
        handover.wait(max(0.0, deadline - time.monotonic()))
        for handover in list(_by_publisher.values())
    ]
    return all(waits)


process.at_exit(drain)  # registered after the publisher's, so it runs before that


_inherited: list[object] = []
"""The parent's connections, which this child must not close."""


def _reset_after_fork() -> None:
    for handover in list(_by_publisher.values()):
        _inherited.append(handover._sides)
        handover._reset()


process.after_fork(_reset_after_fork)
