"""Log lines that a log handler may publish as events."""

from __future__ import annotations

import logging
import threading

__all__ = ["here", "log"]


class _Here(threading.local):
    """What this thread does.

    Attributes:
        logging: whether it is inside a line of ``log``.
    """

    logging = False


here = _Here()


def log(logger: logging.Logger, level: int, message: str, *arguments: object) -> None:
    """Log ``message``, unless this thread is inside such a line.

    A log handler that publishes each line as an event may itself cause lines about that event,
    which it would publish in turn, without end.
    """
    if here.logging:
        return
    here.logging = True
    try:
        logger.log(level, message, *arguments, stacklevel=2)
    finally:
        here.logging = False
