"""The store of results: the operations on their rows, each in one short transaction."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.schema import CreateIndex, CreateTable

from outbox.errors import UsageError
from outbox.results.result_row import (
    CANCELLED,
    RETRYING,
    RUNNING,
    SUCCEEDED,
    WORKER_GONE,
    ResultRow,
)
from outbox.results.results_statements import LEASE, statements_for
from outbox.sql import commits
from outbox.storage.clock import in_seconds, now
from outbox.storage.creating import check_server
from outbox.storage.drivers.direct import execute, execute_alone
from outbox.storage.notifications import RESULTS_CHANNEL, can_listen
from outbox.storage.results_table import results
from outbox.storage.schema import dialect_of, exists
from outbox.storage.transactions import READS_ONLY, own_transaction, reading, try_again
from outbox.telemetry import tracing

__all__ = ["ResultsStore"]

_MOST_IDS = 500  # in one statement
_PURGED_AT_ONCE = 1000
_WEEK = 7 * 86_400.0
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_LONGEST_DELAY = 2.0**28  # seconds: no task waits longer in RabbitMQ

_DROPPED = "dropped"
"""The token of a task that was cancelled, once its message is gone: no attempt has such a one."""

_row = results.c
_gone = and_(_row.running_until.is_not(None), _row.running_until < now())
_status = case((and_(_row.status == RUNNING, _gone), RETRYING), else_=_row.status)
_is_final = and_(_row.status.not_in((RUNNING, RETRYING)), or_(_row.running_until.is_(None), _gone))
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LATEST = literal(datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC), _row.kept_until.type)


def _readable(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a column of times with NULL for those that no driver can read."""
    return case((column < _LATEST, column)).label(column.key)


_FROM_OUTSIDE = ("enqueued_at", "kept_until")  # what they are was in a message
_HIDDEN = ("status", "token", "running_until")
_SHOWN = (
    *(
        _readable(column) if column.name in _FROM_OUTSIDE else column
        for column in _row
        if column.name not in _HIDDEN
    ),
    _status.label("shown_status"),
    _is_final.label("is_final"),
    and_(_row.status == CANCELLED, _row.token == _DROPPED).label("is_dropped"),
)

_drop = (
    update(results)
    .where(_row.id == bindparam("of_id"), _row.status == CANCELLED)
    .values(
        token=_DROPPED,
        task=case((_row.task == "", bindparam("call_task", type_=_row.task.type)), else_=_row.task),
        queue=case(
            (_row.queue == "", bindparam("call_queue", type_=_row.queue.type)), else_=_row.queue
        ),
        args=func.coalesce(_row.args, bindparam("call_args", type_=_row.args.type)),
    )
)

# Never NULL, which databases sort differently.
_last_change = case(
    (
        and_(
            _row.ended_at.is_not(None),
            or_(_row.attempted_at.is_(None), _row.ended_at > _row.attempted_at),
        ),
        _row.ended_at,
    ),
    else_=func.coalesce(_row.attempted_at, _row.enqueued_at, literal(_EPOCH, _row.ended_at.type)),
)


class ResultsStore:
    """The table ``outbox_results`` of a database. Thread-safe.

    Its first operation is :meth:`prepare`. Database errors are SQLAlchemy's.

    Attributes:
        engine: the engine, which the caller disposes of.
        listening: the engine to listen with for results that are written, or None.
    """

    def __init__(self, engine: Engine, listening: Engine | None = None) -> None:
        """Make a store of the table in the database of ``engine``.

        Args:
            engine: the engine.
            listening: the engine to listen with; None to look only.

        Raises:
            UsageError: results can't be kept in that database.
        """
        dialect = dialect_of(engine.dialect.name)
        if dialect is None:
            raise UsageError(
                f"results are kept in PostgreSQL, MariaDB or SQLite, not in {engine.dialect.name}"
            )
        self.engine = engine
        self.listening = listening
        self.is_sqlite = dialect == "sqlite"
        self._statements = statements_for(engine.dialect.name)
        self._is_ready = False

    def prepare(self) -> None:
        """Check that the table exists; on SQLite, create it if it doesn't.

        Raises:
            UsageError: it doesn't exist; the message says how to create it.
        """
        if self._is_ready:
            return
        # Only a look, mostly: on SQLite this process may be in the middle of a transaction that
        # writes, and would wait for itself.
        with own_transaction(self.engine.execution_options(**{READS_ONLY: True})) as connection:
            check_server(connection)
            self._is_ready = exists(connection, results)
        if self._is_ready:
            return
        if self.is_sqlite:
            with own_transaction(self.engine) as connection:
                connection.execute(CreateTable(results, if_not_exists=True))
                for index in results.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))
            self._is_ready = True
            return
        raise UsageError(
            f"the table {results.name}, which keeps the results of tasks, does not exist; create "
            "it with `outbox sql create`, or with your migrations (outbox.sql.metadata)"
        )

    @contextlib.contextmanager
    def _transaction(self, begin: Any = own_transaction) -> Iterator[Connection]:
        self.prepare()
        with commits.unwatched(), begin(self.engine) as connection:
            yield connection

    def connect(self) -> Connection | None:
        """Return a connection on which each statement is a transaction; None on SQLite.

        A server answers such a statement once, where a transaction takes four answers.
        """
        if self.is_sqlite:
            return None
        self.prepare()
        with tracing.hidden():
            return self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def write(
        self,
        begun: Sequence[Mapping[str, Any]],
        ended: Sequence[Mapping[str, Any]],
        connection: Connection | None = None,
    ) -> dict[str, str]:
        """Begin and end tasks, many at once.

        Args:
            begun: the tasks that begin, with what ``results_statements`` names; no id twice.
            ended: those that end, likewise.
            connection: what :meth:`connect` has returned; None for a transaction apart.

        Returns:
            Of those which may not begin, the tokens and why: ``cancelled``, or the name of another
            task that has the id.
        """

        def work() -> int:
            if connection is not None:
                with tracing.hidden():
                    return self._write(functools.partial(execute_alone, connection), begun, ended)
            with self._transaction() as own:
                return self._write(functools.partial(execute, own), begun, ended)

        count = try_again(work)
        # Asked only if some may not have begun: reading rows takes a driver that is written in
        # Python long, since each value of each row has it wait for the interpreter.
        if not begun or (self._statements.counts and count == len(begun)):
            return {}
        return self._refused(begun, connection)

    def _write(
        self,
        run: Callable[[Any, Mapping[str, str]], int],
        begun: Sequence[Mapping[str, Any]],
        ended: Sequence[Mapping[str, Any]],
    ) -> int:
        """Return the count of the statement that begins tasks."""
        statements = self._statements
        both = statements.both if begun and ended else None
        if both is not None and {row["id"] for row in begun}.isdisjoint(row["id"] for row in ended):
            # One round trip and one commit for both.
            return run(both, {"rows": _as_json(begun), "ended_rows": _as_json(ended)})
        if ended:
            run(statements.end, {"rows": _as_json(ended)})
        return run(statements.begin, {"rows": _as_json(begun)}) if begun else 0

    def _refused(
        self, begun: Sequence[Mapping[str, Any]], connection: Connection | None
    ) -> dict[str, str]:
        """Return those that may not begin; see :meth:`write`."""
        statement = select(_row.id, _row.token, _row.status, _row.task).where(
            _row.id.in_([row["id"] for row in begun])
        )
        if connection is None:
            with self._transaction(reading) as own:
                rows = {row.id: row for row in own.execute(statement)}
        else:
            with tracing.hidden(), connection.begin():
                rows = {row.id: row for row in connection.execute(statement)}
        refused: dict[str, str] = {}
        cancelled, again = [], []
        for each in begun:
            row = rows.get(each["id"])
            if row is None or row.token == each["token"]:
                continue
            if row.task not in ("", each["task"]):
                refused[each["token"]] = row.task
            elif row.status == CANCELLED:
                cancelled.append(each)
            elif row.status == RETRYING:  # it was cancelled a moment ago
                again.append(each)
        if cancelled:
            dropped = self._dropped(cancelled)
            refused |= {each["token"]: CANCELLED for each in cancelled if each["id"] in dropped}
            again += [each for each in cancelled if each["id"] not in dropped]
        return refused | self.write(again, [], connection) if again else refused

    def _dropped(self, calls: Sequence[Mapping[str, Any]]) -> set[str]:
        """Note that the messages of cancelled tasks are dropped.

        Returns:
            The ids of those that are cancelled: of another one, which may run since a moment ago,
            the message must not be dropped.
        """
        calls = sorted(calls, key=itemgetter("id"))
        ids = [call["id"] for call in calls]

        def work() -> set[str]:
            with self._transaction() as connection:
                connection.execute(_drop, [_of_call(call["id"], call) for call in calls])
                noted = select(_row.id).where(
                    _row.id.in_(ids), _row.status == CANCELLED, _row.token == _DROPPED
                )
                return set(connection.execute(noted).scalars())

        return try_again(work)

    def write_on(self, connection: Any, ended: Mapping[str, Any]) -> None:
        """End an attempt in a transaction of the application."""
        connection.execute(self._statements.end, {"rows": _as_json([ended])})

    def note_on(self, connection: Any, id_: str, token: str) -> None:
        """Note in a transaction of the application that an attempt succeeds; its value follows.

        No other attempt can, so the row is its own from now on, whichever attempt has begun last.
        """
        connection.execute(
            update(results)
            .where(_row.id == id_, _row.status.in_((RUNNING, RETRYING)))
            .values(
                status=SUCCEEDED,
                ended_at=now(),
                token=token,
                running_until=in_seconds(literal(LEASE)),
            )
        )

    def complete(self, id_: str) -> None:
        """Note that a task had been done before: only its value may be missing."""

        def work() -> None:
            with self._transaction() as connection:
                connection.execute(
                    update(results)
                    .where(_row.id == id_, _row.status.in_((RUNNING, RETRYING, SUCCEEDED)))
                    .ordered_values(  # MariaDB's later ones see the earlier ones
                        (
                            _row.ended_at,
                            case((_row.status == SUCCEEDED, _row.ended_at), else_=now()),
                        ),
                        (_row.running_until, case((_row.value.is_(None), _row.running_until))),
                        (_row.status, SUCCEEDED),
                    )
                )

        try_again(work)

    def renew(self, ids: Sequence[str], tokens: Sequence[str]) -> None:
        """Extend the leases of attempts that still run, by :data:`LEASE` seconds."""
        for begin in range(0, len(ids), _MOST_IDS):
            part = slice(begin, begin + _MOST_IDS)
            statement = (
                update(results)
                .where(
                    _row.id.in_(sorted(ids[part])),
                    _row.token.in_(tokens[part]),
                    _row.running_until.is_not(None),
                )
                .values(running_until=in_seconds(literal(LEASE)))
            )

            def work(statement: Any = statement) -> None:
                with self._transaction() as connection:
                    connection.execute(statement)

            try_again(work)

    def purge_some(self) -> bool:
        """Delete rows that need not be kept any longer; return whether there may be more."""
        old = (
            select(_row.id)
            .where(_row.kept_until < now(), or_(_row.running_until.is_(None), _gone))
            .order_by(_row.kept_until)
            .limit(_PURGED_AT_ONCE)
            .with_for_update(skip_locked=True)
        )
        with self._transaction() as connection:
            ids = connection.execute(old).scalars().all()
            if ids:
                connection.execute(delete(results).where(_row.id.in_(ids)))
        return len(ids) == _PURGED_AT_ONCE

    def cancel(
        self,
        id_: str,
        task: str = "",
        due_in: float | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> bool:
        """Cancel a task unless it runs or is done; return whether it will not run.

        Args:
            id_: its id.
            task: its name, if that is known.
            due_in: the seconds until it is due, which the row must outlast; None if unknown.
            call: what is to be kept of its call, if its message is gone: ``task``, ``queue`` and
                ``args``; None if it may come to a worker.
        """
        keep = _LONGEST_DELAY + _WEEK if due_in is None else max(0.0, due_in) + _WEEK
        rows = _as_json([{"id": id_, "task": task, "keep": keep}])

        def work() -> bool:
            with self._transaction() as connection:
                connection.execute(self._statements.cancel, {"rows": rows})
                if call is not None:
                    connection.execute(_drop, _of_call(id_, call))
                if can_listen(self.engine):  # seldom enough to do it in the transaction
                    connection.execute(select(func.pg_notify(RESULTS_CHANNEL, "")))
                status = connection.execute(select(_row.status).where(_row.id == id_)).scalar()
                return bool(status == CANCELLED)

        return try_again(work)

    def revive(self, id_: str, *, is_dropped: bool) -> bool:
        """Have a task be cancelled no longer; return whether it was.

        Args:
            id_: its id.
            is_dropped: whether its message must be gone, so that the caller calls it once more; or
                must not be gone, so that it runs when that comes to a worker.
        """
        is_gone = func.coalesce(_row.token, "") == _DROPPED
        those = and_(_row.id == id_, _row.status == CANCELLED, is_gone if is_dropped else ~is_gone)
        # As before it was cancelled: without a row if it had not begun.
        without = delete(results).where(those, _row.started_at.is_(None))
        waiting = update(results).where(those).values(status=RETRYING, token=None, ended_at=None)

        def work() -> bool:
            with self._transaction() as connection:
                return any(
                    connection.execute(statement).rowcount > 0 for statement in (without, waiting)
                )

        return try_again(work)

    def read(self, ids: Iterable[str]) -> dict[str, ResultRow]:
        """Return the rows with these ids, at most 500, by id."""
        with self._transaction(reading) as connection:
            found = connection.execute(select(*_SHOWN).where(_row.id.in_(list(ids))))
            return {row.id: row for row in map(_row_of, found.mappings())}

    def find(
        self,
        *,
        statuses: Sequence[str] = (),
        task: str | None = None,
        queue: str | None = None,
        limit: int | None = None,
    ) -> list[ResultRow]:
        """Return rows, those to which something happened last first.

        Args:
            statuses: the statuses to select; none for all.
            task: the name of the task to select, or None.
            queue: likewise.
            limit: the number of rows at most, or None.
        """
        # Without an index, which each task would pay for; and not by the id, which may be any text.
        statement = select(*_SHOWN).order_by(_last_change.desc(), _row.id.desc()).limit(limit)
        if statuses:
            statement = statement.where(_status.in_(statuses))
        if task is not None:
            statement = statement.where(_row.task == task)
        if queue is not None:
            statement = statement.where(_row.queue == queue)
        with self._transaction(reading) as connection:
            return [_row_of(row) for row in connection.execute(statement).mappings()]

    def counts(self) -> dict[str, int]:
        """Return the number of rows by status."""
        with self._transaction(reading) as connection:
            found = connection.execute(select(_status, func.count()).group_by(_status))
            return {row[0]: row[1] for row in found}

    def forget(self, ids: Sequence[str]) -> int:
        """Delete rows, except those of tasks that run; return how many.

        A task that was cancelled, and whose message is still in its queue, runs after that.
        """
        over = or_(_row.status != RUNNING, _gone)
        count = 0
        for begin in range(0, len(ids), _MOST_IDS):
            part = _row.id.in_(ids[begin : begin + _MOST_IDS])
            with self._transaction() as connection:
                count += connection.execute(delete(results).where(part, over)).rowcount
        return count


def _of_call(id_: str, call: Mapping[str, Any]) -> dict[str, Any]:
    return {"of_id": id_} | {f"call_{name}": call[name] for name in ("task", "queue", "args")}


def _as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    # In one order in every process: otherwise two could wait for each other's rows.
    return _encode(sorted(rows, key=itemgetter("id")))


def _row_of(found: Mapping[Any, Any]) -> ResultRow:
    values = dict(found)
    status = values.pop("shown_status")
    is_final = bool(values.pop("is_final"))
    error = values.pop("error") or ""
    if is_final and status == SUCCEEDED and values["value"] is None:
        error = error or WORKER_GONE
    return ResultRow(
        **values
        | {
            "status": status,
            "is_final": is_final,
            "is_dropped": bool(values["is_dropped"]),
            "is_typed": bool(values["is_typed"]),
            "error": error,
            "error_type": values["error_type"] or "",
            "traceback": values["traceback"] or "",
        }
    )
