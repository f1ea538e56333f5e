"""The ticker of a database: a thread that looks when something is due."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence

from sqlalchemy import Connection

from outbox.errors import BrokerError, ConnectionLost, UsageError
from outbox.messages.delivery import dead_letter_queue
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.storage import tick_statements
from outbox.system.background_thread import BackgroundThread
from outbox.system.backoff import backoff
from outbox.transports.database import routing
from outbox.transports.database.kinds import database_at
from outbox.transports.database.recurring.tick_round import TickRound, leave
from outbox.transports.outages import outages
from outbox.url import BrokerURL

__all__ = ["DatabaseTicker"]

logger = logging.getLogger("outbox.ticks")

_LONGEST_PAUSE = 2.0
"""The longest back-off in seconds: short, because other workers may not reach the database."""

_CLOSE_TIMEOUT = 3.0


class DatabaseTicker:
    """Ticks for its tasks in competition with other workers. Its methods are thread-safe."""

    def __init__(self, url: BrokerURL, settings: Settings, tasks: Sequence[RecurringTask]) -> None:
        """Create a ticker, without connecting yet.

        Raises:
            UsageError: the URL is invalid.
        """
        self._settings = settings
        self._tasks = tasks
        self._is_prepared = False
        self._stopping = False
        self._failures = 0
        self._database = database_at(url, lambda: self._stopping, self._on_reopened)
        self._wake = threading.Event()
        self._thread = BackgroundThread(lambda: None, self._run, name="outbox-ticks")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start_now()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        if not self._thread.cancel():
            self._wake.set()
            self._thread.join(_CLOSE_TIMEOUT)

    # ------------------------------------------------------------------------ on its own thread

    def _run(self) -> None:
        while not self._stopping:
            pause = self._turn()
            with self._thread.pause:
                self._wake.wait(pause)
        with contextlib.suppress(BrokerError, UsageError):
            if self._is_prepared and not self._failures:
                self._database.run(lambda connection: leave(connection, self._tasks))
        outages.left(self._database.address, self)
        self._database.end()

    def _turn(self) -> float:
        """Look once; return the seconds until the next look."""
        try:
            look = self._database.run(self._look)
        except (BrokerError, UsageError) as error:
            return self._on_failure(error)
        except Exception as error:  # a bug in outbox must not end the thread
            logger.exception("unexpected error with %s; retrying", self._database.name)
            return self._on_failure(ConnectionLost(str(error)))
        if self._failures:
            self._failures = 0
            outages.ended(self._database.address)
        self._is_prepared = True
        if look.has_published:
            self._database.published({task.queue for task in self._tasks})
        for level, message, arguments in look.to_log:  # not before: a log handler may publish
            logger.log(level, message, *arguments)
        return look.pause

    def _look(self, connection: Connection) -> TickRound:
        if not self._is_prepared:
            self._prepare(connection)
        look = TickRound(self._database.store, self._tasks)
        look.run(connection)
        return look

    def _prepare(self, connection: Connection) -> None:
        tick_statements.check(connection)
        if self._settings.declare == "create":
            names = [
                name
                for queue in {task.queue for task in self._tasks}
                for name in (queue, dead_letter_queue(queue))
            ]
            routing.add(connection, [routing.of_queue(name) for name in names])

    def _on_reopened(self, is_another: bool) -> None:
        self._is_prepared &= not is_another

    def _on_failure(self, error: BrokerError | UsageError) -> float:
        address = self._database.address
        pause = min(_LONGEST_PAUSE, backoff(self._failures))
        self._failures += 1
        text = outages.failed(address, address, str(error), self, None)
        level = logging.WARNING if text else logging.DEBUG
        logger.log(level, "cannot run recurring tasks: %s; retrying", text or error)
        return pause
