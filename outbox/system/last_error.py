"""The last error that outbox has logged, for reports on this process."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

__all__ = ["LastError", "Noted"]

_LONGEST_TEXT = 300


class Noted(NamedTuple):
    """An error that was logged.

    Attributes:
        at: when, in seconds of Unix time.
        since: the same by ``time.monotonic()``.
        logger: the name of the logger.
        raised: the name of the exception's class; None without an exception.
        text: the first line of the message, cut.
    """

    at: float
    since: float
    logger: str
    raised: str | None
    text: str


class LastError(logging.Handler):
    """Remembers the last error of the loggers that it is added to; all of outbox's by ``listen``.

    Attributes:
        found: the error; None before the first one. Any thread may read it.
    """

    def __init__(self) -> None:
        """Remember nothing yet."""
        super().__init__(logging.ERROR)
        self.found: Noted | None = None

    def listen(self) -> None:
        """Listen to all loggers of outbox, until ``end``."""
        logging.getLogger("outbox").addHandler(self)

    def end(self) -> None:
        """Listen no more."""
        logging.getLogger("outbox").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Remember the error."""
        raised = record.exc_info[0] if record.exc_info else None
        try:
            text = record.getMessage().partition("\n")[0][:_LONGEST_TEXT]
        except Exception:  # arguments that don't fit the message: logging reports them
            text = str(record.msg)[:_LONGEST_TEXT]
        name = None if raised is None else raised.__name__
        self.found = Noted(record.created, time.monotonic(), record.name, name, text)
