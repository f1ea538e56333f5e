"""Publishes to a database: the I/O around backlog and plan."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import StatementError

from outbox.backlog.chunk import Entry, Fate
from outbox.backlog.notifier import Notifier, call_hook
from outbox.errors import Blocked, BrokerError, ConnectionLost, Nacked, UsageError
from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.settings import MIB, Settings
from outbox.system.background_thread import STARTS_NONE_AT_EXIT, BackgroundThread
from outbox.system.backoff import backoff
from outbox.transports.backlogged import BackloggedTransport
from outbox.transports.database.database import Room
from outbox.transports.database.kinds import database_at
from outbox.transports.database.own_tables import OwnTables
from outbox.transports.database.plan import Plan
from outbox.transports.database.router import Router
from outbox.transports.outages import outages
from outbox.url import BrokerURL

__all__ = ["DatabaseTransport"]

logger = logging.getLogger("outbox.publisher")

_WRITE_EVENTS = 10_000
_WRITE_BYTES = 16 * MIB
_CLOSE_TIMEOUT = 2.0

_LOOK_FOR_ROOM = 1.0
"""Seconds between two looks at the space left on the disk, while there is plenty."""

_TIME_TO_DECLARE = 1.5
"""Seconds in which workers notice that the file is another one, and declare their queues there."""

_LOOK_FOR_QUEUES = 0.02
"""Seconds between two looks for them."""

_FAULTS_OF_EVENTS = (StatementError, ValueError, TypeError, AttributeError, ArithmeticError)
"""Exceptions about an event that fits no row; ``enqueue_event`` makes no such event."""


class _QueuesMissing(Exception):
    """Events have no queue, in a file in which workers haven't had the time to declare theirs."""


class _NoRoom(Exception):
    """Rows are larger than the room that is left on the disk for events."""


class DatabaseTransport(BackloggedTransport):
    """Writes the events of all callers on one thread, as many as wait in one transaction.

    The methods below the line and those named ``_on…`` run on that thread.
    """

    supports_delay = True
    longest_delay = None

    def __init__(self, url: BrokerURL, settings: Settings, notify: Notifier) -> None:
        """Check the URL, and that a file can be created; nothing is connected yet.

        Raises:
            UsageError: the URL has an unknown option, or the database can't be used.
        """
        super().__init__(notify)
        self._settings = settings
        self._router = Router(settings)
        self._wanted = False
        self._stopping = False
        self._hurries = False
        self._database = database_at(url, lambda: self._stopping, self._on_reopened)
        self._tables = OwnTables(self._database, self._ask_thread)
        self._address = self._database.address
        self._was_replaced = False
        self._queues_missing_until = 0.0
        self._room = Room(0, 0)
        self._look_for_room_at = 0.0
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = BackgroundThread(lambda: None, self._run, name="outbox-publisher")
        self._connected = False
        self._used_at: float | None = None  # None also while an idle connection is closed
        self._failures = 0
        self._try_again_at = 0.0
        self._backing_off: list[tuple[float, Entry]] = []  # with the times to retry them

    @property
    def connected(self) -> bool:
        """Whether the last attempt to write succeeded."""
        return self._connected

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller is a hook on the writing thread."""
        return threading.get_ident() == self._thread.ident

    def start(self) -> None:
        """Start connecting in the background, unless that has started."""
        if not self._wanted:
            self._wanted = True
            self._bell.put(None)
        self._thread.start()

    def start_now(self) -> None:
        """Start the thread without connecting: later, Python may refuse to start one."""
        self._thread.start_now()

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return the queue of a row that the application is about to store for ``event``."""
        return self._tables.queue_for(event, engine, options)

    def look_into(self, queues: Collection[str]) -> None:
        """Have workers look into ``queues``: the application has committed rows there."""
        self._database.published(queues)

    def _ask_thread(self, question: Callable[[], object]) -> bool:
        """Have ``question`` called soon on the thread; return whether to wait for that."""
        if self.on_own_thread:
            return False
        try:
            self.start()
        except (UsageError, RuntimeError):
            return False

        def ask() -> None:
            question()
            self._used_at = time.monotonic()  # the connection isn't idle

        self._ask(ask)
        return True

    def _encode(self, event: Event) -> bytes:
        # Rows are made on the writing thread; as frames, the bodies only count for size limits.
        return event.body

    def _wake_thread(self) -> None:
        self._bell.put(None)

    def _stop_before_start(self) -> bool:
        return self._thread.cancel()

    def _stop(self, *, graceful: bool) -> bool:
        self._stopping = True
        if self._thread.cancel():
            return True
        self._bell.put(None)
        # The timeout is for a disk that hangs.
        return not self.on_own_thread and self._thread.join(_CLOSE_TIMEOUT)

    # --------------------------------------------------------------------- on the writing thread

    def _run(self) -> None:
        if STARTS_NONE_AT_EXIT:
            with contextlib.suppress(UsageError, RuntimeError):
                self._database.make_ready()
        while not self._stopping:
            self._take_in()
            self._refresh_tables()
            if self._wanted and not self._stopping:
                if self._is_idle():
                    self._database.close()
                    self._used_at = None
                else:
                    self._turn()
            self._thread.wait_for(self._bell, self._pause())
        outages.left(self._address, self)
        self._finish()
        self._database.end()

    def _refresh_tables(self) -> None:
        due_in = self._tables.refresh_in()
        if due_in is not None and due_in <= 0:
            self._tables.refresh()
            self._used_at = time.monotonic()

    def _hurry(self) -> None:
        self._hurries = True

    def _on_retire(self) -> None:
        self._surrender()
        self._backing_off = []
        self._stopping = True
        self._bell.put(None)

    def _is_idle(self) -> bool:
        """Return whether nothing was written for so long that the connection is to be closed."""
        timeout = self._database.idle_timeout
        if timeout is None or not self._connected or self.backlog.queued or self._backing_off:
            return False
        return self._used_at is None or time.monotonic() >= self._used_at + timeout

    def _pause(self) -> float | None:
        """Return the seconds until there is something to do; None if there is nothing."""
        times = [due_at for due_at, _ in self._backing_off]
        if self._failures:
            times.append(self._try_again_at)
        if (refresh_in := self._tables.refresh_in()) is not None:
            times.append(time.monotonic() + refresh_in)
        if self._used_at is not None and self._database.idle_timeout is not None:
            times.append(self._used_at + self._database.idle_timeout)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _turn(self) -> None:
        """Write the queued entries, unless the last failure is too recent."""
        if self._failures and not self._hurries and time.monotonic() < self._try_again_at:
            return
        self._hurries = False
        try:
            self._database.open()
            self._requeue_due()
            while self.backlog.queued and not self._stopping:
                self._write_next()
            self._log_replacement()
            self._used_at = time.monotonic()
            # Not before: a file on a full disk can be opened, so the pauses would never grow.
            self._on_success()
        except BrokerError as error:
            self._on_failure(error)
        except Exception as error:  # a bug in outbox must neither end the thread nor lose events
            logger.exception("unexpected error while writing to %s; retrying", self._address)
            self._on_failure(ConnectionLost(f"{self._address}: {error}"))

    def _write_next(self) -> None:
        now = time.monotonic()
        if self._room.for_new < _WRITE_BYTES or now >= self._look_for_room_at:
            self._room = self._database.room()
            self._look_for_room_at = now + _LOOK_FOR_ROOM
        entries = self.backlog.take(_WRITE_EVENTS, _WRITE_BYTES)
        if not entries:
            return
        try:
            self._write(entries)
        except _QueuesMissing:
            self.backlog.requeue(entries)
            time.sleep(_LOOK_FOR_QUEUES)
        except BaseException:
            self.backlog.requeue(entries)  # skips those that have a fate
            raise

    def _write(self, entries: Sequence[Entry]) -> None:
        """Write ``entries`` in one transaction, or in halves.

        In halves if one can't be stored, to find it, and if not all have room on the disk.

        Raises:
            BrokerError: the database can't be written.
            _QueuesMissing: nothing was written, since workers are about to declare their queues.
        """
        try:
            plan, size = self._put_known(entries) or self._database.run(
                functools.partial(self._put, entries)
            )
        except (_NoRoom, *_FAULTS_OF_EVENTS) as error:
            if len(entries) > 1:
                half = len(entries) // 2
                self._write(entries[:half])
                self._write(entries[half:])
            elif isinstance(error, _NoRoom):
                raise Blocked(
                    f"no space left for {self._database.name}: the rest of the disk is reserved "
                    "for workers, which need room to settle messages"
                ) from None
            else:
                why = f"cannot be stored: {getattr(error, 'orig', None) or error}"
                self._notify(self.backlog.give_fate(entries, Fate.REJECTED, why))
            return
        self._room = self._room.without(size)
        self._database.published({row["queue"] for row in plan.rows})
        self.backlog.confirmed()
        for (fate, reason), settled in plan.fates.items():
            self._notify(self.backlog.give_fate(settled, fate, reason))
        if plan.without_queue:
            self._set_aside(plan.without_queue)

    def _put_known(self, entries: Sequence[Entry]) -> tuple[Plan[Entry], int] | None:
        """Do the same as :meth:`_put` by the bindings that are known, if they are those there."""
        known = self._router.plan_known(entries)
        if known is None:
            return None
        plan, digest = known
        size = self._size_of(plan.rows, entries)
        return (plan, size) if self._database.put_known(plan.rows, digest) else None

    def _put(self, entries: Sequence[Entry], connection: Connection) -> tuple[Plan[Entry], int]:
        """Write the rows of ``entries``; return the plan, and the bytes of the rows."""
        plan = self._router.plan(entries, connection)
        if not plan.is_complete and time.monotonic() < self._queues_missing_until:
            raise _QueuesMissing
        size = self._size_of(plan.rows, entries)
        self._database.put_rows(plan.rows, connection)
        return plan, size

    def _size_of(self, rows: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> int:
        """Return the bytes of ``rows``, for which there is room.

        Raises:
            _NoRoom: there is none.
        """
        size = sum(len(row["payload"]) for row in rows)
        # What isn't kept is what workers publish: copies of messages, mostly.
        new = any(entry.chunk.keep for entry in entries)
        if size > (self._room.for_new if new else self._room.for_copies):
            raise _NoRoom
        return size

    def _set_aside(self, entries: Sequence[Entry]) -> None:
        """Keep ``entries`` outside the queue for their back-off: the queue may be created."""
        logger.error("cannot park %d event(s): no queue %r", len(entries), PARKING_QUEUE)
        error = Nacked(f"cannot park {len(entries)} event(s): no queue {PARKING_QUEUE!r}")
        self._notify(self.backlog.refused(entries, error))
        now = time.monotonic()
        self._backing_off += [
            (now + backoff(entry.attempts - 1), entry) for entry in entries if entry.fate is None
        ]

    def _requeue_due(self) -> None:
        now = time.monotonic()
        due = [entry for due_at, entry in self._backing_off if due_at <= now]
        if due:
            self._backing_off = [waiting for waiting in self._backing_off if waiting[0] > now]
            self.backlog.requeue(due)

    def _on_reopened(self, is_another: bool) -> None:
        if not is_another:
            return
        self._was_replaced = True
        self._queues_missing_until = time.monotonic() + _TIME_TO_DECLARE
        self._database.published(())

    def _log_replacement(self) -> None:
        # Not at once, while the database is in use: a log handler may publish.
        if self._was_replaced:
            self._was_replaced = False
            logger.error(
                "%s was deleted or replaced by another file: what was in the old one isn't "
                "delivered from here any more",
                self._address,
            )

    def _on_success(self) -> None:
        if self._failures and (seconds := outages.ended(self._address)) >= 1:
            logger.warning("%s works again, after %.0f s", self._address, seconds)
        self._failures = 0
        if not self._connected:
            self._connected = True
            self._up()
            self.backlog.tally.connects += 1
            call_hook(self._settings.on_connected, self._address)

    def _on_failure(self, error: BrokerError) -> None:
        was_connected, self._connected = self._connected, False
        self._try_again_at = time.monotonic() + backoff(self._failures)
        self._failures += 1
        self._notify(self.backlog.down((), error))
        text = outages.failed(
            self._address, self._address, str(error), self, lambda: self.backlog.kept_size[0]
        )
        if text:
            logger.warning("%s; retrying", text)
        if was_connected:
            call_hook(self._settings.on_disconnected, error)
