"""``outbox parked`` as its users run it: a process, its output, exit codes."""

from __future__ import annotations

import datetime
import functools
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import pytest

from outbox import Event, Publisher, exit_codes
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.testing.broker import PrivateBroker
from tests.amqp import Inspector, properties_of
from tests.commands import Done, Run, outbox_command, run_outbox


def command(*arguments: str) -> list[str]:
    return outbox_command("parked", *arguments)


def run_at(url: str, *arguments: str, **options: Any) -> Done:
    return run_outbox("parked", *arguments, variables={"OUTBOX_URL": url}, **options)


@pytest.fixture
def run(amqp_url: str) -> Run:
    """Run the command on the tests' broker."""
    return functools.partial(run_at, amqp_url)


@pytest.fixture
def dead(inspector: Inspector, name: str) -> str:
    """An empty dead-letter queue."""
    return inspector.queue(f"{name}.dead")


def put(
    inspector: Inspector, queue: str, count: int, name: str, target: str = "a.b", **own: Any
) -> list[str]:
    """Put ``count`` parked messages into ``queue``, ids from 0 on."""
    before = inspector.count(queue)
    headers = {
        "outbox-parked-exchange": name,
        "outbox-parked-target": target,
        "outbox-parked-reason": "312 NO_ROUTE",
        "outbox-parked-at": "2026-01-02T03:04:05+00:00",
        **own,
    }
    found = [f"{target}-{n}" for n in range(count)]
    for one in found:
        properties = properties_of(message_id=one, headers=headers, delivery_mode=2)
        inspector.publish(queue, b'{"secret": 1}', properties=properties)
    deadline = time.monotonic() + 20
    while inspector.count(queue) < before + count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ids(messages: Sequence[Any]) -> list[str]:
    return [one.id for one in messages]


def test_an_event_no_queue_took_is_listed_and_replayed_once_a_queue_is_bound(
    run: Run, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(PARKING_QUEUE)
    inspector.all(PARKING_QUEUE)  # other tests' events
    event = Event(id="7", target="order.placed", exchange=name, body=b"{}", headers={"a": "b"})
    assert publisher.publish([event]).parked == (event,)

    seen = run("list")
    assert seen.returncode == exit_codes.SUCCESS, seen.stderr
    for part in ("7", f"{name}/order.placed", "2 bytes", "312 NO_ROUTE", "1 message, 1 shown"):
        assert part in seen.stdout

    too_early = run("replay")
    assert too_early.returncode == exit_codes.UNFINISHED
    assert "not replayed: 7: unroutable: 312 NO_ROUTE" in too_early.stderr
    assert "0 replayed, 1 failed" in too_early.stdout

    queue = inspector.queue(name, name, arguments={"x-queue-type": "classic"})
    planned = run("replay", "--dry-run")
    assert f"would replay 7 to {name}/order.placed" in planned.stdout
    assert run("replay").returncode == exit_codes.SUCCESS
    replayed = inspector.get(queue)
    assert publisher.publish([event]).published == (event,)
    first = inspector.get(queue)
    assert (replayed.body, replayed.properties) == (first.body, first.properties)
    assert "0 messages, 0 shown" in run("list").stdout


def test_a_line_of_json_has_everything_and_the_payload_on_request(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    put(inspector, dead, 3, name)
    seen = run("list", "--queue", dead, "--json", "--limit", "2")
    lines = [json.loads(line) for line in seen.stdout.splitlines()]
    assert lines[0] == {
        "queue": dead,
        "kind": "parked",
        "id": "a.b-0",
        "exchange": name,
        "target": "a.b",
        "died_in": None,
        "reason": "312 NO_ROUTE",
        "error": None,
        "at": "2026-01-02T03:04:05+00:00",
        "attempts": None,
        "size": 13,
        "content_type": None,
    }
    assert len(lines) == 2
    assert seen.stderr == f"{dead}: 3 messages, 2 shown\n"
    shown = run("list", "--queue", dead, "--json", "--payload").stdout
    assert [json.loads(line)["payload"] for line in shown.splitlines()] == ['{"secret": 1}'] * 3
    assert "secret" not in run("list", "--queue", dead).stdout
    assert run("list", "--queue", dead, "--payload").stdout.count('{"secret": 1}') == 3


@pytest.mark.slow
def test_nothing_from_a_message_reaches_the_terminal_unescaped(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    evil = "x\n\x1b[2J\r\x7f\u202e\u0085"
    put(inspector, dead, 1, evil, f"{evil}t", **{"outbox-parked-reason": evil})
    inspector.publish(dead, evil.encode(), properties=properties_of(message_id=evil))
    for arguments in (
        ["list", "--payload"],
        ["list", "--payload", "--json"],
        ["replay", "--dry-run"],
        ["replay"],
        ["purge", "--dry-run"],
    ):
        seen = run(*arguments, "--queue", dead)
        assert seen.stdout, arguments
        for line in (seen.stdout + seen.stderr).split("\n"):
            assert line.isprintable(), arguments
    assert inspector.count(dead) == 2


def test_several_queues_are_listed_one_after_the_other(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    other = inspector.queue(f"{name}-other.dead")
    put(inspector, dead, 1, name)
    put(inspector, other, 2, name)
    seen = run("list", "--queue", dead, "--queue", other)
    assert f"{dead}: 1 message, 1 shown" in seen.stdout
    assert f"{other}: 2 messages, 2 shown" in seen.stdout


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        (["--id", "a.b-1", "--id", "a.c-0"], ["a.b-1", "a.c-0"]),
        (["--target", "*.c"], ["a.c-0", "a.c-1", "a.c-2"]),
        (["--reason", "404"], ["a.c-0", "a.c-1", "a.c-2"]),
        (["--reason", "404", "--limit", "2"], ["a.c-0", "a.c-1"]),
        (["--limit", "4"], ["a.b-0", "a.b-1", "a.b-2", "a.c-0"]),
    ],
)
@pytest.mark.parametrize("action", ["replay", "purge"])
def test_only_selected_messages_are_taken(
    run: Run,
    inspector: Inspector,
    dead: str,
    name: str,
    action: str,
    filters: list[str],
    chosen: list[str],
) -> None:
    target = inspector.queue(name, name)
    every = put(inspector, dead, 3, name)
    every += put(inspector, dead, 3, name, "a.c", **{"outbox-parked-reason": "404 NOT_FOUND"})
    listed = run("list", "--queue", dead, "--json", *filters).stdout.splitlines()
    assert [json.loads(line)["id"] for line in listed] == chosen
    yes = ["--yes"] if action == "purge" else []
    dry = run(action, "--queue", dead, "--dry-run", *filters)
    assert [one for one in every if f" {one}" in dry.stdout] == chosen
    assert inspector.count(dead) == 6
    done = run(action, "--queue", dead, *yes, *filters)
    assert done.returncode == exit_codes.SUCCESS, done.stderr
    assert ids(inspector.all(dead)) == [one for one in every if one not in chosen]
    assert ids(inspector.all(target)) == (chosen if action == "replay" else [])


def test_what_is_older_than_a_time_can_be_deleted(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    for target, at in (
        ("old", now - datetime.timedelta(days=8)),
        ("new", now - datetime.timedelta(days=6)),
        ("unknown", "yesterday"),
    ):
        put(inspector, dead, 1, name, target, **{"outbox-parked-at": str(at)})
    done = run("purge", "--queue", dead, "--older-than", "7d", "--yes")
    assert done.returncode == exit_codes.SUCCESS, done.stderr
    assert "3 messages, 1 deleted" in done.stdout
    assert ids(inspector.all(dead)) == ["new-0", "unknown-0"]


def test_without_a_terminal_nothing_is_deleted_unless_confirmed_with_yes(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    put(inspector, dead, 2, name)
    refused = run("purge", "--queue", dead)
    assert refused.returncode == exit_codes.USAGE
    assert "--yes" in refused.stderr
    assert inspector.count(dead) == 2
    assert "2 messages, 2 deleted" in run("purge", "--queue", dead, "--yes").stdout
    assert inspector.count(dead) == 0


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [
        ("y\n", exit_codes.SUCCESS, 0),
        ("\n", exit_codes.UNFINISHED, 2),
        ("\x04", exit_codes.UNFINISHED, 2),
    ],
    ids=["yes", "nothing", "ctrl-d"],
)
def test_deleting_on_a_terminal_asks_first(
    run: Run, inspector: Inspector, dead: str, name: str, answer: str, code: int, left: int
) -> None:
    put(inspector, dead, 2, name)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode())
        asked = run("purge", "--queue", dead, stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "2 messages" in asked.stdout
    assert asked.returncode == code
    assert inspector.count(dead) == left


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, exit_codes.INTERRUPTED, "outbox: interrupted\n"),
    ],
)
@pytest.mark.slow
def test_a_replay_ended_midway_loses_nothing(
    amqp_url: str,
    run: Run,
    inspector: Inspector,
    dead: str,
    name: str,
    number: signal.Signals,
    code: int,
    expected: str,
) -> None:
    target = inspector.queue(name, name)
    address = {"outbox-parked-exchange": name, "outbox-parked-target": "a.b"}
    events = [
        Event(id=str(n), target=dead, exchange="", body=b"{}", headers=address)
        for n in range(3_000)
    ]
    with Publisher(amqp_url, declare="never") as publisher:
        assert len(publisher.publish(events, timeout=20).published) == 3_000
    child = subprocess.Popen(
        command("replay", "--queue", dead),
        env={**os.environ, "OUTBOX_URL": amqp_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    arrived = ids([inspector.get(target, 20)])
    child.send_signal(number)
    _, errors = child.communicate(timeout=20)
    assert (child.returncode, errors) == (code, expected), "perhaps it was ended too late"
    deadline = time.monotonic() + 10
    while True:  # the broker gives back what it had held
        arrived += ids(inspector.all(target))
        if inspector.count(dead) >= 3_000 - len(arrived):
            break
        assert time.monotonic() < deadline
    assert run("replay", "--queue", dead).returncode == exit_codes.SUCCESS
    arrived += ids(inspector.all(target))
    assert set(arrived) == set(ids(events))
    assert inspector.count(dead) == 0


def test_a_reader_that_closes_the_pipe_is_not_an_error(
    amqp_url: str, inspector: Inspector, dead: str, name: str
) -> None:
    put(inspector, dead, 1_000, name)
    child = subprocess.Popen(
        command("list", "--queue", dead, "--limit", "1000"),
        env={**os.environ, "OUTBOX_URL": amqp_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert (child.wait(20), child.stderr.read()) == (exit_codes.SUCCESS, "")
    child.stderr.close()
    assert ids(inspector.messages(dead, 1_000)) == [f"a.b-{n}" for n in range(1_000)]


def test_messages_that_were_often_given_back_cause_a_warning(
    run: Run, inspector: Inspector, dead: str, name: str
) -> None:
    put(inspector, dead, 1, name)
    for _ in range(10):
        method, _, _ = inspector.channel.basic_get(dead)
        assert method is not None
        inspector.channel.basic_reject(method.delivery_tag, requeue=True)
    seen = run("list", "--queue", dead)
    assert "delivery-limit" in seen.stderr
    assert "1 shown" in seen.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "--queue", "nowhere.dead"], "has no queue 'nowhere.dead'"),
        (
            ["purge", "--yes", "--queue", "orders"],
            "the dead letters of 'orders' are in 'orders.dead'",
        ),
        (["purge", "--yes", "--queue", "a.dead", "--queue", "b.dead"], "give only one --queue"),
        (["list", "--url", "memory://"], "memory:// has no parked messages"),
        (["list", "--url", "sqlite:////no/file.db"], "no file /no/file.db"),
        (["list", "--url", "amqp://u:hunter2/@h"], "cannot be parsed"),
        (["list", "--limit", "0"], "argument --limit"),
        (["replay", "--limit", "many"], "argument --limit"),
        (["purge", "--older-than", "7"], "'7' is not a time; use for example 30m, 12h or 7d"),
        (["purge", "--older-than", "99999999999w"], "is not a time"),
        ([], "ACTION"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(run: Run, arguments: list[str], expected: str) -> None:
    seen = run(*arguments)
    assert seen.returncode == exit_codes.USAGE
    assert expected in seen.stderr
    assert "Traceback" not in seen.stderr
    assert "hunter2" not in seen.stderr


def test_a_missing_url_names_the_possible_forms() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OUTBOX_URL"}
    seen = subprocess.run(
        command("list"), env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert seen.returncode == exit_codes.USAGE
    assert "amqp://user:password@host" in seen.stderr


@pytest.mark.slow
def test_a_broker_that_is_away_is_reported_in_one_line(private_broker: PrivateBroker) -> None:
    private_broker.kill()
    seen = run_at(private_broker.url, "list")
    assert seen.returncode == exit_codes.UNAVAILABLE
    [line] = seen.stderr.splitlines()
    assert line.startswith(f"outbox: cannot connect to 127.0.0.1:{private_broker.port}: ")


def test_the_help_shows_real_commands(run: Run) -> None:
    seen = run("--help")
    for text in ("outbox parked list", "outbox parked replay", "outbox parked purge", "exit codes"):
        assert text in seen.stdout
