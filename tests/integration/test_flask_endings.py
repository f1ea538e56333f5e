"""Every way in which work in a Flask application ends: what is committed is delivered."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from flask import Flask
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from outbox import enqueue_event, sinks
from outbox.sql import handover
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from tests.integration.apps import flask_endings
from tests.integration.apps.flask_endings import create_app, db, order
from tests.integration.test_servers import Served
from tests.places import SQLitePlace
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
APP = "tests.integration.apps.flask_endings:create_app"

# The request; the status of its response; the orders that it commits; events without one.
ENDINGS: dict[str, tuple[int, list[str], list[str]]] = {
    "commit": (200, ["commit"], []),
    "event-first": (200, ["event-first"], []),
    "no-commit": (200, [], []),
    "never-touches-the-session": (200, [], []),
    "exception": (500, [], []),
    "exception-after-commit": (500, ["exception-after-commit"], []),
    "status-4xx-after-commit": (409, ["status-4xx-after-commit"], []),
    "abort": (404, [], []),
    "rollback": (200, [], []),
    "flushed-rollback": (200, [], []),
    "caught": (200, ["caught-then"], []),
    "savepoint": (200, ["outer"], []),
    "no-transaction": (200, [], ["no-transaction"]),
    "no-transaction-4xx": (409, [], []),
    "no-transaction-block-4xx": (409, [], ["block"]),
    "error-handler": (402, [], []),
    "error-handler-commits": (402, ["refusal"], []),
    "after-request-raises": (500, ["after-request-raises"], []),
    "after-request-commits": (200, ["after-request-commits"], []),
    "stream": (200, ["stream"], []),
    "stream-fails": (200, ["stream-first"], []),
    "stream-without-transaction": (200, [], ["streamed"]),
    "nested-context": (200, ["nested"], []),
    "thread": (409, ["thread"], []),
    "thread-without-transaction": (409, [], ["thread-alone"]),
    "request-context-in-thread": (200, ["copied"], []),
    "async-view": (200, ["async"], []),
    "async-view-fails": (500, [], []),
    "two-databases": (200, [], []),
    "alone-caught": (200, [], ["alone-caught"]),
    "alone-abort": (404, [], []),
    "alone-error-handler": (402, [], []),
    "alone-after-request-raises": (500, [], []),
    "alone-stream-fails": (200, [], []),
    "alone-nested-context": (200, [], ["alone-nested"]),
    "alone-request-context-in-thread": (409, [], ["alone-copied"]),
    "alone-async-view": (200, [], ["alone-async"]),
}


@pytest.fixture(autouse=True)
def unbound() -> Iterator[None]:
    """Nothing of the applications remains in the process."""
    yield
    sinks.bind(None)


@dataclass
class Shop:
    """A database and a broker, and what an application has done with them."""

    engine: Engine
    broker: SQLitePlace
    environment: dict[str, str] = field(repr=False)

    def forget(self) -> None:
        """Begin with nothing ordered and nothing delivered."""
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM orders"))
            connection.execute(text("DELETE FROM outbox_events"))
        self.broker.execute("DELETE FROM outbox_events")

    def orders(self) -> list[str]:
        with self.engine.begin() as connection:
            return list(connection.execute(text("SELECT name FROM orders ORDER BY id")).scalars())

    def waiting(self) -> int:
        with self.engine.begin() as connection:
            count: int = connection.execute(text("SELECT count(*) FROM outbox_events")).scalar_one()
            return count

    def delivered(self) -> list[Any]:
        """Return the payloads of the delivered events, once no stored one waits."""
        wait_until(lambda: self.waiting() == 0, 20)
        rows = self.broker.execute("SELECT payload FROM outbox_events ORDER BY seq")
        return [json.loads(payload) for (payload,) in rows]

    def flask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flask", "--app", APP, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def script(self, program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


@contextmanager
def database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/shop.db"
        return
    server: PrivatePostgreSQL = request.getfixturevalue("postgresql")
    name = "flask_endings"
    admin = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = make_url(server.url).set(database=name)
    yield url.render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    broker = SQLitePlace(str(folder / "broker.db"), "shop")
    broker.bind("everything", "shop", "#")
    with database(request.param, request, folder) as url, pytest.MonkeyPatch.context() as patch:
        environment = {
            "SHOP_FOLDER": str(folder),
            "SHOP_DATABASE": url,
            "SHOP_OTHER": f"sqlite:///{folder}/other.db",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(handover, "_LINGER", 0.05)  # or each test would wait for its thread
        with create_app().app_context():
            db.create_all()
            for engine in db.engines.values():
                engine.dispose()
        environment |= {"OUTBOX_URL": broker.url, "OUTBOX_EXCHANGE": "shop"}
        engine = create_engine(url, poolclass=NullPool)
        yield Shop(engine, broker, environment)


@pytest.fixture
def app(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    for name, value in shop.environment.items():
        monkeypatch.setenv(name, value)
    shop.forget()
    app = create_app()
    yield app
    with app.app_context():
        flask_endings.outbox.publisher.close()
        for engine in db.engines.values():
            engine.dispose()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_request_of_the_test_client(ending: str, app: Flask, shop: Shop) -> None:
    status, orders, alone = ENDINGS[ending]
    client = app.test_client()
    if ending.endswith("stream-fails"):
        with pytest.raises(ValueError), closing(client.get(f"/{ending}")) as response:
            response.get_data()
    else:
        assert client.get(f"/{ending}", buffered=True).status_code == status
    assert shop.orders() == orders
    assert shop.delivered() == orders + alone


SERVERS = {
    "gunicorn": ["gunicorn", "--threads", "4", f"{APP}()"],
    "waitress": ["waitress", "--call", APP],
}


@pytest.fixture(scope="module", params=SERVERS)
def served(
    request: pytest.FixtureRequest, shop: Shop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    command = SERVERS[request.param]
    served = Served(command, shop.broker.url, "shop", tmp_path_factory.mktemp("server"))
    yield served
    assert served.stop() == 0, served.log


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_request_to_a_server(ending: str, served: Served, shop: Shop) -> None:
    shop.forget()
    status, orders, alone = ENDINGS[ending]
    if ending.endswith("stream-fails"):
        with pytest.raises(Exception):  # noqa: B017  the server ends the connection
            served.get(f"/{ending}")
    else:
        assert served.get(f"/{ending}")[0] == status
    assert shop.orders() == orders
    assert shop.delivered() == orders + alone


@pytest.mark.parametrize(
    ("command", "code", "orders", "alone"),
    [
        (["place", "one"], 0, ["one"], []),
        (["forget"], 0, [], []),
        (["fail"], 1, [], []),
        (["announce"], 0, [], ["announced None False"]),
        (["announce", "--exit", "0"], 0, [], ["announced 0 False"]),
        (["announce", "--exit", "3"], 3, [], []),
        (["announce", "--fail"], 1, [], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command(
    command: list[str], code: int, orders: list[str], alone: list[str], shop: Shop
) -> None:
    shop.forget()
    done = shop.flask(*command)
    assert done.returncode == code, done.stderr
    assert shop.orders() == orders
    assert shop.delivered() == orders + alone


def test_a_command_of_the_cli_runner(app: Flask, shop: Shop) -> None:
    runner = app.test_cli_runner()
    assert runner.invoke(args=["place", "two"]).exit_code == 0
    assert runner.invoke(args=["announce"]).exit_code == 0
    assert runner.invoke(args=["announce", "--fail"]).exit_code == 1
    assert shop.orders() == ["two"]
    assert sorted(shop.delivered()) == ["announced None False", "two"]


SCRIPT = """
from outbox import enqueue_event
from tests.integration.apps.flask_endings import create_app, db, order

app = create_app()
with app.app_context():
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code", "orders", "alone"),
    [
        ("order('script'); db.session.commit()", 0, ["script"], []),
        ("order('script')", 0, [], []),
        ("order('script'); db.session.commit(); 1 / 0", 1, ["script"], []),
        ("enqueue_event('alone', 'order.placed', session=None)", 0, [], ["alone"]),
        ("enqueue_event('alone', 'order.placed', session=None); 1 / 0", 1, [], []),
    ],
)
def test_a_script(body: str, code: int, orders: list[str], alone: list[str], shop: Shop) -> None:
    shop.forget()
    done = shop.script(SCRIPT.format(body=body))
    assert done.returncode == code, done.stderr
    assert shop.orders() == orders
    assert shop.delivered() == orders + alone


def test_what_was_committed_by_a_process_that_was_killed_is_published_by_the_relay(
    shop: Shop,
) -> None:
    shop.forget()
    killed = "order('killed'); db.session.commit(); import os; os.kill(os.getpid(), 9)"
    setting = "import os; os.environ['OUTBOX_AFTER_COMMIT'] = 'nothing'\n"
    assert shop.script(setting + SCRIPT.format(body=killed)).returncode == -9
    assert (shop.orders(), shop.waiting()) == (["killed"], 1)
    status = shop.flask("outbox", "status")
    assert "1 event waiting" in status.stdout, status.stderr
    done = shop.flask("outbox", "relay", "--once")
    assert (done.returncode, done.stdout) == (0, "1 event published\n"), done.stderr
    assert shop.delivered() == ["killed"]


def celery_with(app: Flask) -> Celery:
    """Return Celery as the documentation of Flask sets it up."""

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *arguments: object) -> object:
            with app.app_context():
                return self.run(*arguments)

    return Celery(app.name, task_cls=FlaskTask)


def test_a_celery_task(app: Flask, shop: Shop) -> None:
    celery = celery_with(app)

    @celery.task  # type: ignore[untyped-decorator]
    def work(name: str, commits: bool) -> None:
        order(name)
        enqueue_event(f"{name} alone", "order.placed", session=None)
        if not commits:
            raise ValueError
        db.session.commit()

    work.apply(("kept", True))
    assert work.apply(("lost", False)).failed()
    assert shop.orders() == ["kept"]
    assert sorted(shop.delivered()) == ["kept", "kept alone"]


def test_a_session_that_ends_without_a_commit_is_named_in_the_log(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    client = app.test_client()
    client.get("/never-touches-the-session")
    [record] = [one for one in caplog.records if "dropped" in one.message]
    assert record.levelno == logging.WARNING
    assert "db.session.commit()" in record.getMessage()
    assert "session=None" in record.getMessage()
    caplog.clear()
    for path in ("/rollback", "/flushed-rollback", "/commit", "/caught", "/savepoint"):
        client.get(path)
    assert not [one for one in caplog.records if one.name == "outbox.sql"]
