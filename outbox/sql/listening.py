"""PostgreSQL's LISTEN: hints that there is something to do."""

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

_AGAIN = (0.5, 30.0)  # seconds between two tries to listen
_STOPPED = 0.5  # seconds within which it ends


def can_listen(engine: Engine) -> bool:
    """Return whether ``engine`` has notifications: PostgreSQL's with psycopg."""
    return engine.driver == "psycopg"


def listen(engine: Engine, wake: Callable[[], None], stopping: threading.Event) -> None:
    """Call ``wake`` at every hint until ``stopping`` is set, on a connection of its own.

    It is a hint and nothing more: what goes wrong is tried again, and costs the time between two
    looks.
    """
    pause = _AGAIN[0]
    while not stopping.is_set():
        try:
            with contextlib.closing(engine.raw_connection()) as connection:
                driver: Any = connection.driver_connection
                connection.detach()  # out of the pool: it listens until it is closed
                driver.autocommit = True
                driver.execute(f"LISTEN {CHANNEL}")
                pause = _AGAIN[0]
                wake()  # what was told before it listened
                while not stopping.is_set():
                    for _ in driver.notifies(timeout=_STOPPED, stop_after=1):
                        wake()
        except Exception as error:
            # Once in a row: in a pooler's transaction mode it stays like that.
            level = logging.WARNING if pause == _AGAIN[0] else logging.DEBUG
            logger.log(level, "no hints for now, looking every 2 s: %s", error)
            stopping.wait(pause)
            pause = min(2 * pause, _AGAIN[1])
