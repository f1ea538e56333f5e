"""The results of tasks in memory, for tests."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from collections.abc import Mapping
from typing import Any

from outbox.results.pending_write import PendingWrite
from outbox.results.result_row import (
    CANCELLED,
    RETRYING,
    RUNNING,
    SUCCEEDED,
    WORKER_GONE,
    ResultRow,
)

__all__ = ["MemoryResults"]


class MemoryResults:
    """The results of one test. Thread-safe.

    See ``ResultsWriter``: every write is over at once.

    Attributes:
        is_quick: False: tasks begin one at a time.
    """

    is_quick = False

    def __init__(self) -> None:
        """Begin without any."""
        self._rows: dict[str, ResultRow] = {}
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()

    def get(self, id_: str) -> ResultRow | None:
        """Return the row with this id, or None."""
        return self._rows.get(id_)

    def begin(self, values: Mapping[str, Any]) -> PendingWrite:
        """Note that an attempt begins, unless its task was cancelled."""
        id_, task = values["id"], values["task"]
        write = PendingWrite()
        now = datetime.datetime.now(datetime.UTC)
        with self._lock:
            known = self._rows.get(id_)
            if known is not None and known.status == CANCELLED:
                write.end(CANCELLED)
            elif known is not None and known.task not in ("", task):
                write.end(known.task)
            else:
                self._tokens[id_] = values["token"]
                self._rows[id_] = ResultRow(
                    id_,
                    task,
                    values["queue"],
                    args=values["args"],
                    attempt=values["attempt"],
                    worker=values["worker"],
                    started_at=now if known is None else known.started_at,
                    attempted_at=now,
                )
                write.end()
        return write

    def end(self, values: Mapping[str, Any]) -> PendingWrite:
        """Note how an attempt has ended."""
        id_, status = values["id"], values["status"]
        write = PendingWrite()
        with self._lock:
            known = self._rows.get(id_) or ResultRow(id_, values["task"], values["queue"])
            if values["token"] in ("", self._tokens.get(id_)) and not known.is_final:
                is_final = status != RETRYING
                self._rows[id_] = dataclasses.replace(
                    known,
                    status=status,
                    is_final=is_final,
                    value=values["value"],
                    is_typed=bool(values.get("is_typed")),
                    error_type=values.get("error_type") or "",
                    error=values.get("error") or "",
                    traceback=values.get("traceback") or "",
                    ended_at=datetime.datetime.now(datetime.UTC) if is_final else None,
                )
        write.end()
        return write

    def complete(self, id_: str) -> None:
        """Note that a task had been done before."""
        with self._lock:
            known = self._rows.get(id_)
            if known is not None and known.status in (RUNNING, RETRYING):
                self._rows[id_] = dataclasses.replace(
                    known, status=SUCCEEDED, is_final=True, error=WORKER_GONE
                )

    def cancel(self, id_: str, task: str = "") -> bool:
        """Cancel a task unless it runs or is done; return whether it will not run."""
        with self._lock:
            known = self._rows.get(id_)
            if known is None or known.status == RETRYING:
                known = known or ResultRow(id_, task)
                known = dataclasses.replace(known, status=CANCELLED, is_final=True)
                self._rows[id_] = known
            return known.status == CANCELLED

    def over(self, token: str) -> None:
        """Do nothing: there are no leases."""

    def took(self, seconds: float) -> None:
        """Do nothing."""

    def shares(self, connection: Any) -> bool:
        """Return False: it is no database."""
        return False

    def write_on(self, connection: Any, values: Mapping[str, Any]) -> None:
        """Do nothing; it is never called."""

    def note_on(self, connection: Any, id_: str, token: str) -> None:
        """Do nothing; it is never called."""
