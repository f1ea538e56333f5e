"""PostgreSQL's LISTEN: hints that there are rows to publish."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from outbox.sql.handover import CHANNEL

__all__ = ["can_listen", "listen"]

logger = logging.getLogger("outbox.relay")

_RETRY = (0.5, 30.0)  # seconds between two attempts to listen: the first time, and at most
_POLL = 0.5  # seconds between two looks at the stop request


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
