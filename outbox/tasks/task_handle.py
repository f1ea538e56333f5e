"""The handle of a task that was called: what is known of it here."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

from outbox import configuration
from outbox.errors import NoResults, UsageError
from outbox.event import Event
from outbox.tasks import task_rows
from outbox.unit_of_work.unit_of_work import Buffer

__all__ = ["TaskHandle"]

R = TypeVar("R")

_REMEMBERED = 10_000
"""Dropped events of a unit of work that handles know of."""


class TaskHandle(Generic[R]):
    """The handle of a task, by its id.

    ``later()`` returns one that knows the unit of work of the call; ``TaskHandle(id)`` makes one
    that looks at the queues of the process's default publisher. Thread-safe; a copy that travels
    to another process knows the id alone.

    Attributes:
        id: the id of the task's event.
    """

    __slots__ = ("_buffer", "_engine", "_event", "id")

    def __init__(
        self,
        id: str,
        _event: Event | None = None,
        _buffer: Buffer | None = None,
        _engine: Any = None,
    ) -> None:
        """Make a handle of the task with this id, which need not exist."""
        self.id = str(id)
        self._event = _event
        self._buffer = _buffer
        self._engine = _engine
        if _buffer is not None and _buffer.unit.dropped is None:
            _buffer.unit.dropped = deque(maxlen=_REMEMBERED)

    def __reduce__(self) -> tuple[type[TaskHandle[Any]], tuple[str]]:
        return TaskHandle, (self.id,)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskHandle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def status(self) -> str:
        """What is known of the task here.

        - ``"collected"``: it waits in the open unit of work of the call;
        - ``"dropped"``: its unit of work failed, or it was cancelled there: it will not run;
        - ``"waiting"``: its row is in a database, and no worker has it: with an SQLite file as the
          broker, or stored until it is due;
        - ``"unknown"``: all else. It waits in RabbitMQ, a worker has it, it is done, or it was
          never committed.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database can't be read.
        """
        if self._was_dropped():
            return "dropped"
        if self._place() is not None:
            return "collected"
        engine = self._engine_to_ask()
        if engine is not None and task_rows.waits(engine, self.id):
            return "waiting"
        return "unknown"

    def cancel(self) -> bool:
        """Cancel the task, unless a worker has it; return True if it will not run.

        A collected task is taken out of its unit of work. A row that no worker has is deleted, also
        between two attempts. A task that runs is not interrupted.

        Raises:
            NoResults: it is, or may be, in RabbitMQ, where nothing can be taken out of a queue.
            sqlalchemy.exc.SQLAlchemyError: the database can't be written.
        """
        if self._was_dropped():
            return True
        buffer, event = self._place(), self._event
        if buffer is not None and event is not None and buffer.remove(event):
            task_rows.note_dropped(buffer.unit, event)
            return True
        engine = self._engine_to_ask()
        if engine is None:
            raise NoResults(
                f"the task {self.id!r} can't be cancelled any more: a broker's queue gives nothing "
                "back, and no database is configured that workers would ask"
            )
        return task_rows.delete(engine, self.id)

    def result(self, timeout: float | None = None) -> R:
        """Return what the task has returned.

        Raises:
            UsageError: its unit of work has not ended, so that waiting would last for ever; or an
                event loop runs here.
            NoResults: nothing keeps results.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise UsageError("result() would block the event loop; await result_async()")
        return self._result()

    async def result_async(self, timeout: float | None = None) -> R:  # noqa: ASYNC109
        """Await what the task has returned; see :meth:`result`."""
        return self._result()

    def _result(self) -> R:
        if self._was_dropped():
            raise UsageError(
                f"the task {self.id!r} was dropped with its unit of work, and will not run"
            )
        if self._place() is not None:
            raise UsageError(
                f"the task {self.id!r} waits in its unit of work, which has not ended; publish() "
                "first, or end the block"
            )
        raise NoResults(
            f"the result of the task {self.id!r} is not kept: no database for results is "
            "configured; let the task write what it has found, or enqueue an event with it"
        )

    def _was_dropped(self) -> bool:
        buffer = self._buffer
        return buffer is not None and self.id in (buffer.unit.dropped or ())

    def _place(self) -> Buffer | None:
        """Return the buffer in which the event waits, or None."""
        buffer, event = self._buffer, self._event
        while buffer is not None and event is not None:
            if any(each is event for each in list(buffer.events)):
                return buffer
            buffer = buffer.parent
        return None

    def _engine_to_ask(self) -> Any:
        """Return the engine of the database in which its row may be, or None."""
        if self._engine is not None:
            return self._engine
        publisher = configuration.publisher_if_any()
        return None if publisher is None else task_rows.engine_of(publisher.settings)
