"""Presence: processes announce themselves beside their events, and never in their way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import BrokerError, Publisher, UsageError
from outbox.commands.cli import main
from outbox.presence import Announcement, announced, announcing, heard, listen, listener
from outbox.settings import Settings
from outbox.sql import Store
from outbox.tap.tapped_queue import TappedQueue
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.transports.database.presence.presence_records import DatabasePresenceRecords
from outbox.transports.rabbitmq.presence import announcer
from outbox.transports.registry import open_presence_records
from proving.proxy import BLOCKED, UNBLOCKED, FaultProxy, Frame, Way
from tests.amqp import Inspector
from tests.commands import outbox_command
from tests.consuming import Command
from tests.integration.test_worker import send
from tests.places import Place, RabbitMQPlace, ServerPlace, events_for, place_of
from tests.relaying import opened
from tests.waiting import wait_until

PROMPTLY = 40.0  # seconds, on a busy machine


@pytest.fixture
def exchange(name: str, inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> str:
    """An exchange for the announcements of this test alone, which doesn't exist yet."""
    own = f"{name}-presence"
    monkeypatch.setattr(announcer, "PRESENCE_EXCHANGE", own)
    inspector.clean_up(exchange=own)
    return own


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "_EVERY", 0.2)
    monkeypatch.setattr(DatabasePresenceRecords, "every", 0.2)
    monkeypatch.setattr(announcing, "_LOOK", 0.05)


def connected(publisher: Publisher) -> Publisher:
    publisher.make_ready()
    wait_until(lambda: publisher.connected)
    return publisher


def body(number: int) -> bytes:
    return json.dumps({"version": 1, "process": str(number), "kind": "worker"}).encode()


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel ``task`` and wait for its end: a second cancellation would keep it from closing."""
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
def tapped(amqp_url: str, exchange: str) -> Iterator[Callable[[], list[bytes]]]:
    """What is announced, read by aio-pika: a function that returns the bodies so far."""
    bodies: list[bytes] = []
    is_open = asyncio.Event()

    async def read() -> None:
        import aio_pika

        queue = TappedQueue(
            Settings.load(amqp_url, {}),
            [(exchange, "")],
            declared={exchange: "fanout"},
        )
        await queue.open()
        is_open.set()
        try:
            async for message in queue.messages():
                assert message.delivery_mode == aio_pika.DeliveryMode.NOT_PERSISTENT
                assert message.content_type == "application/json"
                bodies.append(message.body)
        finally:
            await queue.close()

    with asyncio.Runner() as runner:
        reading = runner.get_loop().create_task(read())
        runner.run(asyncio.wait_for(is_open.wait(), PROMPTLY))

        def so_far() -> list[bytes]:
            runner.run(asyncio.sleep(0.05))
            return list(bodies)

        yield so_far
        runner.run(ended(reading))


def test_an_announcement_reaches_listeners_and_nobody_else(
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    tapped: Callable[[], list[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    inspector.queue(name, name)
    connected(publisher)
    for number in range(5):
        publisher.announce(body(number))
        time.sleep(0.05)
    wait_until(lambda: body(4) in tapped())
    assert len(send(publisher, "x", 1)) == len(inspector.messages(name, 1)) == 1
    assert publisher.stats().published == publisher.stats().connects == 1
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_with_nobody_listening_nothing_comes_back(
    publisher: Publisher, inspector: Inspector, name: str, exchange: str
) -> None:
    inspector.queue(name, name)
    returned: list[Frame] = []
    with FaultProxy(publisher.settings.url or "") as proxy:

        def note(frame: Frame) -> bool:
            if frame.way is Way.DOWN and frame.method == (60, 50):
                returned.append(frame)
            return False

        proxy.cut_at(note)
        with Publisher(proxy.url, exchange=name) as own:
            connected(own)
            for number in range(3):
                own.announce(body(number))
                time.sleep(0.05)
            send(own, "x", 1)
            assert own.stats().connects == 1
    assert returned == []


def test_a_blocked_connection_gets_no_announcement(
    amqp_url: str, inspector: Inspector, name: str, tapped: Callable[[], list[bytes]]
) -> None:
    inspector.queue(name, name)
    with FaultProxy(amqp_url) as proxy, Publisher(proxy.url, exchange=name) as publisher:
        connected(publisher)
        publisher.announce(body(0))
        wait_until(lambda: tapped())
        proxy.inject(BLOCKED)
        wait_until(lambda: not publisher.connected)
        for number in range(1, 100):
            publisher.announce(body(number))
        time.sleep(0.1)
        proxy.inject(UNBLOCKED)
        wait_until(lambda: publisher.connected)
        publisher.announce(body(100))
        wait_until(lambda: body(100) in tapped())
        assert tapped() == [body(0), body(100)]
        send(publisher, "x", 1)
        assert publisher.stats().connects == 1


@pytest.mark.parametrize("obstacle", ["missing", "other type"])
def test_a_refusal_ends_it_until_the_next_connection_in_one_line(
    amqp_url: str,
    inspector: Inspector,
    name: str,
    exchange: str,
    obstacle: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "outbox")
    inspector.queue(name, name)

    def lines() -> list[str]:
        return [one.message for one in caplog.records if one.name == "outbox.presence"]

    declare = "never" if obstacle == "missing" else "create"
    text = "404 NOT_FOUND" if obstacle == "missing" else "406 PRECONDITION_FAILED"
    if obstacle == "other type":
        inspector.channel.exchange_declare(exchange, "direct", durable=True)
    with FaultProxy(amqp_url) as proxy:
        with Publisher(proxy.url, exchange=name, declare=declare) as publisher:  # type: ignore[arg-type]
            for connects in (1, 2):
                connected(publisher)
                for number in range(5):
                    publisher.announce(body(number))
                    time.sleep(0.02)
                send(publisher, "x", connects)
                assert publisher.stats().connects == connects
                wait_until(lines)
                assert len(lines()) == 1
                assert text in lines()[0]
                proxy.cut()
                wait_until(lambda: not publisher.connected)
            inspector.channel.exchange_delete(exchange)
            inspector.channel.exchange_declare(exchange, "fanout", durable=True)
            inspector.queue(f"{name}-heard")
            inspector.channel.queue_bind(f"{name}-heard", exchange)
            connected(publisher)
            publisher.announce(body(6))
            assert inspector.get(f"{name}-heard").body == body(6)
            assert publisher.stats().published == 2
    assert len(inspector.messages(name, 2)) == 2


@pytest.mark.asyncio
async def test_a_process_announces_each_phase_at_once_then_in_intervals_and_its_end(
    amqp_url: str, name: str, exchange: str, quickly: None
) -> None:
    settings = Settings.load(amqp_url, {})
    phase = "starting"
    seen: list[Announcement] = []

    async def listening() -> None:
        async for announcement in heard(settings):
            seen.append(announcement)

    listener = asyncio.create_task(listening())
    await until_bound()
    with Publisher(amqp_url, exchange=name, app_id="shop") as publisher:
        await asyncio.to_thread(connected, publisher)
        described = {"queues": ["q"], "in_flight": 3}
        with announced(
            publisher, "worker", id="7", phase=lambda: phase, describe=lambda: described
        ):
            await until(lambda: len(seen) >= 3)
            phase = "ready"
            await until(lambda: seen[-1].phase == "ready")
            logging.getLogger("outbox.consumer").error("secret", exc_info=KeyError("secret"))
            await until(lambda: seen[-1].error)
        await until(lambda: seen[-1].phase == "ended")
    await ended(listener)
    assert len({one.process for one in seen}) == 1
    one = seen[0]
    assert (one.kind, one.id, one.pid, one.app_id) == ("worker", "7", os.getpid(), "shop")
    assert (one.phase, one.queues, one.in_flight) == ("starting", ("q",), 3)
    assert (one.error, one.error_age, one.interval) == (None, None, 0.2)
    last = seen[-1]
    assert (last.phase, last.error) == ("ended", "KeyError")
    assert last.error_age is not None
    assert "secret" not in repr(seen)
    assert not [one for one in logging.getLogger("outbox").handlers if one.level == logging.ERROR]
    assert [one.age for one in seen] == sorted(one.age for one in seen)


async def until_bound() -> None:
    """Wait until a listener that was started before this call has surely bound its queue."""
    await asyncio.sleep(1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PROMPTLY):
        while not condition():  # noqa: ASYNC110  nothing signals it
            await asyncio.sleep(0.01)


def test_where_nothing_can_be_heard_the_listener_says_so(amqp_url: str, exchange: str) -> None:
    assert listen(0.3, settings=Settings.load(amqp_url, {})) == []
    for url in ("sqlite:///x.db", "memory://"):
        with pytest.raises(UsageError, match=r"nothing is announced.*status` without --all"):
            listen(0.1, settings=Settings.load(url, {}))


def test_without_the_exchange_the_listener_says_so(amqp_url: str, exchange: str) -> None:
    with pytest.raises(UsageError, match="no exchange"):
        listen(5, settings=Settings.load(amqp_url, {"declare": "never"}))


def test_a_publisher_that_is_not_connected_or_not_on_rabbitmq_drops_announcements(
    tmp_path: Path, name: str
) -> None:
    for url in ("memory://", f"sqlite:///{tmp_path}/outbox.db", "amqp://127.0.0.1:1"):
        with Publisher(url) as publisher:
            publisher.announce(body(1))
            publisher.make_ready()
            publisher.announce(body(1))


@pytest.mark.one_python
@pytest.mark.asyncio
@pytest.mark.slow
async def test_workers_and_relays_announce_themselves_unless_that_is_off(
    amqp_url: str,
    inspector: Inspector,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Announcement] = []

    async def listening() -> None:
        async for announcement in heard(Settings.load(amqp_url, {})):
            if announcement.app_id == name:
                seen.append(announcement)

    listener = asyncio.create_task(listening())
    await until_bound()
    monkeypatch.setenv("OUTBOX_APP_ID", name)
    command = Command(tmp_path, RabbitMQPlace(amqp_url, name, inspector), name)
    database = f"sqlite:///{tmp_path}/events.db"
    opened(database).engine.dispose()
    started = [relay(amqp_url, database, presence) for presence in ("on", "off")]
    command.start("-p", "1", "-t", "3")

    def ready() -> dict[str, Announcement]:
        return {one.kind: one for one in seen if one.phase == "ready"}

    try:
        await until(lambda: len(ready()) == 2)
        assert ready()["relay"].pid == started[0].pid
        worker = ready()["worker"]
        [pid] = command.consuming(1)
        assert (worker.pid, worker.queues, worker.threads) == (pid, (name,), 3)
        assert (worker.in_flight, worker.late, worker.error) == (0, 0, None)
        for process in started:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert command.stop() == 0
        await until(lambda: [one.phase for one in seen].count("ended") == 2)
        assert {one.pid for one in seen} == {started[0].pid, pid}
    finally:
        await ended(listener)
        for process in started:
            process.kill()
            process.wait()
        command.close()


@pytest.fixture(params=["rabbitmq", "postgresql", "mariadb"])
def place(
    request: pytest.FixtureRequest, name: str, exchange: str, quickly: None, tmp_path: Path
) -> Place:
    """A place where processes announce themselves quickly."""
    return place_of(request.param, request, name, tmp_path)


def test_what_a_process_announces_is_found_until_it_ends(place: Place) -> None:
    settings = Settings.load(place.url, {})
    phase = "starting"
    described = {"queues": ["q"], "in_flight": 3, "threads": 2}
    with (
        place.publisher(app_id="shop") as publisher,
        place.publisher(presence="off") as silent,
        announced(connected(silent), "worker", id=None, phase=lambda: "ready", describe=dict),
        announced(
            connected(publisher), "worker", id="7", phase=lambda: phase, describe=lambda: described
        ),
    ):
        found = until_found(settings, lambda found: len(found) == 1)
        [one] = found
        assert (one.kind, one.id, one.pid, one.app_id) == ("worker", "7", os.getpid(), "shop")
        assert (one.phase, one.queues, one.threads, one.in_flight) == ("starting", ("q",), 2, 3)
        assert 0 <= one.ago < PROMPTLY
        phase = "leaving"
        [later] = until_found(settings, lambda found: [x.phase for x in found] == ["leaving"])
        assert later.process == one.process
    until_found(settings, lambda found: not found)
    records = open_presence_records(settings)
    if records is not None:  # which aren't only silent
        wait_until(lambda: all('"phase":"ended"' in each.announcement for each in records.read()))


def until_found(
    settings: Settings, condition: Callable[[list[Announcement]], object]
) -> list[Announcement]:
    found: list[Announcement] = []

    def is_so() -> object:
        nonlocal found
        found = listen(0.5, settings=settings)
        return condition(found)

    wait_until(is_so, timeout=PROMPTLY)
    return found


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> ServerPlace:
    place = place_of(request.param, request, name, tmp_path)
    assert isinstance(place, ServerPlace)
    return place


def test_processes_that_are_silent_are_left_out_and_then_dropped(server: ServerPlace) -> None:
    settings = Settings.load(server.url, {})
    records = open_presence_records(settings)
    assert records is not None
    texts = {
        number: json.dumps(
            {"version": 1, "process": str(number), "phase": "ready", "interval": 30, "pid": number}
        )
        for number in range(4)
    }
    for number, text in texts.items():
        records.write(str(number), text)
    assert [one.pid for one in listen(settings=settings)] == [0, 1, 2, 3]
    records.write("3", "of a later version")
    for number, seconds in ((0, 70), (1, 80), (2, 310)):
        before = (
            f"statement_timestamp() - INTERVAL '{seconds} seconds'"
            if server.url.startswith("postgresql")
            else f"UTC_TIMESTAMP(6) - INTERVAL {seconds} SECOND"
        )
        statement = f"UPDATE outbox_presence SET announced_at = {before} WHERE process = ?"
        server.execute(statement, str(number))
    [found] = listen(settings=settings)
    assert found.pid == 0
    assert 70 <= found.ago < 70 + PROMPTLY
    records.write("3", texts[3])
    remaining = server.execute("SELECT process FROM outbox_presence ORDER BY process")
    assert remaining == [("0",), ("1",), ("3",)]


def test_rows_need_no_session_of_the_server(pooled_url: str) -> None:
    opened(pooled_url).engine.dispose()
    settings = Settings.load(pooled_url, {})
    records = open_presence_records(settings)
    assert records is not None
    text = json.dumps({"version": 1, "process": "a", "phase": "ready", "interval": 30})
    for _ in range(12):  # over the pooler's connections, in turn
        records.write("a", text)
    assert [one.process for one in listen(settings=settings)] == ["a"]


@pytest.mark.usefixtures("quickly")
def test_without_the_table_a_process_works_and_says_so_once(
    server: ServerPlace,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "outbox.presence")
    monkeypatch.setattr(DatabasePresenceRecords, "every", 0.2)
    server.execute("DROP TABLE outbox_presence")
    try:
        server.bind(name, name, "#")
        with server.publisher() as publisher, watched_writes(monkeypatch) as writes:
            with announced(
                connected(publisher), "relay", id=None, phase=lambda: "ready", describe=dict
            ):
                wait_until(lambda: len(writes) >= 3)
            assert publisher.publish(events_for(publisher, ["x"])).published
        with pytest.raises(BrokerError, match="outbox_presence does not exist; add it with"):
            listen(settings=publisher.settings)
    finally:
        Store(server.engine).create()
    [line] = [one for one in caplog.records if one.name == "outbox.presence"]
    assert line.levelno == logging.INFO
    assert "outbox_presence does not exist; add it with `outbox sql upgrade`" in line.message


@contextlib.contextmanager
def watched_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note the processes that are written."""
    writes: list[str] = []
    write = DatabasePresenceRecords.write

    def noting(records: DatabasePresenceRecords, process: str, announcement: str) -> None:
        writes.append(process)
        write(records, process, announcement)

    with monkeypatch.context() as patch:
        patch.setattr(DatabasePresenceRecords, "write", noting)
        yield writes


@pytest.mark.one_python
def test_a_worker_over_a_database_shows_in_the_status_of_all_machines(
    postgresql: PrivatePostgreSQL,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = ServerPlace(postgresql.url, name)
    command = Command(tmp_path, server, name)
    status = ["workers", "status", "--url", server.url, "--all", "--json"]
    status += ["--pid-dir", str(tmp_path / "none")]
    (tmp_path / "none").mkdir(mode=0o700)

    def shown() -> list[dict[str, Any]]:
        code = main(status)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == (0 if lines else 3)
        return [line["announced"] for line in lines]

    command.start("-p", "1", "-t", "3")
    try:
        [pid] = command.consuming(1)
        wait_until(lambda: [one["phase"] for one in shown()] == ["ready"], timeout=PROMPTLY)
        [worker] = shown()
        assert (worker["pid"], worker["queues"], worker["threads"]) == (pid, [name], 3)
        assert worker["interval"] == 30
        assert command.stop() == 0
        assert shown() == []
    finally:
        command.close()


def relay(url: str, database: str, presence: str) -> subprocess.Popen[bytes]:
    variables = {
        "OUTBOX_URL": url,
        "OUTBOX_DATABASE_URL": database,
        "OUTBOX_PRESENCE": presence,
    }
    return subprocess.Popen(
        outbox_command("relay"), env={**os.environ, **variables}, stderr=subprocess.DEVNULL
    )


@pytest.mark.usefixtures("quickly", "exchange")
def test_the_status_of_all_machines_is_what_they_announce(
    amqp_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(listener, "WHOLE_INTERVAL", 1.5)
    monkeypatch.setenv("OUTBOX_PID_DIR", str(tmp_path / "pids"))
    command = ["workers", "status", "--url", amqp_url, "--all"]
    with contextlib.ExitStack() as stack:
        for id in ("mail", "slow"):
            publisher = connected(stack.enter_context(Publisher(amqp_url)))
            stack.enter_context(
                announced(
                    publisher,
                    "worker",
                    id=id,
                    phase=lambda: "ready",
                    describe=lambda: {"queues": ["high\x1b", "low"], "in_flight": 2},
                )
            )
        assert main(command) == 0
        output = capsys.readouterr()
        assert "no service in" in output.out
        assert output.err == "listening for 2 s to what is announced\n"
        for id in ("mail", "slow"):
            assert f": worker {id} (process {os.getpid()}): ready, 2 in flight, " in output.out
        assert output.out.count(" s ago; high\\x1b, low\n") == 2
        assert main([*command, "--id", "mail", "--json"]) == 3  # it isn't here
        [line] = capsys.readouterr().out.splitlines()
        assert json.loads(line)["announced"]["id"] == "mail"
