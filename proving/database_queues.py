"""A database as the broker, under faults: nothing is lost, and nothing invented.

Two processes publish, two store events in their transactions in the same database, some of
which are rolled back, and three consume and publish a follow-on event for each message. Meanwhile
processes are killed, connections are ended by the server, and the server is killed and frozen. Each
process writes down what it did in a file that survives it. At the end every event that was reported
as published, or whose transaction was committed, must have been processed, with what follows from
it, and no other. No transaction may have failed for a conflict, and without faults none at all.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from outbox.storage.store import Store
from outbox.testing.databases.mariadb import PrivateMariaDB
from outbox.testing.databases.postgresql import PrivatePostgreSQL

__all__ = ["SERVERS", "Ledger", "prove"]

SERVERS: dict[str, type[PrivatePostgreSQL | PrivateMariaDB] | None] = {
    "postgresql": PrivatePostgreSQL,
    "mariadb": PrivateMariaDB,
    "sqlite": None,
}
"""The kinds of databases, and their servers."""
LEASE = 5.0
_SETTLED_WITHIN = 120.0
_PUBLISHERS = _WRITERS = 2
_WORKERS = 3

WORKER = """
import logging, os, sys
from outbox import Publisher, enqueue_event
from outbox.consumers import Worker, consumer
from outbox.transports.database.server.server_database import ServerDatabase
from outbox.transports.database.sqlite.sqlite_file import SQLiteFile

_, url, path, lease = sys.argv
ServerDatabase.lease = SQLiteFile.lease = float(lease)
log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@consumer("proof", topics=["n.#"], auto_publish=True)
def first(event):
    os.write(log, f"done {event.payload['n']}\\n".encode())
    enqueue_event({"of": event.payload["n"]}, "follow")

@consumer("follow", topics=["follow"])
def second(event):
    os.write(log, f"followed {event.payload['of']}\\n".encode())

with Publisher(url) as publisher:
    worker = Worker([first, second], publisher=publisher, threads=4, prefetch=50)
    worker.start()
    os.write(log, b"started\\n")
    sys.stdin.read()
    worker.stop(20)
"""

PUBLISHER = """
import os, random, select, sys
from outbox import EventCollector, Publisher

_, url, path, who, seed = sys.argv
log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
chosen = random.Random(int(seed))
number = 0

def write(what, events):
    os.write(log, "".join(f"{what} {each}\\n" for each in events).encode())

with Publisher(url, timeout=5, drain_timeout=60, max_kept=1_000_000) as publisher:
    while not select.select([sys.stdin], [], [], chosen.random() * 0.05)[0]:
        collector = EventCollector(publisher=publisher)
        names = {}
        for _ in range(chosen.choice((1, 1, 5, 30))):
            number += 1
            event = collector.enqueue_event({"n": f"{who}-{number}"}, f"n.{number % 7}")
            names[event.id] = f"{who}-{number}"
        write("meant", names.values())
        report = collector.publish()
        write("published", [names[event.id] for event in report.published])
        write("parked", [names[event.id] for event in report.parked])
    write("drained", [who] if publisher.drain(60) else [])
"""

WRITER = """
import os, random, sys, threading
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
import outbox.sql
from outbox import configure, enqueue_event

_, url, path, who, seed = sys.argv
log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
options = {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {}
engine = create_engine(url, pool_pre_ping=True, **options)
configure(url)
stopping = threading.Event()

class RolledBack(Exception):
    pass

def write(what, names):
    os.write(log, "".join(f"{what} {each}\\n" for each in names).encode())

def reason_of(error):
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or str(cause)[:80]

def run(lane):
    chosen = random.Random(f"{seed} {lane}")
    number = 0
    while not stopping.wait(chosen.random() * 0.02):
        number += 1
        unit = f"{who}.{lane}-{number}"
        names = [f"{unit}-{each}" for each in range(chosen.choice((1, 1, 1, 1, 5)))]
        try:
            with Session(engine) as session:
                session.execute(text("INSERT INTO units VALUES (:unit)"), {"unit": unit})
                write("stored", names)
                for each in names:
                    enqueue_event({"n": each}, f"n.{number % 7}", session=session)
                if chosen.random() < 0.2:
                    raise RolledBack
                session.commit()
        except RolledBack:
            pass
        except SQLAlchemyError as error:
            write("failed", [reason_of(error).replace("\\n", " ")])

threads = [threading.Thread(target=run, args=(lane,)) for lane in range(3)]
for thread in threads:
    thread.start()
sys.stdin.read()
stopping.set()
for thread in threads:
    thread.join()
outbox.sql.drain(60)
"""

_CONFLICTS = ("40001", "40P01", "55P03", "1020", "1205", "1213", "locked")
"""What a database says of a transaction that had to give way to others, or waited too long."""


@dataclass
class Ledger:
    """What happened.

    Attributes:
        meant: the events that were enqueued.
        published: those that were reported as published.
        done: those that a handler has processed, with the number of times.
        followed: those whose follow-on event was processed.
        parked: those for which there was no queue.
        stored: the events that were stored in transactions.
        committed: the transactions that were committed, as the database says.
        failed: the reasons why transactions failed, with the number of times.
        drained: the publishers that were ended, and had nothing left to publish.
        for_relay: the rows that were left to a relay: their writer could not find out, during an
            outage, whether its database is the broker, and was killed.
        left: the rows that were left in the end.
        faults: the number of times of each fault.
    """

    meant: set[str] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    done: dict[str, int] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    parked: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)
    failed: Counter[str] = field(default_factory=Counter)
    drained: set[str] = field(default_factory=set)
    for_relay: int = 0
    left: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> set[str]:
        """The events that are owed, and of which something is missing.

        Those reported as published, those whose transaction was committed, those that were
        processed, and all of a publisher that ended with nothing left.
        """
        owed = self.published | self._owed_to_transactions | set(self.done)
        owed |= {each for each in self.meant if each.partition("-")[0] in self.drained}
        return owed - (set(self.done) & self.followed)

    @property
    def is_clean(self) -> bool:
        """Whether all is as it should be, and something has happened."""
        wrong = self.lost or self.invented or self.parked or self.left or self.errors
        happened = self.published and self.committed and len(self.drained) == _PUBLISHERS
        return bool(happened and not wrong)

    @property
    def errors(self) -> Counter[str]:
        """The failures of transactions that no fault explains."""
        return Counter(
            {
                reason: times
                for reason, times in self.failed.items()
                if not self.faults or any(conflict in reason for conflict in _CONFLICTS)
            }
        )

    @property
    def _owed_to_transactions(self) -> set[str]:
        return {each for each in self.stored if each.rpartition("-")[0] in self.committed}

    @property
    def invented(self) -> set[str]:
        """The events that were processed, but never enqueued, or never committed."""
        return (set(self.done) | self.followed) - self.meant - self._owed_to_transactions


class _Ground:
    """A database, the processes that use it, and what may happen to them."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self._server: PrivatePostgreSQL | PrivateMariaDB | None = None
        self._url = f"sqlite:///{folder / 'queues.db'}"
        if server := SERVERS[kind]:
            self._server = server().start()
            self._url = self._server.url
        self._kind = kind
        self._folder = folder
        self._chosen = random.Random(seed)
        self._engine: Engine = create_engine(self._url, poolclass=NullPool)
        Store(self._engine).create()
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE units (name VARCHAR(100) PRIMARY KEY)"))
        self._environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OUTBOX_URL": self._url}
        self._relay: subprocess.Popen[bytes] | None = None
        self._started = 0
        self._workers = [self._worker() for _ in range(_WORKERS)]
        self._wait_for_queues()
        self._publishers = [self._publisher() for _ in range(_PUBLISHERS)]
        self._writers = [self._writer() for _ in range(_WRITERS)]
        self._wait_for_first_events()

    def _worker(self) -> subprocess.Popen[bytes]:
        return self._process(WORKER, "worker", str(LEASE))

    def _publisher(self) -> subprocess.Popen[bytes]:
        seed = str(self._chosen.randrange(1 << 30))
        return self._process(PUBLISHER, "publisher", f"p{self._started}", seed)

    def _writer(self) -> subprocess.Popen[bytes]:
        seed = str(self._chosen.randrange(1 << 30))
        return self._process(WRITER, "writer", f"w{self._started}", seed)

    def _process(self, program: str, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        self._started += 1
        path = self._folder / f"{self._started}-{what}"
        with open(f"{path}.err", "wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", program, self._url, str(path), *arguments],
                stdin=subprocess.PIPE,
                stderr=errors,
                env=self._environment,
            )

    def _wait_for_queues(self) -> None:
        _wait_until(
            lambda: self._number("SELECT count(*) FROM outbox_bindings") >= 7,
            "no worker has created the queues",
        )

    def _wait_for_first_events(self) -> None:
        """Wait until something was published and something stored, however slow the machine."""
        _wait_until(
            lambda: (
                self._number("SELECT count(*) FROM units") > 0
                and any(what == "published" for what, _ in _records(self._folder))
            ),
            "no event was published, or none was stored",
        )

    def _number(self, statement: str) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(text(statement)).scalar_one())

    def happen(self) -> str:
        """Have one thing go wrong; return what."""
        of_processes = [self._kill_worker, self._kill_publisher, self._kill_writer]
        of_server = [self._cut, self._restart, self._freeze]
        faults: list[Callable[[], None]] = of_processes
        if self._server is not None:
            faults = [*of_processes, *of_server]
        fault = self._chosen.choices(faults, (4, 2, 2, 4, 1, 1)[: len(faults)])[0]
        fault()
        return fault.__name__.removeprefix("_").replace("_", " ")

    def _kill_worker(self) -> None:
        number = self._chosen.randrange(_WORKERS)
        _kill(self._workers[number])
        self._workers[number] = self._worker()

    def _kill_publisher(self) -> None:
        number = self._chosen.randrange(_PUBLISHERS)
        _kill(self._publishers[number])
        self._publishers[number] = self._publisher()

    def _kill_writer(self) -> None:
        number = self._chosen.randrange(_WRITERS)
        _kill(self._writers[number])
        self._writers[number] = self._writer()

    def _cut(self) -> None:
        with contextlib.suppress(SQLAlchemyError), self._engine.connect() as connection:
            if self._kind == "postgresql":
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
                return
            for (number,) in connection.execute(
                text(
                    "SELECT id FROM information_schema.processlist "
                    "WHERE db = database() AND id <> connection_id()"
                )
            ).all():
                with contextlib.suppress(SQLAlchemyError):
                    connection.execute(text(f"KILL {number}"))

    def _restart(self) -> None:
        assert self._server is not None
        self._server.kill()
        time.sleep(self._chosen.random() * 2)
        self._server.start()

    def _freeze(self) -> None:
        assert self._server is not None
        self._server.pause()
        time.sleep(self._chosen.random() * 2)
        self._server.resume()

    def settle(self, ledger: Ledger) -> None:
        """Let the writers end and the workers finish; note what rows were left."""
        for process in [*self._publishers, *self._writers]:
            _end(process)
        ledger.for_relay = self._number("SELECT count(*) FROM outbox_events WHERE queue = ''")
        if ledger.for_relay:
            with open(self._folder / "relay.err", "wb") as errors:
                self._relay = subprocess.Popen(
                    [sys.executable, "-m", "outbox", "relay"],
                    stderr=errors,
                    env={**self._environment, "OUTBOX_DATABASE_URL": self._url},
                )
        deadline = time.monotonic() + _SETTLED_WITHIN
        while (left := self._number("SELECT count(*) FROM outbox_events")) > 0:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for worker in self._workers:
            _end(worker)
        ledger.left = left

    def committed(self) -> set[str]:
        """Return the names of the transactions that were committed."""
        with self._engine.connect() as connection:
            return set(connection.execute(text("SELECT name FROM units")).scalars())

    def close(self) -> None:
        for process in [*self._workers, *self._publishers, *self._writers]:
            _kill(process)
        if self._relay is not None:
            _kill(self._relay)
        self._engine.dispose()
        if self._server is not None:
            self._server.stop()


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(b"", timeout=90)


def prove(
    kind: str, folder: Path, *, seconds: float, seed: int, pause: float | None = 1.0
) -> Ledger:
    """Run for ``seconds``; return what happened.

    Args:
        kind: the kind of database.
        folder: an empty folder for the history.
        seconds: the seconds of faults.
        seed: the seed of everything random.
        pause: the seconds between two faults on average; None for no faults.
    """
    chosen = random.Random(seed)
    ledger = Ledger()
    ground = _Ground(kind, folder, seed)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if pause is None:
                time.sleep(seconds)
                break
            time.sleep(pause * (0.5 + chosen.random()))
            what = ground.happen()
            ledger.faults[what] = ledger.faults.get(what, 0) + 1
        ground.settle(ledger)
        ledger.committed = ground.committed()
    finally:
        ground.close()
    for what, name in _records(folder):
        if what == "done":
            ledger.done[name] = ledger.done.get(name, 0) + 1
        elif what == "failed":
            ledger.failed[name] += 1
        elif what in ("meant", "published", "followed", "parked", "stored", "drained"):
            getattr(ledger, what).add(name)
    return ledger


def _records(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        if path.suffix == "":
            for line in path.read_text().splitlines():
                what, _, name = line.partition(" ")
                yield what, name


def report(ledger: Ledger) -> str:
    """Return ``ledger`` as text."""
    again = sum(times - 1 for times in ledger.done.values())
    happened = ", ".join(f"{what} {times}" for what, times in sorted(ledger.faults.items()))
    failed = ", ".join(f"{why} ({times})" for why, times in ledger.failed.most_common(5))
    return "\n".join(
        (
            f"faults: {happened or 'none'}",
            f"published: {len(ledger.published):,} of {len(ledger.meant):,} events",
            f"stored: {len(ledger.stored):,} events; {len(ledger.committed):,} transactions "
            f"committed, {sum(ledger.failed.values()):,} failed: {failed or '-'}",
            f"left to a relay by killed writers: {ledger.for_relay}",
            f"processed: {len(ledger.done):,} events, {again:,} of them again",
            f"publishers drained: {len(ledger.drained)} of {_PUBLISHERS}",
            *(
                f"{kind}: {len(found)}  {' '.join(sorted(found)[:10])}"
                for kind, found in (
                    ("LOST", ledger.lost),
                    ("INVENTED", ledger.invented),
                    ("PARKED", ledger.parked),
                    ("FAILED WITHOUT A FAULT", ledger.errors),
                )
            ),
            f"ROWS LEFT: {ledger.left}",
        )
    )
