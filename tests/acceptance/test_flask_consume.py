"""``flask outbox consume``: handlers run in contexts of the application."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from outbox import Event, Publisher
from tests.places import SQLitePlace
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

PROJECT = """
import os
from pathlib import Path

from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.flask import Outbox


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
outbox = Outbox(db=db)


class Effect(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def create_app():
    app = Flask("shop", instance_path=str(Path.cwd()))
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///shop.db"
    app.config["OUTBOX_URL"] = {url!r}
    app.config["OUTBOX_EXCHANGE"] = "shop"
    db.init_app(app)
    outbox.init_app(app)
    with app.app_context():
        db.create_all()
    return app
"""

CONSUMERS = """
import asyncio

from flask import current_app, g

from outbox import enqueue_event
from outbox.consumers import Consumer, RetryPolicy
from shop import Effect, db


class Work(Consumer):
    queue = "work"
    retry = None

    def process(self, event):
        assert current_app.name == "shop"
        assert not hasattr(g, "seen"), "the context of another message"
        g.seen = True
        db.session.add(Effect(name=event.payload))
        enqueue_event(event.payload, "work.done")
        if event.payload == "fail":
            raise ValueError
        if event.payload != "forget":
            db.session.commit()

    def on_dead(self, event, reason):
        db.session.add(Effect(name=f"dead {event.payload}"))
        db.session.commit()


class AsyncWork(Consumer):
    queue = "asyncwork"

    async def process(self, event):
        await asyncio.sleep(0)
        db.session.add(Effect(name=f"async {current_app.name}"))
        enqueue_event(event.payload, "async.done")
        db.session.commit()
"""


@pytest.fixture
def place(tmp_path: Path) -> SQLitePlace:
    place = SQLitePlace(str(tmp_path / "broker.db"), "shop")
    place.bind("done", "shop", "*.done")
    (tmp_path / "shop.py").write_text(PROJECT.format(url=place.url))
    (tmp_path / "consumers.py").write_text(CONSUMERS)
    return place


@contextmanager
def consuming(folder: Path, *options: str) -> Iterator[Path]:
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flask",
                "--app",
                "shop",
                "outbox",
                "consume",
                "consumers",
                *list(options),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "consuming 'work'" in log.read_text(), 30)
        yield log
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: it and its workers
            process.wait(10)


def effects(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        return sorted(name for (name,) in connection.execute("SELECT name FROM effect"))


def send(place: SQLitePlace, queue: str, *payloads: Any) -> None:
    with Publisher(place.url) as publisher:
        events = [
            Event(f"{queue}-{number}", queue, "", json.dumps(payload).encode())
            for number, payload in enumerate(payloads)
        ]
        publisher.publish(events).raise_for_failure()


def done(place: SQLitePlace) -> list[Any]:
    rows = place.execute("SELECT payload FROM outbox_events WHERE queue = 'done' ORDER BY seq")
    return sorted(json.loads(payload) for (payload,) in rows)


@pytest.mark.parametrize(
    "options", [[], ["-p", "1"], ["--isolate", "process"]], ids=["plain", "processes", "isolated"]
)
@pytest.mark.slow
def test_each_message_has_a_context_of_the_application(
    options: list[str], place: SQLitePlace, tmp_path: Path
) -> None:
    with consuming(tmp_path, "-t", "2", *options) as log:
        send(place, "work", "one", "two", "fail", "forget")
        send(place, "asyncwork", "three")
        expected = ["async shop", "dead fail", "dead forget", "one", "two"]
        try:
            wait_until(lambda: effects(tmp_path) == expected, 30)
            wait_until(lambda: done(place) == ["one", "three", "two"], 30)
        except AssertionError:
            raise AssertionError(log.read_text()) from None
        wait_until(lambda: place.count("work.dead") == 2)  # the callbacks come before
        assert "stored event(s) uncommitted" in log.read_text()


def test_the_doctor_looks_at_the_application(place: SQLitePlace, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flask", "--app", "shop", "outbox", "doctor", "consumers"]
    done = subprocess.run(
        [*command, "--json", "--fail-on", "error"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    texts = [each["text"] for each in report["findings"]]
    assert len(texts) == 2
    assert all("Work has no timeout" in each for each in texts)
    assert {"OBX101", "OBX201", "OBX204", "OBX206"} <= set(report["passed"])


def test_the_command_has_the_options_of_outbox_consume(place: SQLitePlace, tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "shop", "outbox", "consume", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: flask outbox consume")
    assert "--shutdown-timeout" in shown.stdout
