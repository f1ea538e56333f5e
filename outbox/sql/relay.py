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
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from outbox.configuration import default_publisher
from outbox.errors import Nacked, UsageError
from outbox.publisher import Publisher
from outbox.report import PublishReport
from outbox.sql.engines import open_engine
from outbox.sql.failures import DatabaseError, reason_of
from outbox.sql.handover import CHANNEL
from outbox.sql.store import Claimed, Store
from outbox.sql.waves import Outcome, publish_in_waves, sort_out

__all__ = ["Relay", "RelayStats"]

logger = logging.getLogger("outbox.relay")

_IN_FLIGHT = 3  # batches: one is claimed, one on its way, one being confirmed
_IDLE = (0.02, 2.0)  # seconds between two looks, when there was nothing
_CONNECTING = 0.05  # seconds between two looks whether the broker is there
_AWAY = (0.5, 30.0)  # seconds between two tries while the database is away
_NACKED = (1.0, 60.0)  # seconds until a refused event is tried again


@dataclass(frozen=True, slots=True)
class RelayStats:
    """What a relay has counted since it was made.

    Attributes:
        claimed: rows.
        published: rows that the broker has confirmed, in a queue or among the parked, or that were
            to be ignored where no queue was bound for them.
        released: rows that were given back: the broker was away, or refused them for the moment.
        buried: rows that can never be published.
        batches: claims that found something.
    """

    claimed: int = 0
    published: int = 0
    released: int = 0
    buried: int = 0
    batches: int = 0


@dataclass(slots=True)
class _Batch:
    rows: list[Claimed]
    report: Future[PublishReport]


class Relay:
    """Moves stored events from one database to one broker, until it is stopped.

    Any number may run side by side, in any number of processes. ``start``, ``stop`` and ``wait``
    may be called from any thread; ``run_once`` instead of ``start``.
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
        if lease is not None and lease <= 0:
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
        self._counts = dict.fromkeys(("claimed", "published", "released", "buried", "batches"), 0)
        self._on_their_way: deque[_Batch] = deque()
        self._confirmed: list[Claimed] = []  # and not deleted yet: the database was away
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._deadline = 0.0

    def stats(self) -> RelayStats:
        """Return what has been counted so far."""
        return RelayStats(**self._counts)

    def start(self) -> None:
        """Begin to relay, in the background.

        Raises:
            UsageError: the table is missing, or not as it should be.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be reached.
        """
        try:
            self.store.check()
        except BaseException:
            self._disconnect()
            raise
        self._threads = [threading.Thread(target=self._run, name="outbox-relay", daemon=True)]
        if self.listen and self.store.engine.driver == "psycopg":
            self._threads.append(
                threading.Thread(target=self._listen, name="outbox-relay-listen", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the relay is asked to stop, at most ``timeout`` seconds; return whether so."""
        return self._stopping.wait(timeout)

    def stop(self, timeout: float = 10.0) -> bool:
        """Claim no more, and wait for the confirms of what is on its way.

        Args:
            timeout: seconds for that. What is not confirmed then is given back.

        Returns:
            Whether all was confirmed.
        """
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout + 5)
        self._disconnect()
        return not self._on_their_way and not any(one.is_alive() for one in self._threads)

    def run_once(self) -> int:
        """Publish what is due now, and return how many events the broker has confirmed.

        What the broker or the database does not take is left as it is.

        Raises:
            UsageError: the table is missing, or not as it should be.
            BrokerError: the broker is away.
            sqlalchemy.exc.SQLAlchemyError: the database is away.
        """
        self.store.check()
        before = self._counts["published"]
        while True:
            found = self._fill()
            outcome = self._settle_next()
            if outcome is not None and outcome.error and not isinstance(outcome.error, Nacked):
                while self._on_their_way:
                    self._settle_next()
                raise outcome.error
            if not found and outcome is None:
                return self._counts["published"] - before

    def _run(self) -> None:
        idle, away = _IDLE[0], _AWAY[0]
        said = False
        with contextlib.suppress(UsageError):
            self.publisher.make_ready()
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if not self.publisher.connected and not self._on_their_way:
                    self._wake.wait(_CONNECTING)  # nothing is claimed that could not be sent
                    continue
                found = self._fill()
                busy = self._settle_next() is not None
                if said:
                    logger.info("the database is back")
                said, away = False, _AWAY[0]
            except DatabaseError as error:
                if not said:
                    logger.warning("the database is away, trying again: %s", reason_of(error))
                    said = True
                self._wake.wait(away * random.uniform(0.5, 1))
                away = min(2 * away, _AWAY[1])
                continue
            except Exception:  # a bug of ours must not end the relay
                logger.exception("the relay goes on after an error")
                self._wake.wait(_AWAY[0])
                continue
            if found or busy:
                idle = _IDLE[0]
            else:
                self._wake.wait(idle)
                idle = min(2 * idle, _IDLE[1])
        self._finish()

    def _fill(self) -> bool:
        """Claim batches and send them, as many as may be on their way; return whether any."""
        self._forget_confirmed()
        found = False
        while len(self._on_their_way) < _IN_FLIGHT and not self._stopping.is_set():
            rows = self.store.claim(self.batch, lease=self.lease, ordered=self.ordered)
            if not rows:
                break
            found = True
            self._counts["batches"] += 1
            self._counts["claimed"] += len(rows)
            if self.ordered:
                until = time.monotonic() + self.lease / 2
                self._settle(publish_in_waves(self.publisher, rows, until=until))
                break
            self._send(rows)
            if len(rows) < self.batch // 2:
                break
        return found

    def _send(self, rows: list[Claimed]) -> None:
        try:
            report = self.publisher.submit([row.event for row in rows], keep=False)
        except UsageError:  # the publisher is closed
            self._settle(Outcome(left=rows))
            raise
        except Exception as error:
            if len(rows) == 1:
                self._settle(Outcome(rejected=[(rows[0], f"cannot be encoded: {error!r}")]))
            else:  # the one that cannot be encoded must not hold up the others
                for row in rows:
                    self._send([row])
            return
        report.add_done_callback(lambda _: self._wake.set())
        self._on_their_way.append(_Batch(rows, report))

    def _settle_next(self) -> Outcome | None:
        """Wait for the oldest batch on its way and settle it; return None if there is none."""
        if not self._on_their_way:
            return None
        batch = self._on_their_way[0]
        while not batch.report.done():
            if self._stopping.is_set() and time.monotonic() > self._deadline:
                return None
            self._wake.wait(0.2)
            self._wake.clear()
        self._on_their_way.popleft()
        outcome = sort_out(batch.rows, batch.report.result())
        self._settle(outcome)
        return outcome

    def _settle(self, outcome: Outcome) -> None:
        counts = self._counts
        counts["published"] += len(outcome.done)
        counts["released"] += len(outcome.left)
        counts["buried"] += len(outcome.rejected)
        self._confirmed += outcome.done
        self._forget_confirmed()
        if isinstance(outcome.error, Nacked):
            by_delay: dict[float, list[Claimed]] = {}
            for row in outcome.left:
                delay = min(_NACKED[0] * 2 ** min(row.attempts, 10), _NACKED[1])
                by_delay.setdefault(delay, []).append(row)
            for delay, rows in by_delay.items():
                self.store.release(rows, delay, reason=str(outcome.error), failed=True)
        else:
            self.store.release(outcome.left)
        for reason, rows in _by_reason(outcome.rejected).items():
            logger.error("%d event(s) can never be published, %r", len(rows), reason)
            self.store.bury(rows, reason)

    def _forget_confirmed(self) -> None:
        if self._confirmed:
            self.store.complete(self._confirmed)
            self._confirmed = []

    def _finish(self) -> None:
        """Wait for what is on its way, as long as there is time, and give back the rest."""
        try:
            while self._settle_next() is not None:
                pass
            for batch in self._on_their_way:
                self.store.release(batch.rows)
            self._forget_confirmed()
        except DatabaseError as error:
            logger.warning(
                "the database is away at the end; what was claimed is due again within %.0f s: %s",
                self.lease,
                reason_of(error),
            )

    def _disconnect(self) -> None:
        if self._owns_engine:
            self.store.engine.dispose()

    def _listen(self) -> None:
        engine = create_engine(
            self.store.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        pause = _AWAY[0]
        while not self._stopping.is_set():
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql(f"LISTEN {CHANNEL}")
                    driver: Any = connection.connection.driver_connection
                    pause = _AWAY[0]
                    while not self._stopping.is_set():
                        for _ in driver.notifies(timeout=0.5, stop_after=1):
                            self._wake.set()
            except Exception as error:  # only a hint: without it the relay looks by itself
                logger.debug("not listening for now: %s", error)
                self._stopping.wait(pause)
                pause = min(2 * pause, _AWAY[1])


def _by_reason(rejected: Iterable[tuple[Claimed, str]]) -> dict[str, list[Claimed]]:
    found: dict[str, list[Claimed]] = {}
    for row, reason in rejected:
        found.setdefault(reason, []).append(row)
    return found
