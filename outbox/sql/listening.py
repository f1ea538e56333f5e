"""PostgreSQL's LISTEN: hints that there are rows to publish."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from outbox.sql.handover import CHANNEL
from outbox.storage.transactions import own_transaction

__all__ = ["can_listen", "listen"]

logger = logging.getLogger("outbox.relay")

_RETRY = (0.5, 30.0)  # seconds between two attempts to listen: the first time, and at most
_POLL = 0.5  # seconds between two looks at the stop request
_PROBE = 5.0  # seconds until a notification to oneself counts as lost


class _NotNotified(Exception):
    """LISTEN was accepted, but notifications don't arrive."""


def can_listen(engine: Engine) -> bool:
    """Return whether ``engine`` supports notifications: PostgreSQL with psycopg."""
    return engine.driver == "psycopg"


def listen(engine: Engine, wake: Callable[[], None], stopping: threading.Event) -> None:
    """Call ``wake`` at every notification until ``stopping`` is set, on a separate connection.

    A notification is only a hint: if listening fails, it is retried, and rows wait for the next
    poll.
    """
    pause = _RETRY[0]
    while not stopping.is_set():
        try:
            with contextlib.closing(engine.raw_connection()) as connection:
                driver: Any = connection.driver_connection
                connection.detach()  # from the pool: it listens until it is closed
                driver.autocommit = True
                _probe(engine, driver, stopping)
                driver.execute(f"LISTEN {CHANNEL}")
                pause = _RETRY[0]
                wake()  # for notifications sent before LISTEN took effect
                while not stopping.is_set():
                    for _ in driver.notifies(timeout=_POLL, stop_after=1):
                        wake()
        except Exception as error:
            # Warn once: with a pooler in transaction mode LISTEN never works.
            level = logging.WARNING if pause == _RETRY[0] else logging.DEBUG
            logger.log(level, "LISTEN failed; polling every 2 s: %s", error)
            stopping.wait(pause)
            pause = min(2 * pause, _RETRY[1])


def _probe(engine: Engine, driver: Any, stopping: threading.Event) -> None:
    """Check that a notification reaches ``driver``, by sending one on another connection.

    A pooler in transaction mode accepts LISTEN, but on a connection to the server that it lends to
    others afterwards.

    Raises:
        _NotNotified: it doesn't arrive.
    """
    channel = f"outbox_probe_{uuid.uuid4().hex}"
    driver.execute(f"LISTEN {channel}")
    with own_transaction(engine) as connection:
        connection.exec_driver_sql(f"NOTIFY {channel}")
    deadline = time.monotonic() + _PROBE
    while not stopping.is_set():
        # As a list: while the generator runs, the connection is locked.
        if list(driver.notifies(timeout=_POLL, stop_after=1)):
            driver.execute(f"UNLISTEN {channel}")
            return
        if time.monotonic() > deadline:
            raise _NotNotified(
                "notifications do not arrive, as behind a pooler in transaction mode; use a URL "
                "that leads to PostgreSQL itself, or do without --listen"
            )
