"""The handle of a task that was called: what is known of it here."""

from __future__ import annotations

import datetime
import functools
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from outbox import configuration
from outbox.errors import NoResults, ResultTimeout, UsageError
from outbox.event import Event
from outbox.results.result_row import ResultRow
from outbox.sinks import OpenRow
from outbox.tasks import task_results, task_rows
from outbox.tasks.target import Target
from outbox.unit_of_work.unit_of_work import Buffer

if TYPE_CHECKING:
    from outbox.results.results_reader import ResultsReader

__all__ = ["TaskHandle"]

R = TypeVar("R")

_REMEMBERED = 10_000
"""Dropped events of a unit of work that handles know of."""


class TaskHandle(Generic[R]):
    """The handle of a task, by its id.

    ``later()`` returns one that knows the unit of work of the call; ``TaskHandle(id)`` makes one
    that looks at the results, and at the queues of the process's default publisher. Thread-safe; a
    copy that travels to another process knows the id alone.

    Attributes:
        id: the id of the task's event.
    """

    __slots__ = ("_buffer", "_engine", "_event", "_keep", "_row", "_target", "id")

    def __init__(
        self,
        id: str,
        _event: Event | None = None,
        _buffer: Buffer | None = None,
        _engine: Any = None,
        _target: Target | None = None,
        _keep: float | None = None,
        _row: OpenRow | None = None,
    ) -> None:
        """Make a handle of the task with this id, which need not exist."""
        self.id = str(id)
        self._event = _event
        self._buffer = _buffer
        self._engine = _engine
        self._target = _target
        self._keep = _keep
        self._row = _row
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

        - ``"collected"``: it waits in the open unit of work of the call, or in the open
          transaction that it was stored in;
        - ``"dropped"``: its unit of work failed, or it was cancelled there, or its transaction, or
          a savepoint, was rolled back: it will not run;
        - ``"waiting"``: its row is in a database, and no worker has it: with a database as the
          broker, or stored until it is due;
        - ``"running"``: an attempt runs;
        - ``"retrying"``: an attempt has failed, or its worker has disappeared, and another follows;
        - ``"succeeded"``, ``"failed"`` or ``"cancelled"``: nothing follows;
        - ``"unknown"``: all else. It waits in RabbitMQ, or was never committed, or is forgotten; or
          its result isn't kept, and a worker has it, or it is done.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: a database can't be read.
        """
        if self._was_dropped():
            return "dropped"
        if self._is_open():
            return "collected"
        row = task_results.row_here(self.id)
        if row is not None:
            return row.status
        engine = self._engine_to_ask()
        if engine is not None and task_rows.waits(engine, self.id):
            return "waiting"
        return "unknown"

    def cancel(self) -> bool:
        """Cancel the task, unless it runs or is done; return True if it will not run.

        A collected task is taken out of its unit of work. A row that no worker has is deleted. In
        RabbitMQ its message stays, and is dropped when a worker would begin with it: that needs a
        database for results, and a task that keeps its result. A task that runs is not interrupted,
        but it can be cancelled between two attempts.

        A handle that was made from an id can't know whether the task keeps its result. So it
        returns True also for one in RabbitMQ that doesn't, which runs all the same.

        Raises:
            NoResults: it is, or may be, in RabbitMQ, and no worker would learn of it: no database
                for results is configured, or ``later()`` has returned this handle, and the task
                keeps no result.
            sqlalchemy.exc.SQLAlchemyError: a database can't be written.
        """
        if self._was_dropped():
            return True
        buffer, event = self._place(), self._event
        if buffer is not None and event is not None and buffer.remove(event):
            task_rows.note_dropped(buffer.unit, event)
            return True
        engine = self._engine_to_ask()
        deleted = None if engine is None else task_rows.delete(engine, self.id)
        is_deleted = deleted is not None
        name = "" if self._target is None else self._target.name
        of_test = task_results.results_of_test()
        if of_test is not None:
            return of_test.cancel(self.id, name)
        store = None if self._keep == 0 else task_results.store_here()
        if store is not None:
            return store.cancel(self.id, name, self._due_in(), deleted) or is_deleted
        if engine is None:
            raise NoResults(
                f"the task {self.id!r} can't be cancelled any more: a broker's queue gives nothing "
                "back, and "
                + (
                    "its result isn't kept, so that workers don't ask before they begin"
                    if self._keep == 0
                    else "no database is configured that workers would ask, configure(results=...)"
                )
            )
        return is_deleted

    def result(self, timeout: float | None = None) -> R:
        """Wait for the task, and return what it has returned.

        What isn't plain JSON is read by the annotation of the function's result; a handle made by
        ``TaskHandle(id)`` knows it only if this process has imported the task, and returns it as
        JSON has it otherwise.

        Args:
            timeout: the seconds to wait at most; None to wait without end, 0 to only look.

        Raises:
            TaskFailed: it has failed, and no attempt follows.
            TaskCancelled: it was cancelled.
            ResultTimeout: it has no result in time. In a test whose events are recorded this is
                raised at once: nothing runs meanwhile.
            ResultLost: it has succeeded, but its value could not be kept.
            UsageError: its unit of work, or the transaction that it was stored in, has not ended,
                so that waiting would last for ever; or it was dropped; or an event loop runs here.
            NoResults: nothing keeps its result.
            sqlalchemy.exc.SQLAlchemyError: the database can't be read.
        """
        asyncio: Any = sys.modules.get("asyncio")  # importing it takes a while
        if asyncio is not None and asyncio._get_running_loop() is not None:
            raise UsageError("result() would block the event loop; await result_async()")
        reader = self._reader()
        row = self._row_of_test() if reader is None else reader.wait(self.id, timeout)
        return self._value(row, timeout)

    async def result_async(self, timeout: float | None = None) -> R:  # noqa: ASYNC109
        """Await what the task has returned; see :meth:`result`."""
        reader = self._reader()
        row = self._row_of_test() if reader is None else await reader.wait_async(self.id, timeout)
        return self._value(row, timeout)

    def _reader(self) -> ResultsReader | None:
        """Return what reads the result; None in a test whose events are recorded.

        Raises:
            UsageError: there is nothing to wait for.
            NoResults: nothing keeps the result.
        """
        if self._was_dropped():
            where = "unit of work" if self._row is None else "transaction"
            raise UsageError(f"the task {self.id!r} was dropped with its {where}, and will not run")
        if self._is_open():
            raise UsageError(
                f"the task {self.id!r} waits in its unit of work, which has not ended; publish() "
                "first, or end the block"
                if self._row is None
                else f"the task {self.id!r} is stored in a transaction that is open; commit it "
                "first"
            )
        if self._keep == 0:
            raise NoResults(
                f"the result of the task {self.id!r} is not kept, since keep_result is False"
            )
        if task_results.results_of_test() is not None:
            return None
        reader = task_results.reader_here()
        if reader is None:
            raise NoResults(
                f"the result of the task {self.id!r} is not kept: no database for results is "
                "configured, configure(results=...) or OUTBOX_RESULTS"
            )
        return reader

    def _row_of_test(self) -> ResultRow | None:
        row = task_results.row_here(self.id)
        return row if row is not None and row.is_final else None

    def _value(self, row: ResultRow | None, timeout: float | None) -> R:
        if row is None:
            if task_results.results_of_test() is not None:
                raise ResultTimeout(
                    f"the task {self.id!r} has not run in this test; deliver_all() runs it"
                )
            raise ResultTimeout(f"the task {self.id!r} has no result after {timeout} s")
        parameters = None if self._target is None else self._target.parameters
        value: R = task_results.value_of(row, parameters)
        return value

    def _due_in(self) -> float | None:
        """Return the seconds until the task is due; None if that isn't known here."""
        event = self._event
        if event is None:
            return None
        if event.deliver_at is None:
            return 0.0
        return (event.deliver_at - datetime.datetime.now(datetime.UTC)).total_seconds()

    def _was_dropped(self) -> bool:
        buffer, row = self._buffer, self._row
        if row is not None and row.is_dropped:
            return not self._has_run_in_test()
        return buffer is not None and self.id in (buffer.unit.dropped or ())

    def _is_open(self) -> bool:
        """Return whether its unit of work, or the transaction that it was stored in, is open."""
        row = self._row
        if row is not None and row.is_open:
            return not self._has_run_in_test()
        return self._place() is not None

    def _has_run_in_test(self) -> bool:
        """Return whether a test has run it, which may do that without any commit."""
        of_test = task_results.results_of_test()
        return of_test is not None and of_test.get(self.id) is not None

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
        if self._engine is not None and not isinstance(self._engine, functools.partial):
            return task_rows.usable(self._engine)
        if task_results.results_of_test() is not None:
            return None
        of_framework = None if self._engine is None else self._engine()
        if of_framework is not None:
            return of_framework
        publisher = configuration.publisher_if_any()
        return None if publisher is None else task_rows.engine_of(task_results.settings_here())
