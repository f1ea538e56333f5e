"""Log lines that a log handler may publish as events."""

from __future__ import annotations

import logging
import threading

__all__ = ["is_logging", "log"]

_here = threading.local()


def log(logger: logging.Logger, level: int, message: str, *arguments: object) -> None:
    """Log ``message``, unless this thread is inside such a line.

    A log handler that publishes each line as an event may itself cause lines about that event,
    which it would publish in turn, without end.
    """
    if is_logging():
        return
    _here.logging = True
    try:
        logger.log(level, message, *arguments, stacklevel=2)
    finally:
        _here.logging = False


def is_logging() -> bool:
    """Return whether this thread is inside a line of ``log``."""
    return getattr(_here, "logging", False)
