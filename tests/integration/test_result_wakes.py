"""How those who wait for the result of a task learn that it is there."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

import outbox.sql
from outbox.results import results_reader
from outbox.results.open_results import results_store_of
from outbox.results.result_row import ResultRow
from outbox.results.results_reader import ResultsReader
from outbox.results.results_store import ResultsStore
from outbox.results.results_writer import ResultsWriter
from outbox.settings import Settings
from outbox.storage.engines import open_engine, open_sqlite
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

NEVER = 30.0

ReaderAt = Callable[[str], ResultsReader]
Wait = Callable[[ResultsReader, str, float], "ResultRow | None"]


@pytest.fixture
def engine(postgresql_url: str) -> Iterator[Engine]:
    engine = open_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait look once, and then only if there was a notification."""
    monkeypatch.setattr(results_reader, "_SHORTEST", NEVER)
    monkeypatch.setattr(results_reader, "_LONGEST", (NEVER, NEVER))
    monkeypatch.setattr(results_reader, "_LISTENING", NEVER)


def ended(id_: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("error_type", "error", "traceback"))
    return {
        **nothing,
        "id": id_,
        "task": "shop:pay",
        "queue": "tasks",
        "status": "succeeded",
        "attempt": 1,
        "token": "",
        "value": "42",
        "is_typed": 0,
        "is_over": 1,
        "keep": 60.0,
    }


@pytest.fixture
def reader_at() -> Iterator[ReaderAt]:
    """Returns what reads the results in the database with a URL."""
    stores: list[ResultsStore] = []

    def open_reader(url: str) -> ResultsReader:
        store = results_store_of(Settings.load(None, {"results": url}))
        assert store is not None
        stores.append(store)
        return ResultsReader(store)

    yield open_reader
    for store in stores:
        store.engine.dispose()


@pytest.fixture
def writer(engine: Engine) -> Iterator[ResultsWriter]:
    writer = ResultsWriter(ResultsStore(engine))
    writer.start()
    yield writer
    writer.stop(time.monotonic() + 5)


def wait_here(reader: ResultsReader, id_: str, timeout: float) -> ResultRow | None:
    return reader.wait(id_, timeout)


def wait_in_loop(reader: ResultsReader, id_: str, timeout: float) -> ResultRow | None:
    return asyncio.run(reader.wait_async(id_, timeout))


@pytest.mark.usefixtures("looks_once")
@pytest.mark.parametrize("wait", [wait_here, wait_in_loop])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_notifications_wake_those_who_wait_and_then_nothing_stays_open(
    postgresql_url: str,
    reader_at: ReaderAt,
    writer: ResultsWriter,
    wait: Wait,
    driver: str,
) -> None:
    url = make_url(postgresql_url).set(drivername=f"postgresql+{driver}")
    url = url.update_query_dict({"application_name": uuid.uuid4().hex})
    reader = reader_at(url.render_as_string(hide_password=False))
    for _ in range(2):  # it listens anew after it has ended
        ids = [str(uuid.uuid4()) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            waits = [pool.submit(wait, reader, id_, 2 * NEVER) for id_ in ids]
            wait_until(lambda: reader._listener.is_proven)
            began = time.monotonic()
            for id_ in ids[:3]:
                writer.end(ended(id_))
            assert writer.store.cancel(ids[3])
            rows = [each.result(NEVER) for each in waits]
            assert time.monotonic() - began < NEVER / 3
        assert [row.status for row in rows if row] == [*["succeeded"] * 3, "cancelled"]
        wait_until(lambda: reader._listener._listener is None)
        wait_until(lambda: not any(t.name == "outbox-listen" for t in threading.enumerate()))
    reader._store.engine.dispose()
    # In a transaction, it would see the same connections each time.
    looking = create_engine(postgresql_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with looking.connect() as connection:
        names = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"
        name = {"name": url.query["application_name"]}
        wait_until(lambda: connection.execute(text(names), name).scalar_one() == 0)


def test_behind_a_pooler_who_waits_looks_for_himself(
    pooled_url: str,
    reader_at: ReaderAt,
    writer: ResultsWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = reader_at(pooled_url)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.wait, "a", NEVER)
        wait_until(lambda: "LISTEN failed" in caplog.text)
        assert "?listen=" in caplog.text
        began = time.monotonic()
        writer.end(ended("a"))
        row = waiting.result(NEVER)
    assert row is not None
    assert time.monotonic() - began < 5
    assert not reader._listener.is_proven
    reader._listener._until = 0.0


@pytest.mark.usefixtures("looks_once")
def test_the_url_says_where_to_listen(
    pooled_url: str,
    postgresql_url: str,
    reader_at: ReaderAt,
    writer: ResultsWriter,
) -> None:
    url = make_url(pooled_url).update_query_dict({"listen": postgresql_url})
    reader = reader_at(url.render_as_string(hide_password=False))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.wait, "a", NEVER)
        wait_until(lambda: reader._listener.is_proven)
        writer.end(ended("a"))
        row = waiting.result(NEVER / 3)
    assert row is not None


@pytest.mark.usefixtures("engine")
def test_nobody_listens_if_the_url_says_so(postgresql_url: str, reader_at: ReaderAt) -> None:
    assert reader_at(f"{postgresql_url}?listen=no").wait("a", 0.05) is None
    assert not any(thread.name == "outbox-listen" for thread in threading.enumerate())


def test_a_file_is_read_when_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.db"
    store = ResultsStore(open_sqlite(str(path)))
    store.prepare()
    reader = ResultsReader(store)
    monkeypatch.setattr(results_reader, "_FILE_ANYWAY", NEVER)
    looks = reader._looks()

    def age() -> None:
        for each in (path, Path(f"{path}-wal")):
            os.utime(each, (time.time() - 60, time.time() - 60))

    age()
    assert [looks.is_due() for _ in range(3)] == [True, False, False]
    store.write([], [ended("a")])
    assert [looks.is_due() for _ in range(3)] == [True, True, True]  # it may be written again
    age()
    assert [looks.is_due() for _ in range(3)] == [True, False, False]
    age()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.wait, "b", NEVER)
        time.sleep(0.1)
        store.write([], [ended("b")])
        row = waiting.result(5)
    assert row is not None
    assert row.value == "42"
    store.engine.dispose()
