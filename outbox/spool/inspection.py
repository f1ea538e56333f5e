"""Looks into spool files without taking them, and recovers what a damaged one still has."""

from __future__ import annotations

import contextlib
import datetime
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from outbox.spool.spool_file import (
    FORMAT,
    Spooled,
    SpoolFile,
    Unreadable,
    Unwritable,
    is_at_rest,
    open_file,
    row_at,
    rows_of,
)
from outbox.spool.spool_folder import BAD

__all__ = ["FileState", "look_at", "salvage"]

_BATCH = 1000

State = Literal["readable", "newer", "unreadable"]


class FileState(NamedTuple):
    """What a file holds.

    Attributes:
        state: ``readable``, ``newer`` if a newer version of outbox has written it, or
            ``unreadable``.
        events: the number of events; 0 unless it is readable.
        size: the bytes that the file takes on the disk.
        oldest: when its first event occurred; None without any.
        why: what is wrong with an unreadable one.
    """

    state: State
    events: int
    size: int
    oldest: datetime.datetime | None
    why: str


def look_at(path: Path) -> FileState:
    """Return what the file at ``path`` holds, while its process may use it.

    Raises:
        FileNotFoundError: it has just been deleted.
    """
    status, at_rest = os.stat(path), is_at_rest(path)
    state = _look_at(path, immutable=at_rest)
    if at_rest:
        now = os.stat(path)
        if not is_at_rest(path) or (status.st_size, status.st_mtime_ns) != (
            now.st_size,
            now.st_mtime_ns,
        ):  # a process has taken it meanwhile
            return _look_at(path, immutable=False)
    return state


def _look_at(path: Path, *, immutable: bool) -> FileState:
    size = sum(
        os.stat(f"{path}{suffix}").st_size
        for suffix in ("", "-wal")
        if not suffix or os.path.exists(f"{path}{suffix}")
    )
    try:
        with contextlib.closing(open_file(path, "ro", immutable=immutable)) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] > FORMAT:
                return FileState("newer", 0, size, None, "")
            if BAD in path.name:
                return FileState("unreadable", 0, size, None, "put aside as damaged")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return FileState("readable", 0, size, None, "")  # being made
            events = connection.execute("SELECT count(*) FROM event").fetchone()[0]
            first = next(rows_of(connection), None)
    except (sqlite3.Error, Unwritable, ValueError) as error:
        return FileState("unreadable", 0, size, None, str(error))
    return FileState("readable", events, size, first.event.occurred_at if first else None, "")


def salvage(path: Path, digest: str) -> tuple[Path | None, int, int]:
    """Copy what can be read of a damaged file to a new one beside it, which is then adopted.

    Args:
        path: the file, which stays as it is.
        digest: what the new file is named by.

    Returns:
        The new file, None if nothing was recovered; the number of events in it; and the number of
        those that are known to be missing.

    Raises:
        Unwritable: the file can't be opened, or the new one not be written.
    """
    with contextlib.closing(open_file(path, "ro", immutable=is_at_rest(path))) as connection:
        recovered = _recovered(connection)
        batch = _next(recovered)
        if not batch:
            return None, 0, 0
        file = SpoolFile.create(path.parent, digest)
        try:
            events, first, last = 0, batch[0].seq, 0
            while batch:
                file.change([(each.event, each.size) for each in batch], ())
                events += len(batch)
                last = batch[-1].seq
                batch = _next(recovered)
        except BaseException:
            file.remove()
            raise
        file.close()
    return file.path, events, last - first + 1 - events


def _next(recovered: Iterator[Spooled]) -> list[Spooled]:
    return [each for each, _ in zip(recovered, range(_BATCH), strict=False)]


def _recovered(connection: sqlite3.Connection) -> Iterator[Spooled]:
    """Yield the events that can be read, in order.

    Read from the first one to the damage, then from the last one back to it; and what is between,
    one by one.
    """
    last = 0
    try:
        for each in rows_of(connection):
            last = each.seq
            yield each
    except (sqlite3.Error, ValueError, TypeError):
        pass
    else:
        return
    behind: list[Spooled] = []
    with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
        for each in rows_of(connection, backwards=True):
            if each.seq <= last:
                break
            behind.append(each)
    end = behind[-1].seq if behind else last + 2
    for seq in range(last + 1, end):
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError, Unreadable):
            single = row_at(connection, seq)
            if single is not None:
                yield single
    yield from reversed(behind)
