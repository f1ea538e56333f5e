"""A database server as the broker, under faults: nothing is lost, and nothing invented.

python -m proving.database_queues [--kind postgresql] [--seconds 60] [--seed 1]

Two processes publish, three consume and publish a follow-on event for each message. Meanwhile
workers and publishers are killed, connections are ended by the server, and the server is killed and
frozen. Each process writes down what it did in a file that survives it. At the end every event that
was reported as published must have been processed, with what follows from it, and no other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from outbox.storage.store import Store
from outbox.testing.databases.mariadb import PrivateMariaDB
from outbox.testing.databases.postgresql import PrivatePostgreSQL

__all__ = ["Ledger", "prove"]

SERVERS: dict[str, type[PrivatePostgreSQL | PrivateMariaDB]] = {
    "postgresql": PrivatePostgreSQL,
    "mariadb": PrivateMariaDB,
}
LEASE = 5.0
_SETTLED_WITHIN = 60.0
_PUBLISHERS = 2
_WORKERS = 3

WORKER = """
import logging, os, sys
from outbox import Publisher, enqueue_event
from outbox.consumers import Worker, consumer
from outbox.transports.database.server.server_database import ServerDatabase

_, url, path, lease = sys.argv
ServerDatabase.lease = float(lease)
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
    while not select.select([sys.stdin], [], [], chosen.random() * 0.02)[0]:
        collector = EventCollector(publisher=publisher)
        names = {}
        for _ in range(chosen.choice((1, 1, 5, 50))):
            number += 1
            event = collector.enqueue_event({"n": f"{who}-{number}"}, f"n.{number % 7}")
            names[event.id] = f"{who}-{number}"
        write("meant", names.values())
        report = collector.publish()
        write("published", [names[event.id] for event in report.published])
        write("parked", [names[event.id] for event in report.parked])
    write("drained", [who] if publisher.drain(60) else [])
"""


@dataclass
class Ledger:
    """What happened.

    Attributes:
        meant: the events that were enqueued.
        published: those that were reported as published.
        done: those that a handler has processed, with the number of times.
        followed: those whose follow-on event was processed.
        parked: those for which there was no queue.
        drained: the publishers that were ended, and had nothing left to publish.
        left: the rows that were left in the end.
        faults: the number of times of each fault.
    """

    meant: set[str] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    done: dict[str, int] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    parked: set[str] = field(default_factory=set)
    drained: set[str] = field(default_factory=set)
    left: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> set[str]:
        """The events that are owed, and of which something is missing.

        Those reported as published, those that were processed, and all of a publisher that ended
        with nothing left.
        """
        owed = self.published | set(self.done)
        owed |= {each for each in self.meant if each.partition("-")[0] in self.drained}
        return owed - (set(self.done) & self.followed)

    @property
    def is_clean(self) -> bool:
        """Whether all is as it should be, and something has happened."""
        wrong = self.lost or self.invented or self.parked or self.left
        return not wrong and bool(self.published) and len(self.drained) == _PUBLISHERS

    @property
    def invented(self) -> set[str]:
        """The events that were processed, but never enqueued."""
        return (set(self.done) | self.followed) - self.meant


class _Ground:
    """A server, the processes that use it, and what may happen to them."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self._server = SERVERS[kind]().start()
        self._kind = kind
        self._folder = folder
        self._chosen = random.Random(seed)
        self._engine: Engine = create_engine(self._server.url, poolclass=NullPool)
        Store(self._engine).create()
        self._started = 0
        self._workers = [self._worker() for _ in range(_WORKERS)]
        self._wait_for_queues()
        self._publishers = [self._publisher() for _ in range(_PUBLISHERS)]

    def _worker(self) -> subprocess.Popen[bytes]:
        return self._process(WORKER, "worker", str(LEASE))

    def _publisher(self) -> subprocess.Popen[bytes]:
        seed = str(self._chosen.randrange(1 << 30))
        return self._process(PUBLISHER, "publisher", f"p{self._started}", seed)

    def _process(self, program: str, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        self._started += 1
        path = self._folder / f"{self._started}-{what}"
        with open(f"{path}.err", "wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", program, self._server.url, str(path), *arguments],
                stdin=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )

    def _wait_for_queues(self) -> None:
        deadline = time.monotonic() + 60
        while self._number("SELECT count(*) FROM outbox_bindings") < 7:
            if time.monotonic() > deadline:
                raise TimeoutError("no worker has created the queues")
            time.sleep(0.05)

    def _number(self, statement: str) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(text(statement)).scalar_one())

    def happen(self) -> str:
        """Have one thing go wrong; return what."""
        faults = [self._kill_worker, self._kill_publisher, self._cut, self._restart, self._freeze]
        fault = self._chosen.choices(faults, (4, 2, 4, 1, 1))[0]
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
        self._server.kill()
        time.sleep(self._chosen.random() * 2)
        self._server.start()

    def _freeze(self) -> None:
        self._server.pause()
        time.sleep(self._chosen.random() * 2)
        self._server.resume()

    def settle(self) -> int:
        """Let the publishers end and the workers finish; return the number of rows left."""
        for publisher in self._publishers:
            _end(publisher)
        deadline = time.monotonic() + _SETTLED_WITHIN
        while (left := self._number("SELECT count(*) FROM outbox_events")) > 0:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for worker in self._workers:
            _end(worker)
        return left

    def close(self) -> None:
        for process in [*self._workers, *self._publishers]:
            _kill(process)
        self._engine.dispose()
        self._server.stop()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(b"", timeout=90)


def prove(kind: str, folder: Path, *, seconds: float, seed: int, pause: float = 1.0) -> Ledger:
    """Run for ``seconds``, with a fault about every ``pause`` seconds; return what happened."""
    ledger = Ledger()
    ground = _Ground(kind, folder, seed)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(pause * (0.5 + random.random()))
            what = ground.happen()
            ledger.faults[what] = ledger.faults.get(what, 0) + 1
        ledger.left = ground.settle()
    finally:
        ground.close()
    for what, name in _records(folder):
        if what == "done":
            ledger.done[name] = ledger.done.get(name, 0) + 1
        elif what in ("meant", "published", "followed", "parked", "drained"):
            getattr(ledger, what).add(name)
    return ledger


def _records(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        if path.suffix != ".err":
            for line in path.read_text().splitlines():
                what, _, name = line.partition(" ")
                yield what, name


def main() -> int:
    """Prove it, print the ledger, and return 1 if there are findings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=SERVERS, default="postgresql")
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default: 1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ledger = prove(options.kind, Path(name), seconds=options.seconds, seed=options.seed)
    again = sum(times - 1 for times in ledger.done.values())
    print(
        f"{options.kind}: {len(ledger.published):,} of {len(ledger.meant):,} events published, "
        f"{len(ledger.done):,} processed, {again:,} of them again; "
        + ", ".join(f"{what}: {times}" for what, times in sorted(ledger.faults.items()))
    )
    print(
        f"lost {len(ledger.lost)}, invented {len(ledger.invented)}, parked {len(ledger.parked)}, "
        f"rows left {ledger.left}, {len(ledger.drained)} of {_PUBLISHERS} publishers drained"
    )
    return int(not ledger.is_clean)


if __name__ == "__main__":
    sys.exit(main())
