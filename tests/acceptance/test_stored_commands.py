"""``outbox status``, ``retry``, ``purge`` and ``sql`` as their users run them."""

from __future__ import annotations

import functools
import json
import os
import pty
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from outbox import __version__, exit_codes
from outbox.commands import stored_command
from outbox.commands.cli import main
from outbox.sql import Store
from tests.commands import Done, Run, run_outbox
from tests.relaying import an_event, many, opened


def run_at(database: str, *arguments: str, **options: Any) -> Done:
    return run_outbox(*arguments, variables={"OUTBOX_DATABASE_URL": database}, **options)


@pytest.fixture
def run(database_url: str) -> Run:
    """Run the command on the test's database."""
    return functools.partial(run_at, database_url)


@pytest.fixture
def graves(store: Store) -> Store:
    """Five dead events: e0 to e2 too large, e3 and e4 to the target b unroutable."""
    store.put([*many(3, "x"), *(an_event(n, "x", "b") for n in (3, 4))])
    rows = store.claim(5)
    store.bury(rows[:3], "too large\x1b[2J")
    store.bury(rows[3:], "unroutable: 312 NO_ROUTE")
    return store


def dead(store: Store) -> list[str]:
    return [id for _, id, _, _ in store.dead()]


# ------------------------------------------------------------------------------------- status


def test_the_status_shows_waiting_and_dead_events_with_reasons(run: Run, graves: Store) -> None:
    graves.put(many(6, "x"))
    graves.claim(1)
    graves.release(graves.claim(2), 3600)
    with graves.engine.begin() as connection:
        connection.execute(text("UPDATE outbox_events SET queue = 'thumbnails' WHERE id = 'e5'"))
    done = run("status")
    assert done.returncode == exit_codes.SUCCESS, done.stderr
    assert done.stdout.splitlines() == [
        done.stdout.splitlines()[0],
        "2 events scheduled for later",
        "1 event in flight",
        "5 events dead",
        "    3: too large\\x1b[2J",
        "    2: unroutable: 312 NO_ROUTE",
        "queue thumbnails: 1 event",
    ]
    assert done.stdout.startswith("3 events waiting, the oldest for ")


def test_the_status_is_a_json_object_on_request(run: Run, graves: Store) -> None:
    graves.put(many(2, "x"))
    done = run("status", "--json")
    found = json.loads(done.stdout)
    assert 0 <= found.pop("oldest") < 60
    assert found == {
        "waiting": 2,
        "scheduled": 0,
        "leased": 0,
        "dead": 5,
        "dead_by_reason": {"too large\x1b[2J": 3, "unroutable: 312 NO_ROUTE": 2},
        "queues": {"": 2},
        "kept": 0,
        "complete": True,
    }
    assert "\x1b" not in done.stdout


def test_the_status_marks_numbers_that_are_higher_and_counts_exactly_on_request(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store.put(many(7, "x"))
    store.bury(store.claim(4), "no")
    monkeypatch.setattr(stored_command, "_COUNTED", 2)
    for arguments, expected in (
        ([], ["2+ events waiting", "0 events scheduled for later", "2+ events dead"]),
        (["--exact"], ["3 events waiting", "4 events dead"]),
    ):
        assert main(["status", "--database", database_url, *arguments]) == exit_codes.SUCCESS
        lines = capsys.readouterr().out.splitlines()
        for line in expected:
            assert any(each.startswith(line) for each in lines), lines
    assert main(["status", "--database", database_url, "--json"]) == exit_codes.SUCCESS
    assert json.loads(capsys.readouterr().out)["complete"] is False


@pytest.mark.slow
def test_the_status_of_an_empty_table_has_no_oldest_event(run: Run, store: Store) -> None:
    assert store.status().oldest is None
    assert json.loads(run("status", "--json").stdout)["oldest"] is None
    assert run("status").stdout.startswith("0 events waiting\n")


# ------------------------------------------------------------------------------ retry and purge


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (["--all"], ["e0", "e1", "e2", "e3", "e4"]),
        (["--id", "e1", "--id", "e4", "--id", "nobody"], ["e1", "e4"]),
        (["--reason", "NO_ROUTE"], ["e3", "e4"]),
        (["--target", "a"], ["e0", "e1", "e2"]),
        (["--target", "a", "--limit", "1"], ["e0"]),
        (["--target", "a", "--reason", "NO_ROUTE"], []),
    ],
)
def test_retry_makes_the_selected_events_due_again_and_leaves_the_rest_dead(
    run: Run, graves: Store, selection: list[str], chosen: list[str]
) -> None:
    planned = run("retry", *selection, "--dry-run")
    assert [line.split()[0] for line in planned.stdout.splitlines()[:-1]] == chosen
    assert len(dead(graves)) == 5
    done = run("retry", *selection)
    assert done.returncode == exit_codes.SUCCESS
    assert done.stdout == f"{len(chosen)} event{'' if len(chosen) == 1 else 's'} due again\n"
    assert [one.event.id for one in graves.claim(10)] == chosen
    assert set(dead(graves)) == {"e0", "e1", "e2", "e3", "e4"} - set(chosen)


@pytest.mark.slow
def test_purge_deletes_only_selected_events(run: Run, graves: Store) -> None:
    graves.put([an_event(9, "x")])
    assert run("purge", "--target", "b").returncode == exit_codes.USAGE
    planned = run("purge", "--target", "b", "--dry-run")
    assert planned.stdout.endswith("2 events would be deleted\n")
    assert len(dead(graves)) == 5
    done = run("purge", "--target", "b", "--yes")
    assert (done.returncode, done.stdout) == (exit_codes.SUCCESS, "2 events deleted\n")
    assert dead(graves) == ["e0", "e1", "e2"]
    assert run("purge", "--all", "--yes").stdout == "3 events deleted\n"
    assert run("purge", "--all", "--yes").returncode == exit_codes.SUCCESS
    assert [one.event.id for one in graves.claim(10)] == ["e9"]  # what is alive stays


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [(b"y\n", exit_codes.SUCCESS, 0), (b"\n", exit_codes.UNFINISHED, 5)],
)
def test_purge_on_a_terminal_asks_first(
    run: Run, graves: Store, answer: bytes, code: int, left: int
) -> None:
    controller, terminal = pty.openpty()
    os.write(controller, answer)
    done = run("purge", "--all", stdin=terminal)
    os.close(terminal)
    os.close(controller)
    assert done.returncode == code
    assert "Delete 5 events permanently? [y/N]" in done.stdout
    assert len(dead(graves)) == left


@pytest.mark.parametrize("command", ["retry", "purge"])
def test_a_command_for_dead_events_requires_a_selection(
    run: Run, graves: Store, command: str
) -> None:
    done = run(command, "--dry-run")
    assert done.returncode == exit_codes.USAGE
    assert "--id, --reason, --target, or --all" in done.stderr
    assert len(dead(graves)) == 5


def test_without_a_command_the_commands_are_listed() -> None:
    done = run_outbox()
    assert done.returncode == exit_codes.USAGE
    assert "parked" in done.stderr
    assert "relay" in done.stderr


def test_the_version_is_shown() -> None:
    assert run_outbox("--version").stdout == f"outbox {__version__}\n"


# ---------------------------------------------------------------------------------------- sql


def test_the_table_is_created_once_and_checked(run: Run, database_url: str) -> None:
    missing = run("sql", "check")
    assert missing.returncode == exit_codes.USAGE
    assert "outbox sql create" in missing.stderr
    assert run("sql", "create").stdout == "the table outbox_events was created\n"
    assert run("sql", "create").stdout == "the table outbox_events already exists\n"
    assert run("sql", "check").stdout == "the table outbox_events is complete\n"
    store = opened(database_url)
    with store.engine.begin() as connection:
        on_table = " ON outbox_events" if connection.dialect.name == "mariadb" else ""
        connection.execute(text(f"DROP INDEX outbox_events_due{on_table}"))
    store.engine.dispose()
    lacking = run("sql", "check")
    assert lacking.returncode == exit_codes.USAGE
    assert "index outbox_events_due" in lacking.stderr
    assert run("status").returncode == exit_codes.USAGE


@pytest.mark.slow
def test_the_printed_ddl_creates_the_table(tmp_path: Path) -> None:
    printed = run_at("", "sql", "ddl", "--dialect", "sqlite")
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.executescript(printed.stdout)
    connection.close()
    assert run_at(f"sqlite:///{tmp_path}/a.db", "sql", "check").returncode == exit_codes.SUCCESS
    assert "CREATE TABLE outbox_inbox" in printed.stdout
    assert "BYTEA" in run_at("", "sql", "ddl", "--dialect", "postgresql").stdout
    unknown = run_at("", "sql", "ddl", "--dialect", "oracle")
    assert unknown.returncode == exit_codes.USAGE
    assert "postgresql, mariadb, sqlite" in unknown.stderr


@pytest.mark.parametrize("command", [["status"], ["retry", "--all"], ["sql", "create"]])
def test_an_unreachable_database_is_reported_in_one_line(command: list[str]) -> None:
    done = run_at("postgresql://u:hunter2@127.0.0.1:1/d", *command)
    assert done.returncode == exit_codes.UNAVAILABLE
    assert len(done.stderr.splitlines()) == 1
    assert "hunter2" not in done.stderr
