"""The log of ``outbox-consume``: every line about a message carries the message's id.

A library must not configure logging for its user: only :func:`set_up` does so, and only the command
calls it. If you configure logging yourself, add :class:`MessageFilter` to your handlers.
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
from outbox.messages.received_event import ReceivedEvent

__all__ = ["FORMATS", "JSONFormatter", "MessageFilter", "TextFormatter", "set_up"]

_CARRIED = ("message_id", "queue", "task", "attempt", "duration")
_STANDARD = {
    *vars(logging.LogRecord("", 0, "", 0, "", None, None)),
    *("message", "asctime", "taskName", "outbox_message", "of_message", *_CARRIED),
}


class MessageFilter(logging.Filter):
    """A filter that adds ``message_id``, ``queue`` and ``attempt`` of the message to every record.

    And ``task``: the name of the task that the message calls, if it does. The record of a message's
    end also gets ``duration``, in seconds. Every record passes. Add the filter to a handler: a
    logger's filters don't see the records of the loggers below it. It must be the handler that runs
    in the thread that logs: a ``QueueHandler``, not the handlers behind its listener. Without a
    message the values are ``""``, 0 and 0.0, so that a format can name them; attributes that a
    record already has are kept. Ids come from outside: control characters in them are escaped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete ``record``; return True."""
        values = getattr(record, "outbox_message", None)
        if values is None:
            event = current_message()
            values = _NONE if event is None else _described(event)
        else:
            values = {**_NONE, **values}
        for name, value in values.items():
            record.__dict__.setdefault(name, value)
        if not (isinstance(record.message_id, str) and record.message_id.isprintable()):  # type: ignore[attr-defined]
            record.message_id = repr(record.message_id).strip("'\"")  # type: ignore[attr-defined]
        return True


_NONE: dict[str, Any] = {
    "message_id": "",
    "queue": "",
    "task": "",
    "attempt": 0,
    "duration": 0.0,
}


def _described(event: ReceivedEvent) -> dict[str, Any]:
    return {
        **_NONE,
        "message_id": event.id,
        "queue": event.queue,
        "task": event.task[:255],
        "attempt": event.attempt,
    }


class TextFormatter(logging.Formatter):
    """A line of text: time, level, process, logger, the message's id in brackets, what happened."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s %(levelname)s %(process)d %(name)s:%(of_message)s %(message)s"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, with the id in brackets unless the worker's text has it already."""
        message_id = getattr(record, "message_id", "")
        is_in_text = not message_id or hasattr(record, "outbox_message")
        record.__dict__["of_message"] = "" if is_in_text else f" [{message_id}]"
        return super().formatMessage(record)


class JSONFormatter(logging.Formatter):
    """One JSON object per line, in ASCII.

    Its keys are ``time`` (ISO 8601, UTC, to the microsecond), ``level``, ``logger``, ``process``
    and ``message``; for a message of a queue, ``message_id``, ``queue``, ``attempt``, and ``task``
    if it calls one; in the line about its end, ``duration`` in seconds; with an exception,
    ``exc_info``, the traceback as text. What the application logs as ``extra`` is added; a name
    that is taken becomes ``extra_<name>``, and a value that JSON doesn't have is written as text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as a line."""
        values: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        for name in _CARRIED:
            value = getattr(record, name, None)
            if value:
                values[name] = round(value, 6) if isinstance(value, float) else value
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            values["exc_info"] = record.exc_text
        if record.stack_info:
            values["stack_info"] = self.formatStack(record.stack_info)
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                values[f"extra_{name}" if name in values else name] = _plain(value)
        return json.dumps(values, ensure_ascii=True, default=str)


FORMATS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JSONFormatter}
"""The formatters, by the value of ``--log-format``."""


def enable() -> bool:
    """Enable outbox's loggers again if ``logging.config`` has disabled them; return whether it has.

    ``dictConfig`` and ``fileConfig`` disable all loggers that exist already, unless they are given
    ``disable_existing_loggers=False``: dead letters would pile up unseen.
    """
    disabled = disabled_loggers()
    for logger in disabled:
        logger.disabled = False
    return bool(disabled)


def disabled_loggers() -> list[logging.Logger]:
    """Return outbox's loggers that are disabled."""
    loggers = list(logging.root.manager.loggerDict.items())
    return [
        logger
        for name, logger in loggers
        if (name + ".").startswith("outbox.")
        and isinstance(logger, logging.Logger)
        and logger.disabled
    ]


def set_up(level: str, form: str) -> None:
    """Log to standard error, from ``level`` up, in one of :data:`FORMATS`.

    In JSON, warnings and uncaught exceptions become lines of the log, too.
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
        "uncaught %s; exiting", kind.__qualname__, exc_info=(kind, error, traceback)
    )


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = "" if args.thread is None else args.thread.name
        logging.getLogger("outbox.consumer").critical(
            "uncaught %s in thread %r", args.exc_type.__qualname__, name, exc_info=args.exc_value
        )


def _plain(value: object) -> object:
    """Return a value of the application in a form that certainly can be written."""
    try:
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except Exception:  # such as a cycle, NaN, keys that are tuples, or a __str__ that raises
        try:
            return repr(value)
        except Exception as why:
            return f"(unavailable: {type(why).__qualname__})"


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
