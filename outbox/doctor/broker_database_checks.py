"""Checks of a database that is the broker, and of SQLite files, also the application's."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, func, select

from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotApplicable, NotChecked, Problem
from outbox.doctor.read_only import path_of, reading
from outbox.errors import OutboxError, UsageError
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.rows import UNROUTED
from outbox.presence.listener import listen
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.schema import events, exists
from outbox.storage.side_engine import Unfit
from outbox.transports.database.kinds import database_at, engine_at
from outbox.transports.database.sqlite.disk_room import room_at
from outbox.transports.database.sqlite.location import Location

__all__ = ["CHECKS", "dead_letters", "without_consumer", "workers"]

_NETWORKS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "afs", "ncpfs", "glusterfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "virtiofs"),
)
_MOUNTS = "/proc/self/mountinfo"


def _files(examined: Examined) -> Iterator[Problem]:
    checked = False
    location = _location(examined)
    if location is not None:
        checked = True
        if os.path.lexists(location.path):
            yield from _of_file(location.path)
            yield from _of_journal(location.path)
        else:
            yield from _of_folder(location.path)
        if location.synchronous != "FULL":
            yield Problem(
                "note",
                f"the last events in {location.path} may be lost in a power cut "
                "(synchronous=normal)",
            )
    with contextlib.suppress(NotChecked, OutboxError):
        url = examined.engine.url
        if examined.engine.dialect.name == "sqlite":
            checked = True
            yield from _of_file(path_of(url))
    if not checked:
        raise NotApplicable


def _location(examined: Examined) -> Location | None:
    if examined.url.scheme != "sqlite":
        return None
    try:
        return Location.of(examined.url)
    except UsageError as error:
        raise NotChecked(f"{error} (OBX101)") from None


def _of_file(path: str) -> Iterator[Problem]:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISREG(status.st_mode):
        yield Problem("error", f"{path} is not a regular file", "Name the file itself.")
        return
    if status.st_uid != os.geteuid():
        yield Problem(
            "error",
            f"{path} belongs to another user (uid {status.st_uid}; this is {os.geteuid()})",
            "Run everything that uses the file as one user, and give it the file: chown.",
        )
    elif not os.access(path, os.R_OK | os.W_OK):
        yield Problem("error", f"{path} is not readable and writable for this user", "chmod 600")
    yield from _of_folder(path)


def _of_folder(path: str) -> Iterator[Problem]:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        yield Problem("error", f"there is no folder {folder}", "Create it.")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(
            "error",
            f"the folder {folder} is not writable for this user, who must write the log beside "
            "the file",
            "Give the folder to the user who runs the application.",
        )
    kind = file_system_of(folder)
    if kind in _NETWORKS:
        yield Problem(
            "error",
            f"{folder} is on a network file system ({kind}), where SQLite's locks don't work",
            "Move the file to a local disk, or use a server.",
        )
    if room_at(path).for_new <= 0:
        yield Problem(
            "error",
            f"there is no room for events on the disk of {folder}",
            "Free space: publishers stop before the disk is full, so that workers go on.",
        )


def _of_journal(path: str) -> Iterator[Problem]:
    if not os.path.getsize(path):  # nothing has been written yet
        return
    with reading(path) as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
    if mode.lower() != "wal":
        yield Problem(
            "warning",
            f"the journal of {path} is {mode}, not WAL: readers and writers block each other",
            f"sqlite3 {path} 'PRAGMA journal_mode=WAL', while nothing has it open.",
        )


def file_system_of(folder: str, mounts: str = _MOUNTS) -> str:
    """Return the type of the file system that a folder is on; empty if unknown."""
    folder = os.path.realpath(folder)
    best, kind = "", ""
    with contextlib.suppress(OSError), open(mounts, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            # proc(5): ... mount point, options ... "-", type, source, options
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            point = fields[4].replace("\\040", " ") if len(fields) > 4 else ""
            is_above = (folder + "/").startswith(point.rstrip("/") + "/")
            if point and is_above and len(point) >= len(best):
                best, kind = point, after.split(" ")[0]
    return kind


def _waiting(examined: Examined) -> dict[str, int]:
    """Return the number of messages in each queue of a database that is the broker."""
    if not examined.url.is_database:
        raise NotApplicable
    row = events.c
    statement = select(row.queue, func.count()).where(row.dead_at.is_(None))
    with _connected(examined) as connection:
        if connection is None or not exists(connection, events):
            return {}
        rows: list[Any] = list(connection.execute(statement.group_by(row.queue)))
    return {queue: count for queue, count in rows if queue}


@contextlib.contextmanager
def _connected(examined: Examined) -> Iterator[Connection | None]:
    """Connect to the broker; None if its file doesn't exist."""
    if examined.url.scheme == "sqlite":
        path = os.path.abspath(examined.url.path)
        if not os.path.exists(path):
            yield None
            return
        with reading(path) as connection:
            yield connection
        return
    try:
        engine = engine_at(examined.url)
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()
    except (DatabaseError, UsageError) as error:
        why = reason_of(error) if isinstance(error, DatabaseError) else str(error)
        raise NotChecked(f"{examined.url} can't be read: {why}") from None


def dead_letters(examined: Examined) -> Iterator[Problem]:
    """Yield dead letters and parked events in the database."""
    waiting = _waiting(examined)
    for queue, count in sorted(waiting.items()):
        if queue == PARKING_QUEUE:
            yield Problem(
                "warning",
                f"{count:,} events without a queue in {queue!r}",
                "Look with `outbox parked list`; correct topics or targets, then `outbox parked "
                "replay`.",
            )
        elif queue == dead_letter_queue(queue.removesuffix(".dead")):
            yield Problem(
                "warning",
                f"{count:,} dead letters in {queue!r}",
                f"Look with `outbox parked list --queue {queue}`; then replay or purge them.",
            )


def _same_tables(examined: Examined) -> Iterator[Problem]:
    if not examined.url.is_database or examined.url.scheme == "sqlite":
        raise NotApplicable
    engine = examined.engine
    broker = database_at(examined.url)
    try:
        is_here = broker.holds(engine, {})
    except (DatabaseError, OutboxError, Unfit) as error:
        why = reason_of(error) if isinstance(error, DatabaseError) else str(error)
        raise NotChecked(f"it can't be found out: {why}") from None
    finally:
        broker.end()
    if not is_here:
        yield Problem(
            "note",
            f"events are stored in other tables than the queues of {examined.url}, so those of a "
            "process that dies wait for a relay",
            "Run `outbox relay`, or name the application's database as the broker.",
        )


def workers(examined: Examined) -> dict[str, list[str]]:
    """Return the version of outbox of each worker, by the queue it consumes; not of unnamed queues.

    Raises:
        NotApplicable: the broker isn't a database on a server.
        OutboxError: it can't be read.
    """
    if not examined.url.is_database or examined.url.scheme == "sqlite":
        raise NotApplicable
    found = [each for each in listen(settings=examined.settings) if each.kind == "worker"]
    names_all = not any(each.more_queues for each in found)
    versions = {
        spec.name: [each.outbox for each in found if spec.name in each.queues]
        for spec in examined.specs
    }
    return {queue: known for queue, known in versions.items() if known or names_all}


def without_consumer(examined: Examined) -> Iterator[Problem]:
    """Yield queues in the database with messages that no consumer has."""
    waiting = _waiting(examined)
    ours = {spec.name for spec in examined.specs}
    for queue, count in sorted(waiting.items()):
        if queue == UNROUTED:
            yield Problem(
                "warning",
                f"{count:,} stored events wait for their queues in {queue!r}",
                "Start a worker: any of this database moves them there.",
            )
            continue
        if queue in ours or queue == PARKING_QUEUE or queue.endswith(".dead"):
            continue
        yield Problem(
            "warning", f"{count:,} messages wait in {queue!r}, which no consumer of these modules "
            "has",
        )  # fmt: skip


CHECKS = (
    Check(
        "OBX206",
        "SQLite files: file system, journal, owner, room",
        "See docs/embedded.md.",
        _files,
    ),
    Check(
        "OBX207",
        "stored events and the queues in the same tables",
        "See docs/durable.md.",
        _same_tables,
    ),
)
