"""The relay: publishes stored events, and deletes their rows when the broker has confirmed them.

Claiming rows is one short transaction, and writing their fates is another; none is open in between,
however long the broker takes. If a process dies in between, its rows are due again when their lease
ends, so an event may be published twice, with the same id.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.engine import URL

from outbox.configuration import default_publisher
from outbox.errors import UsageError
from outbox.messages.rows import UNROUTED
from outbox.publisher import Publisher
from outbox.sql.row_fates import RowFates, write_fates
from outbox.sql.waves import Batch
from outbox.storage.engines import open_engine
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.floors import Floors
from outbox.storage.notifications import RELAY_CHANNEL, Listener, can_listen
from outbox.storage.store import Claimed, Store
from outbox.storage.transactions import own_transaction
from outbox.storage.upkeep import published_rows
from outbox.storage.upkeep.purging import Purging
from outbox.telemetry import sources
from outbox.telemetry.sources import Samples
from outbox.transports.outages import outages
from outbox.url import BrokerURL

__all__ = ["Relay", "RelayStats"]

logger = logging.getLogger("outbox.relay")

_IN_FLIGHT = 3  # batches: one is being claimed, one sent, one confirmed
_IDLE = (0.02, 2.0)  # seconds between two claims that find nothing: the first time, and at most
_CONNECTING = 0.05  # seconds between two checks whether the broker is connected
_CONFIRMS = 0.1  # seconds at most between two looks at leases while waiting for confirms
_UNAVAILABLE = (0.5, 30.0)  # seconds between two attempts while the database is unavailable

_REMEDY = (
    "polling up to every 2 s. Behind a pooler in transaction mode, use a URL that leads to "
    "PostgreSQL itself, or do without --listen"
)


@dataclass(frozen=True, slots=True)
class RelayStats:
    """The counters of a relay since it was made.

    Attributes:
        claimed: rows that were claimed.
        published: rows that the broker has confirmed, or that were unroutable with
            ``unroutable="ignore"``.
        parked: rows that the broker has confirmed as parked messages.
        released: rows that were released: the broker was unavailable, or nacked them.
        buried: rows that can't be published, and are now dead.
        batches: claims that returned rows.
        lag: the age in seconds of the oldest event in the last claim; 0.0 if it returned none.
    """

    claimed: int = 0
    published: int = 0
    parked: int = 0
    released: int = 0
    buried: int = 0
    batches: int = 0
    lag: float = 0.0


class Relay:
    """Moves stored events from one database to one broker, until it is stopped.

    Any number of relays may run in parallel, in any number of processes. A relay runs once:
    ``start`` and ``stop``, or ``run_once``. Any thread may call ``stop``, ``wait`` and ``stats``.
    """

    def __init__(
        self,
        database: str | URL | Engine | Store,
        publisher: Publisher | None = None,
        *,
        batch: int = 1000,
        lease: float | None = None,
        ordered: bool = False,
        listen: bool = False,
    ) -> None:
        """Make a relay, not connected yet.

        Args:
            database: the URL, the engine or the store of the database with the events.
            publisher: the publisher; by default the default publisher of the process.
            batch: the maximum number of rows per claim, 1 or more; large rows make it fewer.
            lease: the seconds for which a claimed row is reserved; by default 60, or twice the
                publisher's ``stall_timeout`` if that is more. After a crash the events wait this
                long.
            ordered: whether to publish events with the same key strictly in the order of their
                rows: each is confirmed before the next is sent. This also holds with several
                relays, if all of them are ordered. A scheduled event holds up others only from its
                time on.
            listen: whether to claim as soon as the channel ``outbox_events`` is notified, instead
                of up to 2 s later; needs PostgreSQL. Behind a pooler in transaction mode, where
                notifications don't arrive, the relay warns and polls.

        Raises:
            UsageError: an argument is out of range, or the URL can't be used.
            MissingExtra: the database's driver isn't installed.
        """
        if batch < 1:
            raise UsageError(f"batch is {batch}; it must be 1 or more")
        if lease is not None and not lease > 0:
            raise UsageError(f"lease is {lease}; it must be more than 0 seconds")
        self._owns_engine = isinstance(database, str | URL)
        if isinstance(database, str | URL):
            database = open_engine(database)
        self.store = Store(database) if isinstance(database, Engine) else database
        self._floors = Floors()
        self.publisher = publisher or default_publisher()
        # Stored by processes whose broker is a database, while they couldn't see whether it is this
        # one. With another broker they aren't this relay's.
        url = self.publisher.settings.url
        self._takes_unrouted = url is not None and BrokerURL.parse(url).is_database
        self.batch = batch
        self.lease = lease or max(60.0, 2 * self.publisher.settings.stall_timeout)
        self.ordered = ordered
        self.listen = listen
        self._counts = dict.fromkeys(
            ("claimed", "published", "parked", "released", "buried", "batches"), 0
        )
        self._lag = 0.0
        self._in_flight: deque[Batch] = deque()
        # Ordered, a batch holds back all other rows of its keys: a second one would find little.
        self._max_in_flight = 1 if ordered else _IN_FLIGHT
        self._extend_at = 0.0
        self._database = ("database", str(self.store.engine.url))  # without its password
        self._purging = Purging(self.publisher.settings.keep_published)
        self._unwritten = RowFates()  # fates not in the table yet, as the database was unavailable
        self._incomplete = False
        self._begun = False
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._deadline = 0.0
        sources.register(self, functools.partial(_counts, self._counts), _gauges)

    def stats(self) -> RelayStats:
        """Return the counters so far."""
        return RelayStats(**self._counts, lag=self._lag)

    def start(self) -> None:
        """Start relaying in the background.

        Raises:
            UsageError: the table is missing or incomplete, or this relay has run already.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be reached.
        """
        self._begin()
        if self.listen and can_listen(self.store.engine):
            self._listener = Listener(
                self.store.engine,
                [RELAY_CHANNEL],
                self._wake.set,
                logger=logger,
                remedy=_REMEDY,
            )
            self._listener.start()
        self._thread = threading.Thread(target=self._run, name="outbox-relay", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds for a request to stop; return whether there was one."""
        return self._stopping.wait(timeout)

    def ask_to_stop(self, timeout: float = 10.0) -> None:
        """Request a stop like :meth:`stop`, without waiting: for signal handlers.

        Args:
            timeout: the seconds until rows without a confirm are released.
        """
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        self._wake.set()

    def stop(self, timeout: float = 10.0) -> bool:
        """Stop claiming, and wait for the confirms of the rows in flight.

        Args:
            timeout: the seconds to wait. Rows not confirmed by then are released.

        Returns:
            Whether all rows were confirmed.
        """
        self.ask_to_stop(timeout)
        if self._listener is not None:
            self._listener.stop()
        if self._thread is not None:
            # A bit longer than the deadline, because the rest has to be released.
            self._thread.join(max(0.0, self._deadline + 5 - time.monotonic()))
        self._disconnect()
        return not self._incomplete and not (self._thread and self._thread.is_alive())

    def run_once(self) -> int:
        """Publish the due events, and return how many events the broker has confirmed.

        Rows that can't be published now are released. Another thread can end this early with
        ``ask_to_stop``.

        Raises:
            UsageError: the table is missing or incomplete, or this relay is running.
            BrokerError: the broker is unavailable.
            sqlalchemy.exc.SQLAlchemyError: the database is unavailable.
        """
        self._begin()
        before = self._confirmed()
        fates: RowFates | None = None
        try:
            while fates is None or fates.error is None:
                claimed = self._fill(known_to_be_connected=False)
                fates = self._take_in()
                if not claimed and fates is None:
                    break
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C: there is no time
                self.ask_to_stop(0)
            self._finish()
            raise
        self._finish()
        self._begun = False
        if fates is not None and fates.error is not None:
            raise fates.error
        return self._confirmed() - before

    def _begin(self) -> None:
        if self._begun or self._stopping.is_set():
            raise UsageError("this relay has run already; create a new one")
        try:
            self.store.check()
            if self.publisher.settings.keep_published:
                with own_transaction(self.store.engine) as connection:
                    published_rows.check(connection)
        except BaseException:
            self._disconnect()
            raise
        self._begun = True

    def _run(self) -> None:
        idle, pause = _IDLE[0], _UNAVAILABLE[0]
        failing = False
        with contextlib.suppress(UsageError):
            self.publisher.make_ready()
        while True:
            self._wake.clear()
            if self._stopping.is_set():  # checked after clear(), since a stop request also wakes
                break
            try:
                busy = self._turn()
                if failing and (seconds := outages.ended(self._database)):
                    logger.info("the database is available again, after %.0f s", seconds)
                failing, pause = False, _UNAVAILABLE[0]
            except DatabaseError as error:
                reason = f"the database is unavailable, retrying: {reason_of(error)}"
                if text := outages.failed(self._database, "", reason, self, None):
                    logger.warning("%s", text)
                failing = True
                self._stopping.wait(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _UNAVAILABLE[1])
                continue
            except Exception:  # a bug in outbox must not end the relay
                logger.exception("unexpected error in the relay; continuing")
                self._stopping.wait(_UNAVAILABLE[0])
                continue
            if busy:
                idle = _IDLE[0]
            elif not self.publisher.connected:
                self._wake.wait(_CONNECTING)
            else:
                self._wake.wait(idle)
                idle = min(2 * idle, _IDLE[1])
        self._finish()

    def _turn(self) -> bool:
        """Claim and send batches, and finish the oldest; return whether there was any."""
        self._write_fates()
        self._purging.turn(self.store.purge_published)
        claimed = self._fill()
        return self._take_in() is not None or claimed

    def _fill(self, *, known_to_be_connected: bool = True) -> bool:
        """Claim and send batches up to the maximum in flight; return whether there was any.

        Nothing is claimed without a connection to the broker, since it couldn't be sent.
        """
        claimed = False
        while len(self._in_flight) < self._max_in_flight and not self._stopping.is_set():
            if known_to_be_connected and not self.publisher.connected:
                break
            began = time.monotonic()
            # Which finds all, when run_once() asks it to.
            floors = self._floors if known_to_be_connected else None
            rows = self._claim("", floors)
            if not rows and self._takes_unrouted:
                rows = self._claim(UNROUTED, floors)
            self._lag = max((row.age for row in rows), default=0.0)
            if not rows:
                break
            claimed = True
            self._counts["batches"] += 1
            self._counts["claimed"] += len(rows)
            if not self._in_flight:
                self._extend_at = began + self.lease / 3
            batch = Batch(
                self.publisher,
                rows,
                ordered=self.ordered,
                until=began + self.lease / 2,
                on_report=self._wake.set,
            )
            self._in_flight.append(batch)
            batch.advance()
            if len(rows) < self.batch // 2:
                break
        return claimed

    def _claim(self, queue: str, floors: Floors | None) -> list[Claimed]:
        return self.store.claim(
            self.batch, queue=queue, lease=self.lease, ordered=self.ordered, floors=floors
        )

    def _take_in(self) -> RowFates | None:
        """Wait for the oldest batch in flight, and write its fates.

        Returns:
            The fates of its rows; None if no batch is in flight, or the time to stop is up.
        """
        if not self._in_flight:
            return None
        batch = self._in_flight[0]
        while not batch.advance():
            if self._stopping.is_set():
                batch.until = 0.0  # send no further wave
                if time.monotonic() >= self._deadline:
                    return None
            self._keep_leases()
            self._wake.wait(_CONFIRMS)
            self._wake.clear()
        self._in_flight.popleft()
        self._count(batch.fates)
        self._unwritten.add(batch.fates)
        self._write_fates()
        return batch.fates

    def _write_fates(self) -> None:
        write_fates(self.store, self._unwritten, self.publisher.settings.keep_published)

    def _keep_leases(self) -> None:
        """Extend the leases in flight, so that a slow broker gets no event twice."""
        now = time.monotonic()
        if now < self._extend_at:
            return
        rows = [row for batch in self._in_flight for row in batch.rows]
        self.store.extend(rows, self.lease)
        self._extend_at = now + self.lease / 3
        for batch in self._in_flight:
            batch.until = now + self.lease / 2

    def _finish(self) -> None:
        """Wait for the batches in flight until the deadline, and release the rest."""
        outages.left(self._database, self)
        try:
            while self._take_in() is not None:
                pass
            while self._in_flight:
                self._incomplete = True
                fates = self._in_flight.popleft().abandon()
                self._count(fates)
                self._unwritten.add(fates)
            self._write_fates()
        except DatabaseError as error:
            self._incomplete = True
            logger.warning(
                "the database is unavailable at shutdown; claimed rows are due again in %.0f s: %s",
                self.lease,
                reason_of(error),
            )

    def _count(self, fates: RowFates) -> None:
        counts = self._counts
        counts["published"] += len(fates.done) - fates.parked
        counts["parked"] += fates.parked
        counts["released"] += len(fates.unconfirmed) + len(fates.nacked)
        counts["buried"] += len(fates.rejected)

    def _confirmed(self) -> int:
        return self._counts["published"] + self._counts["parked"]

    def _disconnect(self) -> None:
        if self._owns_engine:
            self.store.engine.dispose()


def _counts(counts: dict[str, int]) -> Samples:
    fates = ("published", "parked", "released", "buried")
    return {"outbox_relay_rows_total": {(fate,): counts[fate] for fate in fates}}


def _gauges(relay: Relay) -> Samples:
    return {"outbox_store_oldest_age_seconds": {(): max(0.0, relay.stats().lag)}}
