"""What a transport knows of its own tables, for events that the application stores there itself.

Nothing is read in the application's transaction: its snapshot may be older than a queue, reading
may make it fail at its commit, and a statement that fails would take its work along. So a copy of
the bindings is read on the transport's connection, and an event that it doesn't lead to one queue
is routed after the commit.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import Pool

from outbox.errors import BrokerError
from outbox.event import Event
from outbox.messages.rows import UNROUTED
from outbox.storage.failures import reason_of
from outbox.transports.database.database import Database
from outbox.transports.database.routing import Routes

__all__ = ["OwnTables"]

logger = logging.getLogger("outbox.sql")

_PATIENCE = 2.0
"""The longest wait in seconds for the answer whether an engine writes to these tables."""

_ASK_AGAIN = 5.0
"""The seconds until that is asked again, if it couldn't be found out."""

_REFRESH, _OUTDATED = 0.5, 1.0
"""The age in seconds at which the copy of the bindings is read again, and from which it isn't used.
A queue may miss events that are stored in its first second, as with any broker."""

_KEEP = 10.0
"""The seconds since its last use for which the copy is read again by itself."""

_ELSEWHERE = (
    "events stored with %r are in other tables than the queues of %s: this process publishes them "
    "after their commit, and what it leaves only `outbox relay` does"
)
_UNKNOWN = (
    "cannot find out whether events stored with %r are in the same tables as the queues of %s, so "
    "this process routes them after their commit, and what it leaves a worker of that database "
    "does, or `outbox relay`: %s"
)


class OwnTables:
    """Decides where an event waits that the application stores through an engine. Thread-safe.

    Its questions are answered by the transport's thread: the methods below the line run there.
    """

    def __init__(self, database: Database, ask: Callable[[Callable[[], object]], bool]) -> None:
        """Know nothing yet.

        Args:
            database: the transport's.
            ask: has a function called soon on the transport's thread; returns False where that
                can't be waited for.
        """
        self._database = database
        self._ask = ask
        self._answers: weakref.WeakKeyDictionary[Pool, dict[str, _Answer]]
        self._answers = weakref.WeakKeyDictionary()
        self._copy: tuple[Routes, float] | None = None
        self._used_at = self._asked_at = self._tried_at = 0.0
        self._warned = False

    def queue_for(self, event: Event, engine: Engine, options: Mapping[str, Any]) -> str:
        """Return the queue of the row for ``event``; ``""``, the relay's, if that is elsewhere.

        The first time for an engine, this waits until its database has answered, at most 2 s. While
        the answer isn't known, it is most likely that the tables are the same: whatever is found
        there as ``UNROUTED`` is routed by workers if they are, and published by relays if not.

        Args:
            event: the event.
            engine: the engine that stores it.
            options: what its connection's execution options add to the engine's.
        """
        answers = self._answers.setdefault(engine.pool, {})
        schemas = repr(
            options.get("schema_translate_map")
            or engine.get_execution_options().get("schema_translate_map")
        )
        answer = answers.get(schemas)
        if answer is None or answer.is_outdated():
            answer = answers[schemas] = _Answer()
            question = functools.partial(self._find_out, weakref.ref(engine), options, answer)
            if not self._ask(question):
                answer.give(is_here=None)
        answer.wait()
        if answer.is_here is None:
            return UNROUTED
        return self._queue_of(event) if answer.is_here else ""

    def _queue_of(self, event: Event) -> str:
        routes, read_at = self._copy or (None, 0.0)
        if routes is None:
            return UNROUTED
        self._used_at = now = time.monotonic()
        if now > read_at + _REFRESH and now > self._asked_at + _REFRESH:
            self._asked_at = now
            self._ask(self.refresh)
        if now > read_at + _OUTDATED:
            return UNROUTED
        queues = routes.queues(event.exchange, event.target)
        return queues[0] if len(queues) == 1 else UNROUTED

    # ------------------------------------------------------------------ on the transport's thread

    def refresh_in(self) -> float | None:
        """Return the seconds until :meth:`refresh` is due; None if it isn't."""
        if self._copy is None or time.monotonic() > self._used_at + _KEEP:
            return None
        return self._tried_at + _REFRESH - time.monotonic()

    def refresh(self) -> None:
        """Read the bindings again, if the database can be used now."""
        self._tried_at = time.monotonic()
        with contextlib.suppress(BrokerError):
            bindings = self._database.bindings()
            if bindings is not None:
                routes = Routes()  # another one each time, since callers look into it meanwhile
                routes.update(bindings)
                self._copy = routes, self._tried_at

    def _find_out(
        self, question: weakref.ref[Engine], options: Mapping[str, Any], answer: _Answer
    ) -> None:
        engine = question()
        is_here: bool | None = None
        try:
            if engine is not None:
                is_here = self._database.holds(engine, options)
                self.refresh()
                if not is_here:
                    self._warn(_ELSEWHERE, engine, self._database.name)
        except Exception as error:
            self._warn(_UNKNOWN, engine, self._database.name, reason_of(error))
        finally:
            answer.give(is_here=is_here)

    def _warn(self, message: str, *arguments: object) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(message, *arguments)


class _Answer:
    """Whether an engine writes to the transport's tables.

    Attributes:
        is_here: the answer; None while it isn't known.
    """

    def __init__(self) -> None:
        self.is_here: bool | None = None
        self._asked_at = time.monotonic()
        self._is_given = False
        self._giving = _thread.allocate_lock()
        self._giving.acquire()

    def is_outdated(self) -> bool:
        """Return whether to ask again."""
        return self.is_here is None and time.monotonic() > self._asked_at + _ASK_AGAIN

    def wait(self) -> None:
        """Wait for the answer, or that none can be given now: at most 2 s from the question on."""
        if not self._is_given:
            timeout = max(0.0, self._asked_at + _PATIENCE - time.monotonic())
            if self._giving.acquire(timeout=timeout):
                self._giving.release()

    def give(self, *, is_here: bool | None) -> None:
        """Note the answer; once only."""
        self.is_here = is_here
        self._is_given = True
        self._giving.release()
