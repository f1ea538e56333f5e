"""``outbox tasks``: what is kept of tasks, shown and changed."""

from __future__ import annotations

import datetime
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, literal
from sqlalchemy.orm import sessionmaker

import outbox.sql
from outbox import auto_publishing, configure, exit_codes
from outbox.commands.cli import main
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.headers import DEAD_REASON, TASK
from outbox.results.open_results import results_store_of
from outbox.settings import Settings
from outbox.storage import task_statements
from outbox.storage.clock import in_seconds, now
from outbox.storage.engines import open_engine
from outbox.storage.results_table import results
from outbox.storage.store import Store
from outbox.tasks import TaskHandle, schedule
from tests import accounting
from tests.places import DatabasePlace, Place, SQLitePlace, database_place_of
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


@pytest.fixture
def worker(
    place: Place, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    monkeypatch.setenv("OUTBOX_URL", place.url)
    monkeypatch.setenv("OUTBOX_TASKS_QUEUE", name)
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    if not isinstance(place, SQLitePlace):
        monkeypatch.setenv("OUTBOX_RESULTS", f"sqlite:///{tmp_path / 'results.db'}")
    monkeypatch.setenv("OUTBOX_DATABASE_URL", f"sqlite:///{tmp_path / 'inbox.db'}")
    assert main(["sql", "create"]) == 0
    publisher = configure(task_session=sessionmaker())
    accounting.runs.clear()
    accounting.began.clear()
    accounting.may_end.clear()
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=1)
    worker.start()
    yield worker
    assert worker.stop(10)


def test_tasks_are_listed_shown_called_again_cancelled_and_forgotten(
    worker: Worker, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["tasks", *arguments])
        written = capsys.readouterr()
        return code, written.out, written.err

    with auto_publishing():
        added = accounting.add.later(1, b=2)
    added.result(10)
    with auto_publishing():
        failed = accounting.fails.later("no\x1b[2J")
    wait_until(lambda: failed.status == "failed")
    code, out, _ = run("list")
    assert code == exit_codes.SUCCESS
    first, second = out.splitlines()
    assert first.startswith(f"{failed.id}  failed  tests.accounting:fails  20")
    assert first.endswith("ValueError: no\\x1b[2J")
    assert second.startswith(f"{added.id}  succeeded  tests.accounting:add")
    code, out, _ = run("list", "--json", "--status", "succeeded", "--task", "tests.accounting:add")
    shown: dict[str, Any] = json.loads(out)
    assert (shown["id"], shown["args"], shown["value"], shown["queue"]) == (
        added.id,
        {"args": [1], "kwargs": {"b": 2}},
        3,
        name,
    )
    code, out, err = run("show", failed.id, "unknown")
    assert code == exit_codes.UNFINISHED
    assert r'args: {"args": ["no\u001b[2J"]}' in out
    assert "Traceback" in out
    assert "\x1b" not in out
    assert "unknown: nothing is kept of it" in err

    code, out, err = run("retry", failed.id, added.id)
    assert code == exit_codes.UNFINISHED
    assert f"called tests.accounting:fails once more, {failed.id}" in out
    assert f"{added.id}: it is succeeded" in err
    wait_until(lambda: json.loads(run("show", failed.id, "--json")[1])["status"] == "failed")

    later = accounting.add.options(delay=3600)
    configure(task_session=sessionmaker())
    with auto_publishing():
        waiting = later.later(2, 2)
    assert run("cancel", waiting.id)[:2] == (0, f"cancelled {waiting.id}\n")
    code, _, err = run("cancel", added.id)
    assert (code, f"{added.id}: it is succeeded" in err) == (exit_codes.UNFINISHED, True)
    assert run("list", "--status", "cancelled")[1].startswith(f"{waiting.id}  cancelled")
    assert run("forget", "--id", added.id)[:2] == (0, "forgot 1 task\n")
    assert run("forget", "--id", added.id)[0] == exit_codes.UNFINISHED
    assert TaskHandle[int](added.id).status == "unknown"
    assert run("forget")[0] == exit_codes.USAGE


def test_a_task_that_was_cancelled_is_called_again_and_runs_once(
    worker: Worker, place: Place, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with auto_publishing():
        between = accounting.twice.later()
    wait_until(lambda: between.status == "retrying")
    assert between.cancel()
    with auto_publishing():
        held, waiting = accounting.hold.later(), accounting.add.later(2, 3)
    assert accounting.began.wait(10)
    assert waiting.cancel()
    accounting.may_end.set()
    held.result(10)
    wait_until(lambda: json.loads(shown(capsys, waiting.id))["is_dropped"])

    assert main(["tasks", "retry", between.id, waiting.id]) == exit_codes.SUCCESS
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"called tests.accounting:add once more, {waiting.id}"
    configure(task_session=sessionmaker())
    assert TaskHandle[int](waiting.id).result(10) == 5
    assert TaskHandle[int](between.id).result(10) == 2
    runs = [run for run in accounting.runs if run[0] == "twice"]
    if isinstance(place, SQLitePlace):  # its row was deleted
        assert out[0] == f"called tests.accounting:twice once more, {between.id}"
        assert runs == [("twice", 1), ("twice", 1), ("twice", 2)]
    else:
        assert out[0].startswith(f"no longer cancelled: tests.accounting:twice, {between.id}; ")
        assert runs == [("twice", 1), ("twice", 2)]
    wait_until(lambda: place.count(name) == 0)
    assert accounting.runs.count(("add", 2, 3)) == 1
    assert main(["tasks", "retry", between.id]) == exit_codes.UNFINISHED


def test_a_cancelled_task_stays_so_if_it_cannot_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_URL", "amqp://guest:guest@127.0.0.1:1/")
    monkeypatch.setenv("OUTBOX_RESULTS", f"sqlite:///{tmp_path / 'results.db'}")
    store = results_store_of(Settings.load(None, {}))
    assert store is not None
    store.cancel("x", call={"task": "a:b", "queue": "q", "args": '{"args": [1]}'})
    assert main(["tasks", "retry", "x"]) == exit_codes.UNAVAILABLE
    assert "once more" not in capsys.readouterr().out
    row = store.read(["x"])["x"]
    assert (row.status, row.is_dropped, row.queue, row.args) == (
        "cancelled",
        True,
        "q",
        '{"args": [1]}',
    )


def shown(capsys: pytest.CaptureFixture[str], id_: str) -> str:
    capsys.readouterr()
    assert main(["tasks", "show", "--json", id_]) == exit_codes.SUCCESS
    return capsys.readouterr().out


_HOSTILE = {
    "garbage": "garbage",
    "nan": '{"args":[NaN]}',
    "infinite": '{"args":[1e999]}',
    "deep": '{"args":[' + 3000 * "[" + 3000 * "]" + "]}",
    "long": '{"args":[' + 5000 * "9" + "]}",
    "text": '"text"',
}


def test_what_any_program_may_have_sent_is_shown_and_refused_in_one_line(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_engine(database_url)
    outbox.sql.metadata_of(engine.dialect.name).create_all(engine)
    # MariaDB can't hold the year 33715.
    far = 1e11 if engine.dialect.name == "mariadb" else 1e12
    with engine.begin() as connection:
        for id_, args in _HOSTILE.items():
            connection.execute(
                insert(results).values(
                    id=id_,
                    task="a:b",
                    queue="q",
                    status="failed",
                    args=args,
                    enqueued_at=in_seconds(literal(far)),
                    ended_at=now(),
                    kept_until=in_seconds(literal(far)),
                )
            )
    engine.dispose()
    monkeypatch.setenv("OUTBOX_URL", "memory://")
    monkeypatch.setenv("OUTBOX_RESULTS", database_url)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} isn't JSON")

    for command in (["list"], ["show", *_HOSTILE]):
        assert main(["tasks", *command]) == exit_codes.SUCCESS
        assert len(capsys.readouterr().out.splitlines()) >= len(_HOSTILE)
        assert main(["tasks", *command, "--json"]) == exit_codes.SUCCESS
        lines = capsys.readouterr().out.splitlines()
        shown = [json.loads(line, parse_constant=refuse) for line in lines]
        assert {row["id"]: row["args"] for row in shown} == {**_HOSTILE, "text": "text"}
    assert main(["tasks", "retry", *_HOSTILE]) == exit_codes.UNFINISHED
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == len(_HOSTILE)
    for line, id_ in zip(written.err.splitlines(), _HOSTILE, strict=True):
        assert line.startswith(f"outbox: {id_}: its arguments can't be read; ")
        assert "outbox parked replay" in line
    configure("memory://", results=database_url)
    assert TaskHandle[int]("nan").status == "failed"


def test_without_a_database_of_results_nothing_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_URL", "memory://")
    assert main(["tasks", "list"]) == exit_codes.USAGE
    assert "OUTBOX_RESULTS" in capsys.readouterr().err


_IN_A_YEAR = datetime.datetime(2099, 5, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> DatabasePlace:
    return database_place_of(request.param, request, name, tmp_path)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    capsys.readouterr()
    code = main(["tasks", "list", "--scheduled", *arguments])
    written = capsys.readouterr()
    return code, written.out.splitlines(), written.err


def call_for_later(name: str) -> outbox.Event:
    return outbox.Event(
        id=f"id-{name}",
        target="bills",
        exchange="",
        body=b'{"args": []}',
        headers={TASK: name},
        deliver_at=_IN_A_YEAR,
    )


def test_tasks_that_wait_in_the_broker_are_listed_and_the_unknown_stop_a_deployment(
    database: DatabasePlace,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(task_statements.waiting_tasks, "__kwdefaults__", {"at_once": 2})
    monkeypatch.setenv("OUTBOX_URL", database.url)
    monkeypatch.setenv("OUTBOX_TASKS_QUEUE", name)
    publisher = configure(task_session=sessionmaker())
    with auto_publishing():
        last = schedule(_IN_A_YEAR, accounting.add, 1, 2)
        [first, second] = [
            schedule(_IN_A_YEAR - datetime.timedelta(days=days), accounting.nothing)
            for days in (2, 1)
        ]
    wait_until(lambda: database.count(name) == 3)
    known = [
        f"{first.id}  tests.accounting:nothing  {name}  due 2099-04-29 12:00:00",
        f"{second.id}  tests.accounting:nothing  {name}  due 2099-04-30 12:00:00",
        f"{last.id}  tests.accounting:add  {name}  due 2099-05-01 12:00:00",
    ]
    assert listed(capsys) == (exit_codes.SUCCESS, known, "")
    assert listed(capsys, "--unknown", "tests.accounting") == (exit_codes.SUCCESS, [], "")
    code, lines, err = listed(capsys, "--limit", "1")
    assert (code, lines) == (exit_codes.SUCCESS, known[:1])
    assert "the next 1 of 3; --limit shows more" in err
    assert listed(capsys, "--task", "tests.accounting:add")[1] == known[2:]
    assert listed(capsys, "--queue", "bills")[1] == []

    others = {
        "dead": json.dumps({TASK: "old:dead", DEAD_REASON: "failed"}),
        "no-task": json.dumps({"x": TASK}),
        "garbage": f'"{TASK}"',
    }
    with auto_publishing():  # under names of the past
        for old in ("old:add\x1b", "old:gone"):
            headers = {TASK: old}
            outbox.enqueue_event({}, name, exchange="", headers=headers, deliver_at=_IN_A_YEAR)
        for id_ in others:
            outbox.enqueue_event({}, name, exchange="", id=id_, deliver_at=_IN_A_YEAR)
    wait_until(lambda: database.count(name) == 8)
    for id_, text in others.items():
        database.execute("UPDATE outbox_events SET headers = ? WHERE id = ?", text, id_)
    assert len(listed(capsys)[1]) == 5
    monkeypatch.setattr(accounting.nothing, "aliases", ("old:gone",))
    code, lines, err = listed(capsys, "--unknown", "tests.accounting")
    assert (code, len(lines)) == (exit_codes.UNFINISHED, 1)
    assert f"  old:add\\x1b  {name}  due 2099-05-01 12:00:00" in lines[0]
    assert "1 task that waits has a name that tests.accounting doesn't know" in err
    assert "aliases=" in err
    code, lines, _ = listed(capsys, "--unknown", "--json", "tests.beating", "--limit", "1")
    assert code == exit_codes.UNFINISHED
    assert json.loads(lines[0]) == {
        "id": first.id,
        "task": "tests.accounting:nothing",
        "queue": name,
        "due": "2099-04-29T12:00:00+00:00",
    }
    publisher.close()


def test_stored_tasks_that_wait_for_the_relay_are_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = store.engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("OUTBOX_URL", "amqp://guest:guest@127.0.0.1:1/")  # it isn't connected to
    monkeypatch.setenv("OUTBOX_DATABASE_URL", url)
    store.put([call_for_later("tests.accounting:add"), call_for_later("old:gone")])
    code, lines, err = listed(capsys, "--queue", "bills")
    assert (code, len(lines)) == (exit_codes.SUCCESS, 2)
    assert "RabbitMQ itself" in err
    configure("memory://", task_session=sessionmaker())
    code, lines, _ = listed(capsys, "--unknown", "tests.accounting")
    assert (code, lines) == (
        exit_codes.UNFINISHED,
        ["id-old:gone  old:gone  bills  due 2099-05-01 12:00:00"],
    )


def test_listing_what_waits_in_a_file_waits_for_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_URL", "memory://")
    monkeypatch.setenv("OUTBOX_DATABASE_URL", f"sqlite:///{tmp_path / 'events.db'}")
    assert main(["sql", "create"]) == exit_codes.SUCCESS
    writer = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert listed(capsys)[:2] == (exit_codes.SUCCESS, [])
    writer.close()


def test_what_cannot_be_listed_as_scheduled_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUTBOX_DATABASE_URL", raising=False)
    monkeypatch.setenv("OUTBOX_URL", "amqp://guest:guest@127.0.0.1:1/")

    def refusal(*arguments: str) -> str:
        code, lines, err = listed(capsys, *arguments)
        assert (code, lines) == (exit_codes.USAGE, [])
        [line] = err.splitlines()
        return line

    assert "RabbitMQ's delay queues can't be looked at; keep a task's old name in" in refusal()
    assert "--unknown needs modules" in refusal("--unknown")
    assert "add --unknown" in refusal("tests.accounting")
    assert "--status" in refusal("--status", "failed")
    assert "no module 'missing'" in refusal("--unknown", "missing")
    monkeypatch.setenv("OUTBOX_URL", "memory://")
    assert "no database is named" in refusal()
    monkeypatch.setenv("OUTBOX_URL", f"sqlite:///{tmp_path / 'missing.db'}")
    assert "no file" in refusal()
    assert not list(tmp_path.iterdir())
    assert "outbox sql create" in refusal("--database", f"sqlite:///{tmp_path / 'empty.db'}")
    assert main(["tasks", "list", "--unknown", "tests.accounting"]) == exit_codes.USAGE
    assert "add --scheduled" in capsys.readouterr().err
