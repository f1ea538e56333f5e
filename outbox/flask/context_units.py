"""Application contexts outside of requests, each a unit of work.

``with app.app_context()`` in a script, a job or a thread, and each ``flask`` command: what is
collected in it is published when it ends, and dropped if it ends with an exception. Inside a
request, a block, a message or another context it belongs to that.
"""

from __future__ import annotations

import logging
import sys
import weakref
from contextvars import Token
from typing import NamedTuple

import click
from flask import Flask, appcontext_pushed
from flask.globals import app_ctx

from outbox.backlog.notifier import ids
from outbox.middleware.request_collector import RequestCollector
from outbox.system import process
from outbox.unit_of_work.unit_of_work import Buffer, Scope

__all__ = ["watch"]

logger = logging.getLogger("outbox.flask")

_KEY = "_outbox_unit"


class _Opened(NamedTuple):
    unit: RequestCollector  # a scope refers to it only weakly
    token: Token[Scope | None]
    error: BaseException | None  # that was being handled when the context was pushed


def watch(app: Flask) -> None:
    """Make each context of ``app`` that isn't inside another unit of work a unit of work."""
    appcontext_pushed.connect(_begin, app)
    app.teardown_appcontext(_end)


def _begin(_: Flask, **__: object) -> None:
    outer = Scope.around()
    if outer is not None:
        unit = outer.buffer.unit
        if unit.pid == process.pid and (unit.publishes_itself or unit.is_of_message):
            return
    collector = RequestCollector(None, True)
    collector.autoflush = _is_shell()
    weakref.finalize(collector, _log_lost, collector._buffer)
    token = Scope.enter(collector, collector._buffer)
    # Not in `g`: an application may iterate over that, or have a class for it.
    setattr(app_ctx, _KEY, _Opened(collector, token, sys.exc_info()[1]))


def _end(error: BaseException | None) -> None:
    opened: _Opened | None = getattr(app_ctx, _KEY, None)
    if opened is None:
        return
    delattr(app_ctx, _KEY)
    unit = opened.unit
    unit.refuse()
    Scope.leave(opened.token)
    if error is None:
        # Before 8.2, click doesn't pass the exception on. It is the one that is being handled,
        # unless that was so when the context began.
        present = sys.exc_info()[1]
        error = None if present is opened.error else present
    if error is None or (isinstance(error, click.exceptions.Exit) and not error.exit_code):
        unit.publish_quietly()
    else:
        unit.discard(f"their app context ended with {type(error).__qualname__}")
    unit.close()


def _is_shell() -> bool:
    """Return whether ``flask shell`` has pushed the context: a console publishes at once."""
    command = click.get_current_context(silent=True)
    return command is not None and command.info_name == "shell"


def _log_lost(buffer: Buffer) -> None:
    """Log what is lost with a context that is never popped."""
    lost = buffer.close()
    if lost and buffer.unit.pid == process.pid and buffer.unit.observer is None:
        logger.error(
            "%d event(s) lost: their app context was pushed and never popped; use "
            "`with app.app_context():`, or call publish(): %s",
            len(lost),
            ids(lost),
        )
