"""Consumes from the file."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from outbox.errors import BrokerError, ConnectionLost, OutboxError, UsageError
from outbox.messages.delivery import Delivery, QueueSpec, dead_letter_queue
from outbox.settings import Settings
from outbox.storage.store import Claimed
from outbox.system.backoff import backoff
from outbox.transports.sqlite import routing
from outbox.transports.sqlite.claimed_rows import delivery_of, is_deadly, letter_of_deadly
from outbox.transports.sqlite.database import Database
from outbox.transports.sqlite.leases import LEASE, Leases
from outbox.transports.sqlite.location import Location
from outbox.transports.sqlite.plan import rows_of
from outbox.transports.sqlite.routing import Binding
from outbox.transports.sqlite.shared_file import shared_file_at
from outbox.url import BrokerURL

__all__ = ["SQLiteSubscription"]

logger = logging.getLogger("outbox.consumer")

_FIRST_POLL, _LONGEST_POLL = 0.01, 0.1
_POLL_GROWTH = 1.3
_LOOK_AGAIN = 1.0
"""Seconds after which what is due is looked up whatever was noticed: the clock may be set."""

_LONGEST_PAUSE = 2.0
"""Seconds after a failure: the leases have to be extended as soon as that is possible."""

_CANCEL_TIMEOUT = 2.0
_CLOSE_TIMEOUT = 3.0


class _Done(NamedTuple):
    """What a worker wants to become of a message: ``delay`` is None for an ack."""

    tag: int
    delay: float | None


class SQLiteSubscription:
    """One thread for all queues of a worker: it settles and claims, in one transaction a turn.

    Handlers run elsewhere. Everything below the line runs on that thread.
    """

    def __init__(
        self, url: BrokerURL, settings: Settings, queues: Sequence[QueueSpec], prefetch: int
    ) -> None:
        """See that the file can be made; nothing is connected yet.

        Raises:
            UsageError: the URL has an option that is not known, or the file cannot be used.
        """
        location = Location.of(url)
        self._settings = settings
        self._queues = queues
        self._leases = Leases(prefetch)
        self._stopping = False
        self._give_up_at = 0.0
        self._database = Database(
            location, lambda: self._stopping and time.monotonic() > self._give_up_at
        )
        self._shared_file = shared_file_at(location.path)
        self._deliver: Callable[[Delivery], None] = _nowhere
        self._refused: Callable[[str], None] = _nowhere
        self._wake = threading.Event()
        self._cancelling = False
        self._cancelled = threading.Event()
        self._done: deque[_Done] = deque()
        self._thread: threading.Thread | None = None
        self._to_declare = True
        self._has_consumed = False
        self._failures = 0
        self._poll = _FIRST_POLL
        self._look_at = 0.0

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Declare and consume, for as long as it is not cancelled."""
        self._deliver = deliver
        self._refused = refused
        self._shared_file.listen(self._wake)
        self._thread = threading.Thread(target=self._run, name="outbox-consumer", daemon=True)
        self._thread.start()

    @property
    def is_consuming(self) -> bool:
        """Whether the queues are declared and the last look into the file went well."""
        return self._has_consumed and not self._failures

    def ack(self, delivery: Delivery) -> None:
        """Have ``delivery`` deleted soon, together with others."""
        self._done.append(_Done(delivery.tag, None))
        self._wake.set()

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Have ``delivery`` given back soon, due in ``delay`` seconds."""
        self._done.append(_Done(delivery.tag, delay))
        self._wake.set()

    def out(self, queue: str) -> int:
        """How many leases there are on rows of ``queue``."""
        return self._leases.held(queue)

    def is_stale(self, delivery: Delivery) -> bool:
        """Whether the lease of ``delivery`` was lost."""
        return delivery.tag not in self._leases

    def declare_again(self) -> None:
        """Declare all queues."""
        self._to_declare = True
        self._wake.set()

    def cancel(self) -> None:
        """Claim nothing more, from when this returns; waits 2 seconds at the most."""
        self._cancelling = True
        self._wake.set()
        if self._thread is not None:
            self._cancelled.wait(_CANCEL_TIMEOUT)

    def close(self) -> None:
        """Settle what was settled, give back the rest to its place, and close the file."""
        self._shared_file.stop_listening(self._wake)
        self._give_up_at = time.monotonic() + _CLOSE_TIMEOUT - 1.0
        self._cancelling = self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_TIMEOUT)

    # ------------------------------------------------------------------------ on its own thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._wait()
                if not self._stopping:
                    self._turn()
                    self._has_consumed = True
                    self._failures = 0
            except (BrokerError, UsageError) as error:
                self._on_failure(error)
            except Exception as error:  # a bug of ours must not end the consuming
                logger.exception("could not consume from %s", self._database.path)
                self._on_failure(ConnectionLost(str(error)))
        self._give_back()
        self._database.close()
        self._cancelled.set()

    def _wait(self) -> None:
        """Return when there is something to do."""
        while True:
            self._wake.clear()
            if self._cancelling:
                self._cancelled.set()
            now = time.monotonic()
            extend_in = self._leases.extend_in(now)
            hungry = not self._cancelling and any(
                self._leases.free(queue.name) > 0 for queue in self._queues
            )
            if (
                self._stopping
                or self._done
                or self._to_declare
                or (extend_in is not None and extend_in <= 0)
                or (hungry and self._finds_something(now))
            ):
                return
            pauses = [one for one in (extend_in, *self._pauses(now, hungry)) if one is not None]
            if self._wake.wait(min(pauses, default=None)):
                self._look_at = 0.0

    def _pauses(self, now: float, hungry: bool) -> tuple[float | None, ...]:
        if not hungry:
            return ()
        self._poll, poll = min(_LONGEST_POLL, self._poll * _POLL_GROWTH), self._poll
        return poll, max(0.0, self._look_at - now)

    def _finds_something(self, now: float) -> bool:
        """Return whether something waits; it is looked up when there is a reason to."""
        if not self._database.changed() and now < self._look_at:
            return False
        due = [
            self._database.due_in(queue.name)
            for queue in self._queues
            if self._leases.free(queue.name) > 0
        ]
        soonest = min((one for one in due if one is not None), default=_LOOK_AGAIN)
        self._look_at = now + min(max(soonest, 0.0), _LOOK_AGAIN)
        return soonest <= 0

    def _turn(self) -> None:
        now = time.monotonic()
        done = [self._done.popleft() for _ in range(len(self._done))]
        declaring, self._to_declare = self._to_declare, False
        extend_in = self._leases.extend_in(now)
        extending = extend_in is not None and extend_in <= 0
        try:
            with self._database.transaction() as connection:
                if declaring:
                    self._declare(connection)
                self._settle(done, connection)
                left = self._extend(connection) if extending else set()
                claimed = [] if self._cancelling else self._claim(done, connection)
                deadly = [row for row in claimed if is_deadly(row)]
                self._bury(deadly, connection)
        except BaseException:
            self._done.extendleft(reversed(done))
            self._to_declare |= declaring
            raise
        self._leases.drop(one.tag for one in done)
        if extending and (lost := self._leases.extended(left, now)):
            logger.warning("%d message(s) were not held in time, and others have them", lost)
        if claimed:
            self._poll = _FIRST_POLL
        self._look_at = 0.0
        for row in claimed:
            if not is_deadly(row):
                self._deliver(delivery_of(row, self._leases.take(row, now)))
        for row in deadly:
            logger.error(
                "message %r of %r was never settled: it is in the dead letters",
                row.event.id,
                row.queue,
            )

    def _declare(self, connection: Connection) -> None:
        """See to the queues.

        Raises:
            UsageError: one is not there and may not be made.
        """
        names = [
            name for queue in self._queues for name in (dead_letter_queue(queue.name), queue.name)
        ]
        if self._settings.declare == "create":
            found = [routing.of_queue(name) for name in names]
            for queue in self._queues:
                if queue.exchange:
                    found += [
                        Binding(queue.name, queue.exchange, topic)
                        for topic in dict.fromkeys((queue.name, *queue.topics))
                    ]
            routing.add(connection, found)
        else:
            if self._settings.declare == "never":
                names = [queue.name for queue in self._queues]
            there = set(routing.load(connection))
            missing = [name for name in names if routing.of_queue(name) not in there]
            if missing:
                raise UsageError(f"NOT_FOUND - there is no queue {missing[0]!r}")

    def _settle(self, done: Sequence[_Done], connection: Connection) -> None:
        store = self._database.store
        acked: list[Claimed] = []
        returned: dict[float, list[Claimed]] = {}
        for tag, delay in done:
            row = self._leases.get(tag)
            if row is None:
                continue
            if delay is None:
                acked.append(row)
            else:
                returned.setdefault(delay, []).append(row)
        store.complete(acked, connection=connection)
        for delay, rows in returned.items():
            store.release(rows, delay, failed=True, in_place=delay <= 0, connection=connection)

    def _extend(self, connection: Connection) -> set[int]:
        rows = self._leases.rows
        self._database.store.extend(rows, LEASE, connection=connection)
        return self._database.store.leased(rows, connection=connection)

    def _claim(self, done: Sequence[_Done], connection: Connection) -> list[Claimed]:
        store = self._database.store
        rows = (self._leases.get(tag) for tag in {one.tag for one in done})
        settled = Counter(row.queue for row in rows if row is not None)
        found: list[Claimed] = []
        for queue in self._queues:
            free = self._leases.free(queue.name) + settled[queue.name]
            if free > 0:
                found += store.claim(free, queue=queue.name, lease=LEASE, connection=connection)
        return found

    def _bury(self, rows: Sequence[Claimed], connection: Connection) -> None:
        for row in rows:
            letter = letter_of_deadly(row)
            self._database.store.put_rows(rows_of(letter, (letter.target,)), connection=connection)
        self._database.store.complete(rows, connection=connection)

    def _give_back(self) -> None:
        """Settle what was settled, and give back the rest."""
        done = list(self._done)
        settled = {one.tag for one in done}
        try:
            if not len(self._leases):
                return
            with self._database.transaction() as connection:
                self._settle(done, connection)
                self._leases.drop(settled)
                self._database.store.release(
                    self._leases.rows, failed=True, in_place=True, connection=connection
                )
        except BrokerError as error:
            logger.warning("what was not settled comes again after %.0f s: %s", LEASE, error)

    def _on_failure(self, error: OutboxError) -> None:
        if UsageError in (type(error), type(error.__cause__)) and not self._has_consumed:
            self._refused(str(error))
        if not self._failures:
            logger.error("cannot consume: %s; trying again", error)
        if lost := self._leases.end(time.monotonic()):
            logger.warning("%d message(s) could not be held, and will come again", lost)
        until = time.monotonic() + min(_LONGEST_PAUSE, backoff(self._failures))
        self._failures += 1
        while not self._stopping and (left := until - time.monotonic()) > 0:
            if self._cancelling:
                self._cancelled.set()
            self._wake.wait(min(left, 0.1))
            self._wake.clear()


def _nowhere(_: Any) -> None:
    raise ConnectionLost("the subscription was not started")
