"""The statements that begin and end many tasks at once, in each of the three dialects.

Their rows travel as one parameter, a JSON array, which the database turns into a table: with many
parameters, the driver would take longer than the database.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import (
    JSON,
    ColumnElement,
    Double,
    Executable,
    FromClause,
    Integer,
    Select,
    SmallInteger,
    String,
    Text,
    TextClause,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.types import TypeEngine

from outbox.results.result_row import CANCELLED, RETRYING, RUNNING, SUCCEEDED
from outbox.storage.clock import in_seconds, now, seconds_after
from outbox.storage.results_table import results
from outbox.storage.schema import dialect_of

__all__ = ["LEASE", "Statements", "statements_for"]

LEASE = 30.0
"""Seconds after which a task whose worker has disappeared is no longer shown as running."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MARIADB = mysql.dialect()
_STRING = String(255)
_LONG: TypeEngine[Any] = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_BEGUN: Mapping[str, TypeEngine[Any]] = {
    "id": _STRING,
    "task": _STRING,
    "queue": _STRING,
    "args": _LONG,
    "attempt": Integer(),
    "token": String(36),
    "worker": _STRING,
    "enqueued": Double(),
    "keep": Double(),
}
_CANCELLED: Mapping[str, TypeEngine[Any]] = {"id": _STRING, "task": _STRING, "keep": Double()}
_ENDED: Mapping[str, TypeEngine[Any]] = {
    "id": _STRING,
    "task": _STRING,
    "queue": _STRING,
    "status": String(10),
    "attempt": Integer(),
    "token": String(36),
    "value": _LONG,
    "is_typed": SmallInteger(),
    "error_type": _STRING,
    "error": _LONG,
    "traceback": _LONG,
    "is_over": SmallInteger(),
    "keep": Double(),
}


class Statements(NamedTuple):
    """The statements of a dialect; all take ``rows``, a JSON array of objects.

    Attributes:
        begin: begins tasks that are not cancelled; those whose rows then have their tokens.
        counts: whether the count of rows that it has changed says how many have begun. MariaDB
            counts a row that was there before twice.
        end: ends attempts: those with the token that was given, unless they have been ended; with
            an empty token whichever attempt runs, or waits for the next one, and a success also the
            one whose value is missing. What an object leaves out is NULL, but ``is_typed`` is 0
            then, and ``is_over`` 1.
        both: does what ``end`` does with ``ended_rows``, and what ``begin`` does; no id may be in
            both. None where one statement can't.
        cancel: cancels tasks, unless they run or are done.
    """

    begin: Executable
    end: Executable
    both: Executable | None
    cancel: Executable
    counts: bool


@functools.cache
def statements_for(dialect_name: str) -> Statements:
    """Return the statements for SQLAlchemy's ``dialect_name``."""
    dialect = dialect_of(dialect_name) or "sqlite"
    begin, both = _begin(dialect), None
    if dialect == "postgresql":
        both = begin.add_cte(_end(dialect, "ended_rows").cte("ended"))
    return Statements(begin, _end(dialect), both, _cancel(dialect), dialect != "mariadb")


def _begin(dialect: str) -> Any:
    rows, source = _rows(dialect, _BEGUN)
    values: dict[str, Any] = {
        "id": rows["id"],
        "task": rows["task"],
        "queue": rows["queue"],
        "status": literal(RUNNING, String(10)),
        "args": rows["args"],
        "attempt": rows["attempt"],
        "token": rows["token"],
        "worker": rows["worker"],
        "enqueued_at": seconds_after(literal(_EPOCH, results.c.enqueued_at.type), rows["enqueued"]),
        "started_at": now(),
        "attempted_at": now(),
        "running_until": in_seconds(literal(LEASE)),
        "kept_until": in_seconds(rows["keep"]),
    }
    row = results.c
    kept = ("queue", "args", "attempt", "token", "worker", "attempted_at", "running_until")
    # Not the value: an attempt that was faster may have written it a moment ago.
    emptied = ("error_type", "error", "traceback")
    # Another copy of its message begins. It may be left without an end: the first one is done.
    has_succeeded = and_(row.status == SUCCEEDED, row.value.is_not(None))

    def may_begin(new: Any) -> ColumnElement[bool]:
        return and_(row.status != CANCELLED, or_(row.task == new.task, row.task == ""))

    def changed(new: Any) -> list[tuple[str, Any]]:
        return [
            *((name, new[name]) for name in (*kept, "kept_until")),
            *((name, null()) for name in emptied),
            ("started_at", func.coalesce(row.started_at, new.started_at)),
            ("enqueued_at", func.coalesce(row.enqueued_at, new.enqueued_at)),
            ("task", new.task),
            ("ended_at", case((has_succeeded, row.ended_at))),
            ("status", case((has_succeeded, row.status), else_=new.status)),
        ]

    return _upsert(dialect, values, source, may_begin, changed)


def _end(dialect: str, parameter: str = "rows") -> Any:
    rows, source = _rows(dialect, _ENDED, parameter)
    values: dict[str, Any] = {
        name: rows[name] for name in _ENDED if name not in ("is_over", "keep")
    } | {
        "is_typed": func.coalesce(rows["is_typed"], 0),
        "ended_at": case((rows["is_over"] == 0, null()), else_=now()),
        "kept_until": in_seconds(rows["keep"]),
    }
    row = results.c
    kept = ("value", "is_typed", "error_type", "error", "traceback", "ended_at", "kept_until")

    def may_end(new: Any, *more: Any) -> ColumnElement[bool]:
        statuses = (RUNNING, RETRYING, *more)
        return or_(
            and_(row.token == new.token, row.running_until.is_not(None)),
            and_(new.token == "", or_(*(row.status == status for status in statuses))),
            and_(
                new.token == "",
                new.status == SUCCEEDED,
                row.status == SUCCEEDED,
                row.running_until.is_not(None),
            ),
        )

    def changed(new: Any) -> list[tuple[str, Any]]:
        return [*((name, new[name]) for name in (*kept, "status")), ("running_until", null())]

    return _upsert(
        dialect,
        values,
        source,
        may_end,
        changed,
        last=lambda new: may_end(new, new.status),
    )


def _cancel(dialect: str) -> Any:
    rows, source = _rows(dialect, _CANCELLED)
    values: dict[str, Any] = {
        "id": rows["id"],
        "task": rows["task"],
        "status": literal(CANCELLED, String(10)),
        "ended_at": now(),
        "kept_until": in_seconds(rows["keep"]),
    }
    row = results.c
    may_cancel = or_(row.status == RETRYING, and_(row.status == RUNNING, row.running_until < now()))
    return _upsert(
        dialect,
        values,
        source,
        lambda new: may_cancel,
        lambda new: [
            *((name, new[name]) for name in ("ended_at", "kept_until", "status")),
            ("running_until", null()),
        ],
        last=lambda new: row.status == new.status,
    )


def _upsert(
    dialect: str,
    values: Mapping[str, Any],
    source: FromClause | TextClause,
    condition: Any,
    changed: Any,
    *,
    last: Any = None,
) -> Any:
    """Return an upsert of rows that changes those which are there only under a condition.

    Args:
        dialect: the dialect.
        values: the columns of a row.
        source: where they come from.
        condition: returns the condition, from the columns of the new row.
        changed: returns the columns to change and their values, likewise. On MariaDB the condition
            is evaluated again for each, and sees those before it: what it reads comes last.
        last: returns the condition for the last column there, where the one before, the status, may
            be the new one already.
    """
    # Without a condition, SQLite would take "ON CONFLICT" for part of a join.
    new_rows: Select[Any] = select(*values.values()).select_from(source).where(true())
    if dialect == "mariadb":
        upsert = mysql.insert(results).from_select(list(values), new_rows)
        new = upsert.inserted
        pairs = changed(new)
        conditions = [condition(new)] * len(pairs)
        if last is not None:
            conditions[-1] = last(new)
        return upsert.on_duplicate_key_update(
            [
                (name, case((if_, value), else_=results.c[name]))
                for (name, value), if_ in zip(pairs, conditions, strict=True)
            ]
        )
    if dialect == "postgresql":
        made: Any = postgresql.insert(results)
    else:
        made = sqlite.insert(results)
    made = made.from_select(list(values), new_rows)
    new = made.excluded
    return made.on_conflict_do_update(
        index_elements=[results.c.id], set_=dict(changed(new)), where=condition(new)
    )


def _rows(
    dialect: str, columns: Mapping[str, TypeEngine[Any]], parameter: str = "rows"
) -> tuple[dict[str, ColumnElement[Any]], FromClause | TextClause]:
    """Return the columns of the rows in a parameter, and what to select them from."""
    given = bindparam(parameter, type_=Text())
    if dialect == "postgresql":
        table = (
            func.json_to_recordset(cast(given, JSON))
            .table_valued(*(column(name, kind) for name, kind in columns.items()))
            .render_derived(name="new_rows", with_types=True)
        )
        return {name: table.c[name] for name in columns}, table
    if dialect == "sqlite":
        each = func.json_each(given).table_valued("value", name="new_rows")
        return {
            name: func.json_extract(each.c.value, f"$.{name}", type_=kind)
            for name, kind in columns.items()
        }, each
    described = ", ".join(
        f"{name} {kind.compile(_MARIADB)} PATH '$.{name}'" for name, kind in columns.items()
    )
    whole = text(f"JSON_TABLE(:{parameter}, '$[*]' COLUMNS ({described})) AS new_rows").bindparams(
        given
    )
    return {name: literal_column(f"new_rows.{name}", kind) for name, kind in columns.items()}, whole
