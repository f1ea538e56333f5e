"""The log of ``outbox-consume``: every line that belongs to a message carries the message's id.

A library never configures logging for its user: nothing here does so but :func:`set_up`, which the
command calls. Whoever has a configuration of logging of their own puts :class:`MessageFilter` on
its handlers.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import threading
from types import TracebackType
from typing import Any

from outbox.consumers.current import current_message
from outbox.consumers.received_event import ReceivedEvent

__all__ = ["FORMATS", "JSONFormatter", "MessageFilter", "TextFormatter", "set_up"]

_CARRIED = ("message_id", "queue", "attempt", "duration")


class MessageFilter(logging.Filter):
    """Gives every record ``message_id``, ``queue`` and ``attempt`` of the message it belongs to.

    And ``duration``, in seconds, where the record tells the end of a message. It lets every record
    pass. Put it on a handler: a logger's filters do not see what comes from the loggers below it.
    And on the handler that is called in the thread that logs: on a ``QueueHandler``, rather than on
    those that its listener feeds. Without a message they are ``""``, ``""``, 0 and 0.0, so that a
    format can name them; what a record has already is left alone. Ids come from outside: control
    characters in them are escaped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete ``record``; return True."""
        own = getattr(record, "outbox_message", None)
        if own is None:
            event = current_message()
            own = _NONE if event is None else _described(event)
        for name, value in own.items():
            record.__dict__.setdefault(name, value)
        if not (isinstance(record.message_id, str) and record.message_id.isprintable()):  # type: ignore[attr-defined]
            record.message_id = repr(record.message_id).strip("'\"")  # type: ignore[attr-defined]
        return True


_NONE: dict[str, Any] = {"message_id": "", "queue": "", "attempt": 0, "duration": 0.0}


def _described(event: ReceivedEvent) -> dict[str, Any]:
    return {**_NONE, "message_id": event.id, "queue": event.queue, "attempt": event.attempt}


class TextFormatter(logging.Formatter):
    """A line of text: time, level, process, logger, the message's id in brackets, what happened."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s %(levelname)s %(process)d %(name)s:%(of_message)s %(message)s"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line; those of the worker itself tell the id anyway."""
        message_id = getattr(record, "message_id", "")
        told = not message_id or hasattr(record, "outbox_message")
        record.__dict__["of_message"] = "" if told else f" [{message_id}]"
        return super().formatMessage(record)


class JSONFormatter(logging.Formatter):
    """An object of JSON a line, in ASCII.

    ``time`` (ISO 8601, UTC, to the microsecond), ``level``, ``logger``, ``process`` and
    ``message``; where there is a message of a queue, ``message_id``, ``queue`` and ``attempt``; in
    the line that tells its end, ``duration`` in seconds; with an exception, ``exc_info``, the
    traceback as text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as a line."""
        found: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        for name in _CARRIED:
            value = getattr(record, name, None)
            if value:
                found[name] = round(value, 6) if isinstance(value, float) else value
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            found["exc_info"] = record.exc_text
        if record.stack_info:
            found["stack_info"] = self.formatStack(record.stack_info)
        return json.dumps(found, ensure_ascii=True, default=str)


FORMATS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JSONFormatter}
"""What ``--log-format`` may be."""


def set_up(level: str, form: str) -> None:
    """Have the process log to standard error, from ``level`` on, in one of :data:`FORMATS`.

    In JSON, warnings and exceptions that nobody catches become lines of the log, too.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATS[form]())
    handler.addFilter(MessageFilter())
    logging.basicConfig(level=level, handlers=[handler])
    if form == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("outbox.consumer").critical(
        "the process ends: %s", kind.__qualname__, exc_info=(kind, error, traceback)
    )


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = "" if args.thread is None else args.thread.name
        logging.getLogger("outbox.consumer").critical(
            "the thread %r ends: %s", name, args.exc_type.__qualname__, exc_info=args.exc_value
        )


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
