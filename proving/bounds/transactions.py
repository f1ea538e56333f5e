"""An application's transactions on MariaDB, beside workers that consume their events there.

python -m proving.bounds.transactions [transactions]

Four threads commit rows of their own with an event each, at the server's default level, REPEATABLE
READ; three processes consume meanwhile. No transaction may fail, and each event is consumed once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox import configure, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent
from outbox.sql import Store
from outbox.testing.databases.mariadb import PrivateMariaDB

__all__: list[str] = []

_WRITERS = 4
_WORKERS = 3
_ARRIVE = 60.0  # seconds at most, after the last commit
_TABLES = (
    "CREATE TABLE orders (id VARCHAR(40) PRIMARY KEY, note TEXT)",
    "CREATE TABLE billed (id VARCHAR(40) PRIMARY KEY, times INTEGER NOT NULL)",
)
_engine: Engine | None = None


class Billing(Consumer):
    """Notes each event in a table, and how often it came."""

    queue = "billing"
    topics = ("order.placed",)

    def process(self, event: ReceivedEvent) -> None:
        """Count the event."""
        global _engine
        if _engine is None:
            _engine = create_engine(os.environ["OUTBOX_URL"])
        with _engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO billed VALUES (:id, 1) ON DUPLICATE KEY UPDATE times = times + 1"
                ),
                {"id": event.id},
            )


@contextlib.contextmanager
def _workers(url: str) -> Iterator[None]:
    command = [sys.executable, "-m", "outbox.consumers", __spec__.name, "--log-level", "ERROR"]
    variables = {**os.environ, "OUTBOX_URL": url, "OUTBOX_EXCHANGE": "shop"}
    workers = [subprocess.Popen(command, env=variables) for _ in range(_WORKERS)]
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)


def _number(engine: Engine, query: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(query)).scalar() or 0)


def _wait_until(engine: Engine, query: str, wanted: int) -> None:
    deadline = time.monotonic() + _ARRIVE
    while _number(engine, query) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)


def _commit(engine: Engine, writer: int, number: int) -> Exception | None:
    """Commit a row with its event; return why that failed."""
    name = f"{writer}-{number}"
    try:
        with Session(engine) as session:
            session.execute(text("INSERT INTO orders VALUES (:id, :id)"), {"id": name})
            enqueue_event({"order": name}, "order.placed", session=session, id=name)
            session.commit()
    except SQLAlchemyError as error:
        return error
    return None


def main() -> None:
    """Commit, and print what became of the transactions and their events."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    each = wanted // _WRITERS
    failed: list[Exception] = []
    with PrivateMariaDB() as server:
        engine = create_engine(server.url)
        Store(engine).create()
        with engine.begin() as connection:
            for table in _TABLES:
                connection.execute(text(table))
        publisher = configure(server.url, exchange="shop")

        def write(writer: int) -> None:
            for number in range(each):
                error = _commit(engine, writer, number)
                if error is not None:
                    failed.append(error)

        with _workers(server.url):
            bound = "SELECT count(*) FROM outbox_bindings WHERE pattern = 'order.placed'"
            _wait_until(engine, bound, 1)
            began = time.monotonic()
            threads = [threading.Thread(target=write, args=(each,)) for each in range(_WRITERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rate = each * _WRITERS / (time.monotonic() - began)
            placed = _number(engine, "SELECT count(*) FROM orders")
            _wait_until(engine, "SELECT count(*) FROM billed", placed)
        publisher.close(5)
        billed = _number(engine, "SELECT count(*) FROM billed")
        again = _number(engine, "SELECT count(*) FROM billed WHERE times > 1")
        engine.dispose()
    print(
        f"{each * _WRITERS} transactions at {rate:,.0f}/s: {len(failed)} failed, {placed} "
        f"committed, {placed - billed} events lost, {again} consumed twice"
    )
    for error in failed[:3]:
        print(f"  {error}")
    sys.exit(1 if failed or placed != billed or again else 0)


if __name__ == "__main__":
    main()
