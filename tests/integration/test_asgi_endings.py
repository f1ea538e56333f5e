"""How requests end in FastAPI, Starlette and Litestar, and what is delivered then.

Each application serves all rows of the table, and has ended, before the broker's file and the
databases are looked at. The pages of the frameworks show the same table.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import create_engine, text
from websockets.sync.client import connect

from outbox.sql import Relay
from tests.conftest import database_of_kind
from tests.integration.test_servers import APPS, Served
from tests.places import SQLitePlace, reading
from tests.relaying import is_empty, opened, running
from tests.waiting import wait_until

# What ends how depends on the framework, and not on the Python version.
pytestmark = pytest.mark.one_python

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ["fastapi", "litestar", "starlette"]


class Ending(NamedTuple):
    """A row of the table: how a request ends, and what it leaves behind.

    Attributes:
        title: how it ends.
        status: the status that its client sees; None if there is none.
        says: what becomes of the events.
        delivered: the targets of the events that reach the broker.
        committed: the names of the orders in the database.
    """

    title: str
    status: int | None
    says: str
    delivered: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()


COLLECTED = {
    "success": Ending("it succeeds", 201, "delivered", ("success",)),
    "returned_409": Ending("it returns a status of 400 or more", 409, "dropped"),
    "raised_404": Ending("it raises the framework's `HTTPException`", 404, "dropped"),
    "exception": Ending("it raises any other exception", 500, "dropped"),
    "handled_as_422": Ending("an exception handler responds with an error", 422, "dropped"),
    "handled_as_200": Ending(
        "an exception handler responds with a success",
        200,
        "**delivered**: the status decides",
        ("handled_as_200",),
    ),
    "caught": Ending("it catches the exception", 200, "delivered", ("caught",)),
    "savepoint": Ending(
        "a `savepoint()` in it is rolled back",
        200,
        "delivered, without those of the savepoint",
        ("savepoint.around",),
    ),
    "block": Ending(
        "it fails after `auto_publishing(independent=True)`",
        409,
        "those of the block are delivered",
        ("block",),
    ),
    "thread": Ending("it enqueues in a thread of the pool", 200, "delivered", ("thread",)),
    "stream": Ending(
        "its stream ends well", 200, "delivered", ("stream", "stream.first", "stream.second")
    ),
    "sync_stream": Ending(
        "a stream of a synchronous generator ends well",
        200,
        "delivered",
        ("sync_stream", "sync_stream.part"),
    ),
    "stream_breaks": Ending(
        "its stream breaks half-way",
        200,
        "dropped, except those of independent blocks",
        ("stream_breaks.step",),
    ),
    "disconnect": Ending(
        "the client leaves half-way through a stream",
        200,
        "dropped, except those of independent blocks",
        ("disconnect.step",),
    ),
    "background": Ending(
        "a background task ends well",
        200,
        "delivered after the task, with the task's",
        ("background", "background.task"),
    ),
    "background_fails": Ending(
        "a background task fails",
        200,
        "**dropped**, the endpoint's too, except those of independent blocks",
        ("background_fails.step",),
    ),
    "task_after": Ending(
        "a task of `asyncio.create_task` outlives it",
        200,
        "those of the task are refused (`CollectorClosed`); those of blocks in it are delivered",
        ("task_after", "task_after.block"),
    ),
    "mounted/": Ending(
        "a mounted application has the middleware, too", 200, "delivered, once", ("mounted",)
    ),
    "only_mounted/mounted/": Ending(
        "only a mounted application has the middleware", 200, "delivered", ("only_mounted",)
    ),
    "base_above/": Ending(
        "a `BaseHTTPMiddleware` is around outbox's", 200, "delivered", ("base_above",)
    ),
    "base_below/": Ending(
        "a `BaseHTTPMiddleware` is inside outbox's", 200, "delivered", ("base_below",)
    ),
    "commit_is_caught": Ending(
        "a commit fails, and the endpoint catches that",
        200,
        "**delivered**, although nothing was committed; not if stored",
        ("commit_is_caught.collected",),
    ),
    "websocket": Ending(
        "a WebSocket connection ends",
        None,
        "those of a block per message are delivered at its end, others when the connection ends",
        ("websocket.connection", "websocket.message", "websocket.message"),
    ),
    "lifespan": Ending(
        "the server starts and stops",
        None,
        "those of startup and shutdown are delivered when these are complete",
        ("lifespan.startup", "lifespan.shutdown"),
    ),
}
STORED = {
    "stored": Ending("it succeeds", 201, "committed and delivered", ("stored",), ("stored",)),
    "stored_returned_409": Ending(
        "it returns a status of 400 or more",
        409,
        "committed and delivered; collected events are **dropped** although the data is there",
        ("stored_returned_409.stored",),
        ("stored_returned_409",),
    ),
    "stored_raised_404": Ending("it raises the framework's `HTTPException`", 404, "rolled back"),
    "stored_exception": Ending("it raises any other exception", 500, "rolled back"),
    "stored_savepoint": Ending(
        "`begin_nested()` in it is rolled back",
        200,
        "committed and delivered, without those of the savepoint",
        ("stored_savepoint.around",),
        ("stored_savepoint.around",),
    ),
    "commit_fails": Ending("the commit fails", 500, "rolled back, and collected events dropped"),
    "bound": Ending(
        "the session is bound with `outbox.sql.bind()`, also for threads of the pool",
        409,
        "committed and delivered",
        ("bound", "bound.thread"),
        ("bound",),
    ),
    "sync_endpoint": Ending(
        "a synchronous endpoint uses a synchronous session",
        200,
        "committed and delivered",
        ("sync_endpoint",),
        ("sync_endpoint",),
    ),
    "stored_stream": Ending(
        "its stream commits in each step, and breaks half-way",
        200,
        "those of the steps before are committed and delivered",
        ("stored_stream.first",),
        ("stored_stream.first",),
    ),
    "stored_background": Ending(
        "a background task commits in a session made in it, and fails then",
        200,
        "committed and delivered",
        ("stored_background",),
        ("stored_background",),
    ),
    "stored_then_background_fails": Ending(
        "a background task fails after the commit of the request",
        200,
        "committed and delivered; collected events are dropped",
        ("stored_then_background_fails.stored",),
        ("stored_then_background_fails",),
    ),
    "two_databases": Ending(
        "of two databases, the other one is rolled back",
        200,
        "follow the session that they were given",
        ("two_databases.archive",),
    ),
}
ONLY = {
    "fastapi": {
        "commit_fails": Ending(
            "the commit fails, **after the response**",
            201,
            "rolled back, and collected events dropped",
        ),
        "stored_then_background_fails": Ending(
            "a background task fails, **before the commit**", 200, "rolled back"
        ),
        "function_scope": Ending(
            'the commit fails, with `scope="function"`',
            500,
            "rolled back, and collected events dropped",
        ),
        "function_scope_then_background_fails": Ending(
            'a background task fails, with `scope="function"`',
            200,
            "committed and delivered; collected events are dropped",
            ("function_scope_then_background_fails.stored",),
            ("function_scope_then_background_fails",),
        ),
    },
    "starlette": {},
    "litestar": {
        "as_middleware/": Ending(
            "with `Litestar(middleware=[OutboxMiddleware])`", 200, "delivered", ("as_middleware",)
        ),
        "as_middleware/fails": Ending("the same, and it raises an exception", 500, "dropped"),
    },
}
ELSEWHERE = {"disconnect", "websocket", "lifespan"}
"""Rows that not every client can ask for."""


def tables(framework: str) -> list[dict[str, Ending]]:
    """Return a framework's rows: of collected events, of stored ones."""
    only = ONLY[framework]
    collected = {**COLLECTED, **{row: each for row, each in only.items() if not is_stored(row)}}
    return [collected, {**STORED, **{row: each for row, each in only.items() if is_stored(row)}}]


def is_stored(row: str) -> bool:
    return not row.startswith("as_middleware")


class Left(NamedTuple):
    """What a row has left behind, in alphabetical order."""

    delivered: list[str]
    committed: list[str]


def by_row(targets: list[str], names: list[str]) -> dict[str, Left]:
    def of(row: str, all_names: list[str]) -> list[str]:
        return sorted(name for name in all_names if name.split(".")[0] == row)

    rows = sorted({name.split(".")[0] for name in targets + names})
    return {row: Left(of(row, targets), of(row, names)) for row in rows}


def expected(framework: str, *without: str) -> dict[str, Left]:
    endings = [
        ending for table in tables(framework) for row, ending in table.items() if row not in without
    ]
    return by_row(
        [target for ending in endings for target in ending.delivered],
        [name for ending in endings for name in ending.committed],
    )


def requested(framework: str) -> dict[str, int | None]:
    """Return the paths of the rows that every client can ask for, with their statuses."""
    return {
        row: ending.status
        for table in tables(framework)
        for row, ending in table.items()
        if row not in ELSEWHERE
    }


@pytest.fixture
def broker(tmp_path: Path) -> SQLitePlace:
    place = SQLitePlace(str(tmp_path / "broker.db"), "outbox")
    place.bind("everything", "outbox", "#")
    return place


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that has a driver for asyncio here."""
    return database_of_kind(request, tmp_path)


@pytest.fixture
def left_behind(
    broker: SQLitePlace, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, Left]]:
    """What has reached the broker, and what was committed, once the application has ended."""
    shop_url = database_url.replace("postgresql:", "postgresql+psycopg:")
    archive_url = f"sqlite:///{tmp_path}/archive.db"
    monkeypatch.setenv("SHOP_URL", shop_url)
    monkeypatch.setenv("ARCHIVE_URL", archive_url)
    monkeypatch.setenv("OUTBOX_URL", broker.url)

    def look() -> dict[str, Left]:
        for url in (shop_url, archive_url):
            store = opened(url)
            with broker.publisher() as publisher, running(Relay(store, publisher)):
                wait_until(partial(is_empty, store), 20)
            store.engine.dispose()
        count = broker.count("everything")
        with reading(broker, "everything", again=True) as reader:
            targets = [delivery.target for delivery in reader.get(count)]
        engine = create_engine(shop_url)
        with engine.connect() as connection:
            names = list(connection.scalars(text("SELECT name FROM orders")))
        engine.dispose()
        return by_row(targets, names)

    return look


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("client", ["TestClient", "httpx"])
def test_what_is_committed_is_delivered_in_this_process(
    framework: str, client: str, left_behind: Callable[[], dict[str, Left]]
) -> None:
    statuses = requested(framework)
    program = [f"{APPS}.ending_requests", f"{APPS}.{framework}_endings", client, *statuses]
    done = subprocess.run(
        [sys.executable, "-m", *program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == statuses
    without = ("disconnect",) if client == "TestClient" else ELSEWHERE
    assert left_behind() == expected(framework, *without), done.stderr


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
@pytest.mark.slow
def test_what_is_committed_is_delivered_on_a_server(
    framework: str,
    server: str,
    broker: SQLitePlace,
    tmp_path: Path,
    left_behind: Callable[[], dict[str, Left]],
) -> None:
    statuses: dict[str, int | None] = {}
    served = Served([server, f"{APPS}.{framework}_endings:app"], broker.url, "outbox", tmp_path)
    try:
        for path in requested(framework):
            try:
                statuses[path] = served.get(f"/{path}")[0]
            except (OSError, http.client.HTTPException):  # a stream that breaks off
                statuses[path] = 200
        with served.connect() as client:
            client.sendall(b"GET /disconnect HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1000)
        with connect(f"ws://127.0.0.1:{served.port}/websocket") as connection:
            for _ in range(2):
                connection.send("a message")
                assert connection.recv() == "done"
        # A task after its response goes on for a while: a server that ends meanwhile ends it, too.
        last = "SELECT 1 FROM outbox_events WHERE type = 'task_after.block'"
        wait_until(lambda: broker.execute(last), 20)
        assert served.stop() in (0, -signal.SIGTERM), served.log
    finally:
        served.stop()
    assert statuses == requested(framework)
    assert left_behind() == expected(framework), served.log


def shown(table: dict[str, Ending]) -> list[str]:
    return [
        f"| {ending.title} | {ending.status or ''} | {ending.says} |" for ending in table.values()
    ]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_page_of_a_framework_shows_its_table_of_endings(framework: str) -> None:
    page = (ROOT / "docs" / f"{framework}.md").read_text()
    section = page.partition("\n## How a request ends\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    assert [row for row in rows if not row.startswith(("| ---", "| how it ends"))] == [
        row for table in tables(framework) for row in shown(table)
    ]
