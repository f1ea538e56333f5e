"""The command ``outbox migrate-transport``, between real transports."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from outbox import Event, exit_codes
from outbox.commands.cli import main
from outbox.messages.dead_letters import PARKING_QUEUE, dead_letter, restore_origin
from outbox.messages.delivery import as_delivered, dead_letter_queue
from outbox.messages.headers import ATTEMPT, FIRST_FAILURE, ORIGIN_EXCHANGE, ORIGIN_TARGET, TASK
from outbox.messages.rows import event_of
from outbox.storage.schema import events
from outbox.transports.database.kinds import engine_at
from outbox.url import BrokerURL
from tests.amqp import Inspector, properties_of
from tests.commands import Done, outbox_command, run_outbox
from tests.places import Place, RabbitMQPlace, SQLitePlace, events_for, made, place_of, reading
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

NOW = datetime.datetime.now(datetime.UTC)
HOUR = datetime.timedelta(hours=1)
MANY = 6_000


@pytest.fixture
def source(tmp_path: Path, name: str) -> SQLitePlace:
    """A file with a queue that is bound to the exchange, and the queue of parked events."""
    place = SQLitePlace(str(tmp_path / "outbox.db"), name)
    made(place, name, "order.*")
    place.bind(PARKING_QUEUE, "")
    return place


@pytest.fixture
def modules(tmp_path: Path, name: str) -> str:
    """A module with the consumer of the queue."""
    module = f"moved_{name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "from outbox.consumers import consumer\n"
        f"@consumer({name!r}, topics=['order.*'])\n"
        "def handle(event): ...\n"
    )
    return module


def migrate(folder: Path, old: str, new: str, *arguments: str, exchange: str) -> Done:
    variables = {"OLD_URL": old, "NEW_URL": new, "OUTBOX_EXCHANGE": exchange}
    command = ("migrate-transport", "OLD_URL", "NEW_URL", *arguments)
    return run_outbox(*command, variables=variables, cwd=folder)


def of_every_kind(place: Place, name: str) -> list[str]:
    """Publish a message that waits, is scheduled, is retried, is a task, is dead, is parked."""
    with place.publisher() as publisher:
        [waiting] = events_for(
            publisher, ["order.placed"], headers={"shop": "a", "raw": b"\xff"}, key="k", priority=5
        )
        [scheduled] = events_for(publisher, ["order.paid"], deliver_at=NOW + HOUR, key="k")
        retried = Event(
            id="retried",
            target=name,
            exchange="",
            body=b"{}",
            headers={ATTEMPT: 3, FIRST_FAILURE: NOW.isoformat()},
            deliver_at=NOW + 2 * HOUR,
            occurred_at=NOW - HOUR,
        )
        task = Event(id="task", target=name, exchange="", body=b"[]", headers={TASK: "shop.mail"})
        dead = dead_letter(as_delivered(waiting, name, 1), "ValueError: no", attempts=4)
        report = publisher.publish([waiting, scheduled, retried, task, dead])
        assert len(report.published) == 5, report
        [lost] = events_for(publisher, ["nobody.listens"])
        assert publisher.publish([lost]).parked == (lost,)
    return [waiting.id, scheduled.id, "retried", "task", waiting.id, lost.id]


def contents(url: str) -> list[tuple[Any, ...]]:
    """Return all messages of a database as its workers would get them; keys are in headers."""
    engine = engine_at(BrokerURL.parse(url))
    with engine.begin() as connection:
        rows = connection.execute(select(events)).all()
    engine.dispose()
    found = []
    for row in rows:
        event = event_of(row)
        delivery = as_delivered(event, row.queue, 0)
        restore_origin(delivery)
        headers = dict(delivery.headers or {})
        for name in (ORIGIN_EXCHANGE, ORIGIN_TARGET):
            headers.pop(name, None)
        is_later = row.available_at > datetime.datetime.now(datetime.UTC)
        due_at = round(row.available_at.timestamp(), 3) if is_later else 0
        found.append(
            (row.queue, event.id, delivery.exchange, delivery.target, event.body,
             event.priority, event.occurred_at, event.content_type, due_at, headers)
        )  # fmt: skip
    return sorted(found, key=lambda each: each[:2])


def test_messages_of_every_kind_go_around_unchanged(
    source: SQLitePlace,
    postgresql_url: str,
    mariadb_url: str,
    amqp_url: str,
    inspector: Inspector,
    modules: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OUTBOX_EXCHANGE", name)
    broker = RabbitMQPlace(amqp_url, name, inspector)
    for queue in (name, dead_letter_queue(name)):
        broker.will_clean_up(queue)
    ids = of_every_kind(source, name)
    before = contents(source.url)
    assert sorted(each[1] for each in before) == sorted(ids)
    for url in (postgresql_url, mariadb_url):
        assert main(["sql", "create", "--database", url]) == exit_codes.SUCCESS
    way = [source.url, postgresql_url, mariadb_url, amqp_url, f"sqlite:///{tmp_path}/new.db"]

    for old, new in itertools.pairwise(way):
        capsys.readouterr()
        assert main(["migrate-transport", old, new, modules, "--dry-run"]) == exit_codes.SUCCESS
        assert f"{len(ids)} messages would be moved" in capsys.readouterr().out, old
        code = main(["migrate-transport", old, new, modules, "--json"])
        done = capsys.readouterr()
        assert code == exit_codes.SUCCESS, (old, done)
        moved = [json.loads(line) for line in done.out.splitlines()]
        assert sum(each["moved"] for each in moved) == len(ids), done
        if not old.startswith("amqp"):
            assert contents(old) == []
        if not new.startswith("amqp"):
            assert contents(new) == before, new
    assert [inspector.count(queue) for queue in (name, dead_letter_queue(name))] == [0, 0]

    new_place = SQLitePlace(f"{tmp_path}/new.db", name)
    with new_place.publisher() as publisher:  # the bindings have moved, too
        later = events_for(publisher, ["order.cancelled"])
        assert publisher.publish(later).published == tuple(later)


@pytest.fixture(params=["sqlite", "postgresql", "rabbitmq"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Place:
    return place_of(request.param, request, name, tmp_path)


def test_nothing_is_moved_while_a_worker_runs_unless_forced(
    place: Place,
    modules: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OUTBOX_EXCHANGE", name)
    new_url = f"sqlite:///{tmp_path}/new.db"
    command = ["migrate-transport", place.url, new_url, modules]
    with reading(place, name, ["order.*"], prefetch=1) as reader:
        assert main(command) == exit_codes.USAGE  # while it is idle
        assert "is in use" in capsys.readouterr().err
        with place.publisher() as publisher:
            publisher.publish(events_for(publisher, ["order.placed"] * 5))
        [held] = reader.take(1)
        assert main(command) == exit_codes.USAGE
        assert main([*command, "--force"]) == exit_codes.IN_HAND
        assert "4 messages moved, 0 left" in capsys.readouterr().out
    assert held.message_id not in [each[1] for each in contents(new_url)]
    wait_until(lambda: place.count(name) == 1)


@pytest.fixture(params=["sqlite to postgresql", "rabbitmq to sqlite"])
def route(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> tuple[Place, Place]:
    old, new = request.param.split(" to ")
    for folder in (old, new):
        (tmp_path / folder).mkdir()
    return place_of(old, request, name, tmp_path / old), place_of(
        new, request, name, tmp_path / new
    )


@pytest.mark.slow
def test_a_second_run_completes_what_was_killed(
    route: tuple[Place, Place], modules: str, name: str, tmp_path: Path
) -> None:
    old, new = route
    made(old, name, "order.*")
    made(new, name, "order.*")
    with old.publisher() as publisher:
        sent = events_for(publisher, ["order.placed"] * MANY)
        assert len(publisher.publish(sent, timeout=60).published) == MANY
    variables = {"OUTBOX_EXCHANGE": name}
    command = outbox_command("migrate-transport", old.url, new.url, modules, "--json")
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **variables}) as child:
        wait_until(lambda: new.count(name) > 0, 20)
        child.send_signal(signal.SIGKILL)
    assert 0 < new.count(name) < MANY
    wait_until(lambda: old.count(name) > 0, 20)
    wait_until(
        lambda: (
            migrate(tmp_path, old.url, new.url, modules, exchange=name).returncode
            == exit_codes.SUCCESS
        ),
        30,
    )
    assert old.count(name) == 0
    ids = [each[1] for each in contents(new.url)]
    assert set(ids) == {event.id for event in sent}
    assert len(ids) - MANY <= 1000  # of the window in which it was killed


def test_what_rabbitmq_delays_or_other_clients_sent_is_moved_or_named(
    amqp_url: str,
    inspector: Inspector,
    modules: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OUTBOX_EXCHANGE", name)
    broker = RabbitMQPlace(amqp_url, name, inspector)
    made(broker, name, "order.*")
    dead = dead_letter_queue(name)
    with broker.publisher() as publisher:
        later = events_for(publisher, ["order.paid"], deliver_at=NOW + 9 * HOUR, key="k")
        others = events_for(publisher, ["invoice.paid"], deliver_at=NOW + 9 * HOUR)
        assert len(publisher.publish([*later, *others]).published) == 2
    put = inspector.channel.basic_publish
    put("", name, b"zip", properties_of(message_id="zipped", content_encoding="gzip"))
    death = {"queue": name, "exchange": "shop", "routing-keys": ["order.old"], "reason": "expired"}
    put("", dead, b"{}", properties_of(message_id="expired", headers={"x-death": [death]}))
    wait_until(lambda: (broker.count(name), broker.count(dead)) == (1, 1))

    new_url = f"sqlite:///{tmp_path}/new.db"
    assert main(["migrate-transport", amqp_url, new_url, modules]) == exit_codes.UNFINISHED
    done = capsys.readouterr()
    assert f"not moved: zipped in {name}: its content encoding 'gzip' would be lost" in done.err
    assert "2 messages moved, 1 left" in done.out
    assert (broker.count(name), broker.count(dead)) == (1, 0)
    letter, scheduled = sorted(contents(new_url), key=lambda each: each[1] == later[0].id)
    assert scheduled[:4] == (name, later[0].id, name, "order.paid")
    assert scheduled[8] == round((NOW + 9 * HOUR).timestamp(), 3)
    assert letter[:2] == (dead, "expired")
    assert (
        letter[-1].items()
        >= {
            "outbox-dead-queue": name,
            "outbox-dead-exchange": "shop",
            "outbox-dead-target": "order.old",
            "outbox-dead-reason": "dead-lettered by the broker: expired",
        }.items()
    )
    # The event for others is still on its way down the ladder.
    got: Any = inspector.channel.basic_get
    on_its_way = set()
    while (message := got("outbox.delay.14", auto_ack=True))[0] is not None:
        on_its_way.add(message[1].message_id)
    assert others[0].id in on_its_way


def test_a_queue_can_be_named_and_a_transport_must_be_another(
    source: SQLitePlace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = of_every_kind(source, name)
    new_url = f"sqlite:///{tmp_path}/new.db"
    for old in (source.url, f"sqlite:///{tmp_path}/../{tmp_path.name}/outbox.db"):
        assert main(["migrate-transport", old, source.url]) == exit_codes.USAGE
        assert "are the same" in capsys.readouterr().err
    assert main(["migrate-transport", source.url, new_url, "--queue", name]) == exit_codes.SUCCESS
    assert {each[0] for each in contents(source.url)} == {PARKING_QUEUE}
    assert len(contents(new_url)) == len(ids) - 1
    assert main(["migrate-transport", source.url, new_url]) == exit_codes.SUCCESS
    assert sorted(each[1] for each in contents(new_url)) == sorted(ids)
    assert main(["migrate-transport", "NO_SUCH_URL", new_url]) == exit_codes.USAGE
    with SQLitePlace(f"{tmp_path}/new.db", name).publisher() as publisher:  # it has the bindings
        later = events_for(publisher, ["order.cancelled"])
        assert publisher.publish(later).published == tuple(later)
