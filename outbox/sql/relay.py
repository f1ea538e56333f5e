"""The relay: publishes what transactions have stored, and forgets what the broker has confirmed.

A claim is one short transaction, and so is what follows from the confirms; between the two no
transaction is open, however long the broker takes. Whatever dies in between, the rows are there
and due again when their lease ends: an event is then published twice, with the same id.
"""

from __future__ import annotations

import contextlib
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
from outbox.publisher import Publisher
from outbox.sql.listening import can_listen, listen
from outbox.sql.row_fates import RowFates, write_fates
from outbox.sql.waves import Batch
from outbox.storage.engines import open_engine
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.store import Store

__all__ = ["Relay", "RelayStats"]

logger = logging.getLogger("outbox.relay")

_IN_FLIGHT = 3  # batches: one is claimed, one on its way, one being confirmed
_IDLE = (0.02, 2.0)  # seconds between two looks, when there was nothing
_CONNECTING = 0.05  # seconds between two looks whether the broker is there
_CONFIRMS = 0.1  # seconds at most between two looks at leases, while confirms are awaited
_AWAY = (0.5, 30.0)  # seconds between two tries while the database is away


@dataclass(frozen=True, slots=True)
class RelayStats:
    """What a relay has counted since it was made.

    Attributes:
        claimed: rows.
        published: rows that the broker has confirmed, or that were to be ignored where no queue was
            bound for them.
        parked: rows that the broker has confirmed among the parked.
        released: rows that were given back: the broker was away, or refused them for the moment.
        buried: rows that can never be published.
        batches: claims that found something.
        lag: seconds for which the oldest event of the last claim had been stored by then; 0.0 if
            there was nothing to claim.
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

    Any number may run side by side, in any number of processes. One relay runs once: ``start`` and
    ``stop``, or ``run_once``. ``stop``, ``wait``, ``stats`` may be called from any thread.
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
        """Make a relay; nothing is connected yet.

        Args:
            database: where the events are stored: a URL, an engine, or the store itself.
            publisher: to the broker; the default is the process's own.
            batch: how many rows are claimed at a time, 1 or more; fewer where they are large.
            lease: seconds for which a claimed row is nobody else's; the default is 60, or twice the
                publisher's ``stall_timeout`` if that is more. After a crash it is what the events
                have to wait.
            ordered: publish events of one key strictly in the order of their rows, also beside
                other relays, if those do so too: one is confirmed before the next is sent.
            listen: look as soon as somebody notifies the channel ``outbox_events`` (PostgreSQL
                with psycopg alone), rather than up to 2 s later.

        Raises:
            UsageError: an argument is out of its bounds, or the URL cannot be used.
            MissingExtra: the database's driver is not installed.
        """
        if batch < 1:
            raise UsageError(f"batch is {batch}, not 1 or more")
        if lease is not None and not lease > 0:
            raise UsageError(f"lease is {lease}, not more than 0 seconds")
        self._owns_engine = isinstance(database, str | URL)
        if isinstance(database, str | URL):
            database = open_engine(database)
        self.store = Store(database) if isinstance(database, Engine) else database
        self.publisher = publisher or default_publisher()
        self.batch = batch
        self.lease = lease or max(60.0, 2 * self.publisher.settings.stall_timeout)
        self.ordered = ordered
        self.listen = listen
        self._counts = dict.fromkeys(
            ("claimed", "published", "parked", "released", "buried", "batches"), 0
        )
        self._lag = 0.0
        self._on_their_way: deque[Batch] = deque()
        # Of a key everything is in one batch: beside it there would be little to claim.
        self._most_on_their_way = 1 if ordered else _IN_FLIGHT
        self._extend_at = 0.0
        self._owed = RowFates()  # known, and not written yet: the database was away
        self._incomplete = False
        self._begun = False
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._deadline = 0.0

    def stats(self) -> RelayStats:
        """Return what has been counted so far."""
        return RelayStats(**self._counts, lag=self._lag)

    def start(self) -> None:
        """Begin to relay, in the background.

        Raises:
            UsageError: the table is missing, or not as it should be; or this relay has run already.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be reached.
        """
        self._begin()
        self._threads = [threading.Thread(target=self._run, name="outbox-relay", daemon=True)]
        if self.listen and can_listen(self.store.engine):
            arguments = (self.store.engine, self._wake.set, self._stopping)
            self._threads.append(
                threading.Thread(
                    target=listen, args=arguments, name="outbox-relay-listen", daemon=True
                )
            )
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the relay is asked to stop, at most ``timeout`` seconds; return whether so."""
        return self._stopping.wait(timeout)

    def ask_to_stop(self, timeout: float = 10.0) -> None:
        """Do what :meth:`stop` does, and do not wait for it: for a handler of signals.

        Args:
            timeout: seconds until what is not confirmed is given back.
        """
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        self._wake.set()

    def stop(self, timeout: float = 10.0) -> bool:
        """Claim no more, and wait for the confirms of what is on its way.

        Args:
            timeout: seconds for that. What is not confirmed then is given back.

        Returns:
            Whether all was confirmed.
        """
        self.ask_to_stop(timeout)
        for thread in self._threads:
            # A moment longer than that: the rest is to be given back.
            thread.join(max(0.0, self._deadline + 5 - time.monotonic()))
        self._disconnect()
        return not self._incomplete and not any(one.is_alive() for one in self._threads)

    def run_once(self) -> int:
        """Publish what is due now, and return how many events the broker has confirmed.

        What the broker or the database does not take is given back. From another thread
        ``ask_to_stop`` ends it early.

        Raises:
            UsageError: the table is missing, or not as it should be; or this relay is running.
            BrokerError: the broker is away.
            sqlalchemy.exc.SQLAlchemyError: the database is away.
        """
        self._begin()
        before = self._confirmed()
        fates: RowFates | None = None
        try:
            while fates is None or fates.error is None:
                found = self._fill(known_to_be_connected=False)
                fates = self._take_in()
                if not found and fates is None:
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
            raise UsageError("this relay has run already; make another one")
        try:
            self.store.check()
        except BaseException:
            self._disconnect()
            raise
        self._begun = True

    def _run(self) -> None:
        idle, away = _IDLE[0], _AWAY[0]
        said = False
        with contextlib.suppress(UsageError):
            self.publisher.make_ready()
        while True:
            self._wake.clear()
            if self._stopping.is_set():  # after the clearing: who asks to stop wakes, too
                break
            try:
                busy = self._turn()
                if said:
                    logger.info("the database is back")
                said, away = False, _AWAY[0]
            except DatabaseError as error:
                if not said:
                    logger.warning("the database is away, trying again: %s", reason_of(error))
                    said = True
                self._stopping.wait(away * random.uniform(0.5, 1))
                away = min(2 * away, _AWAY[1])
                continue
            except Exception:  # a bug of ours must not end the relay
                logger.exception("the relay goes on after an error")
                self._stopping.wait(_AWAY[0])
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
        """Claim, send, and take in a batch; return whether there was any."""
        write_fates(self.store, self._owed)
        found = self._fill()
        return self._take_in() is not None or found

    def _fill(self, *, known_to_be_connected: bool = True) -> bool:
        """Claim batches and send them, as many as may be on their way; return whether any.

        Nothing is claimed that could not be sent.
        """
        found = False
        while len(self._on_their_way) < self._most_on_their_way and not self._stopping.is_set():
            if known_to_be_connected and not self.publisher.connected:
                break
            began = time.monotonic()
            rows = self.store.claim(self.batch, lease=self.lease, ordered=self.ordered)
            self._lag = max((row.age for row in rows), default=0.0)
            if not rows:
                break
            found = True
            self._counts["batches"] += 1
            self._counts["claimed"] += len(rows)
            if not self._on_their_way:
                self._extend_at = began + self.lease / 3
            batch = Batch(
                self.publisher,
                rows,
                ordered=self.ordered,
                until=began + self.lease / 2,
                on_report=self._wake.set,
            )
            self._on_their_way.append(batch)
            batch.advance()
            if len(rows) < self.batch // 2:
                break
        return found

    def _take_in(self) -> RowFates | None:
        """Wait for the oldest batch on its way and settle it.

        Returns:
            What became of it; None if there is none, or no time to wait for it any longer.
        """
        if not self._on_their_way:
            return None
        batch = self._on_their_way[0]
        while not batch.advance():
            if self._stopping.is_set():
                batch.until = 0.0  # what has not been sent is left
                if time.monotonic() >= self._deadline:
                    return None
            self._keep_leases()
            self._wake.wait(_CONFIRMS)
            self._wake.clear()
        self._on_their_way.popleft()
        self._count(batch.fates)
        self._owed.add(batch.fates)
        write_fates(self.store, self._owed)
        return batch.fates

    def _keep_leases(self) -> None:
        """Extend the leases of what is on its way: a slow broker must not see it twice."""
        now = time.monotonic()
        if now < self._extend_at:
            return
        rows = [row for batch in self._on_their_way for row in batch.rows]
        self.store.extend(rows, self.lease)
        self._extend_at = now + self.lease / 3
        for batch in self._on_their_way:
            batch.until = now + self.lease / 2

    def _finish(self) -> None:
        """Wait for what is on its way, as long as there is time, and give back the rest."""
        try:
            while self._take_in() is not None:
                pass
            while self._on_their_way:
                self._incomplete = True
                fates = self._on_their_way.popleft().abandon()
                self._count(fates)
                self._owed.add(fates)
            write_fates(self.store, self._owed)
        except DatabaseError as error:
            self._incomplete = True
            logger.warning(
                "the database is away at the end; what was claimed is due again within %.0f s: %s",
                self.lease,
                reason_of(error),
            )

    def _count(self, fates: RowFates) -> None:
        counts = self._counts
        counts["published"] += len(fates.done) - fates.parked
        counts["parked"] += fates.parked
        counts["released"] += len(fates.left) + len(fates.refused)
        counts["buried"] += len(fates.rejected)

    def _confirmed(self) -> int:
        return self._counts["published"] + self._counts["parked"]

    def _disconnect(self) -> None:
        if self._owns_engine:
            self.store.engine.dispose()
