"""The relay between a real database and a real broker, and what goes wrong between them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from outbox import BrokerError, Event, Publisher, UsageError
from outbox.sql import Relay, Store
from outbox.sql import relay as module
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from proving.proxy import FaultProxy, Frame, Way
from tests.amqp import Inspector
from tests.relaying import an_event, is_empty, many, opened, running
from tests.waiting import wait_until

FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


# ---------------------------------------------------------------------------- on a good day


def test_stored_events_arrive_in_order_and_are_deleted_from_the_table(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(2500, name, headers={"b": b"\xff"}, priority=3))
    with running(Relay(store, publisher, batch=400)) as relay:
        arrived = inspector.messages(name, 2500)
        wait_until(lambda: is_empty(store))
        wait_until(lambda: relay.stats().published == 2500)
    assert [message.id for message in arrived] == [f"e{n}" for n in range(2500)]
    assert arrived[0].properties.priority == 3
    stats = relay.stats()
    assert (stats.claimed, stats.released, stats.buried) == (2500, 0, 0)


@pytest.mark.hazard("F18")
def test_events_stored_while_the_relay_runs_arrive_soon(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with running(Relay(store, publisher)):
        for number in range(5):
            store.put([an_event(number, name)])
            assert inspector.get(name).payload == number


def test_concurrent_relays_publish_each_event_once(
    store: Store, amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(1000, name))
    with Publisher(amqp_url, exchange=name) as second, contextlib.ExitStack() as stack:
        for one in (publisher, second):
            stack.enter_context(running(Relay(store, one, batch=50)))
        arrived = inspector.messages(name, 1000)
        wait_until(lambda: is_empty(store))
    assert sorted(message.payload for message in arrived) == list(range(1000))
    assert inspector.all(name) == []


def test_run_once_publishes_due_events_and_returns(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(30, name))
    relay = Relay(store, publisher, batch=7)
    assert relay.run_once() == 30
    assert relay.run_once() == 0
    assert len(inspector.all(name)) == 30


@pytest.mark.hazard("F13")
def test_a_transaction_that_commits_late_with_a_lower_id_is_not_skipped(
    postgresql_store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store = postgresql_store
    with running(Relay(store, publisher)):
        with store.engine.begin() as connection:
            store.put([an_event(1, name)], connection=connection)
            store.put([an_event(2, name)])
            assert inspector.get(name).id == "e2"
        assert inspector.get(name).id == "e1"


@pytest.mark.hazard("F18")
def test_a_hint_wakes_an_idle_relay(
    postgresql_store: Store,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_IDLE", (60.0, 60.0))
    inspector.queue(name, name)
    publisher.publish([])

    def ask(statement: str) -> Any:
        with postgresql_store.engine.begin() as connection:  # each sees what is there now
            return connection.execute(text(statement)).first()

    with running(Relay(postgresql_store, publisher, listen=True)):
        wait_until(lambda: ask("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"))
        postgresql_store.put([an_event(1, name)])
        with postgresql_store.engine.begin() as connection:
            connection.exec_driver_sql("NOTIFY outbox_events")
        assert inspector.get(name).id == "e1"


@pytest.mark.hazard("F20")
@pytest.mark.one_python
@pytest.mark.slow
def test_a_relay_on_a_host_whose_clock_is_wrong_publishes_nothing_early_or_late(
    postgresql_url: str, amqp_url: str, inspector: Inspector, name: str
) -> None:
    store = opened(postgresql_url)
    inspector.queue(name, name)
    with store.engine.begin() as connection:
        store.put(many(2, name), connection=connection)
        connection.execute(
            text(
                "UPDATE outbox_events SET available_at = now() + interval '30 minutes' "
                "WHERE id = 'e1'"
            )
        )
    program = (
        "import sys, time; real = time.time; time.time = lambda: real() + {offset}\n"
        "from outbox.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for offset in (3600, -3600):
        done = subprocess.run(
            [sys.executable, "-c", program.format(offset=offset), "relay", "--once",
             "--database", postgresql_url, "--url", amqp_url],
            timeout=60, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.startswith("1 event" if offset > 0 else "0 events")
    assert [message.id for message in inspector.all(name)] == ["e0"]
    assert store.status().scheduled == 1
    store.engine.dispose()


# --------------------------------------------------------------- the broker or the event


@pytest.mark.one_python
def test_a_broker_that_is_away_costs_no_attempt_and_loses_nothing(
    store: Store, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with Publisher(proxy.url, exchange=name) as publisher:
        with running(Relay(store, publisher)):
            store.put(many(10, name))
            assert len(inspector.messages(name, 10)) == 10
            proxy.refuse()
            store.put(many(10, name))
            time.sleep(0.5)
            assert store.status().waiting + store.status().leased == 10
            proxy.heal()
            arrived = inspector.messages(name, 10)
            wait_until(lambda: is_empty(store))
    assert {message.id for message in arrived} == {f"e{n}" for n in range(10)}


@pytest.mark.hazard("F15")
def test_while_a_broker_does_not_answer_no_transaction_is_open_and_a_stop_releases_the_rows(
    postgresql_store: Store, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    store = postgresql_store
    inspector.queue(name, name)
    with Publisher(proxy.url, exchange=name, drain_timeout=0.1) as publisher:
        relay = Relay(store, publisher)
        with running(relay, 0.5):
            store.put([an_event(0, name)])
            inspector.get(name)
            wait_until(lambda: is_empty(store))
            proxy.black_hole()
            store.put(many(20, name))
            wait_until(lambda: store.status().leased == 20)
            for _ in range(20):
                with store.engine.begin() as connection:  # each sees what is there now
                    states = connection.execute(
                        text(
                            "SELECT state FROM pg_stat_activity "
                            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                        )
                    ).scalars()
                    assert not [one for one in states if one and "transaction" in one]
                time.sleep(0.02)
        assert store.status().waiting == 20
        assert relay.stats().released == 20
        proxy.heal()


@pytest.mark.one_python
def test_a_full_queue_is_retried_and_holds_up_no_other_events(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("free",))
    full = inspector.queue(f"{name}-full", name, ("full",), arguments=FULL)
    store.put([an_event(0, name, "full"), an_event(1, name, "full"), an_event(2, name, "free")])
    with running(Relay(store, publisher)):
        assert inspector.get(name).id == "e2"
        wait_until(lambda: store.status().scheduled == 1)
        store.put([an_event(3, name, "free")])
        assert inspector.get(name).id == "e3"
        assert [inspector.get(full).id, inspector.get(full).id] == ["e0", "e1"]
        wait_until(lambda: is_empty(store))


def test_an_event_that_can_never_be_published_dies_alone_with_its_reason(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("good",))
    store.put([an_event(n, name, "good") for n in range(20)])
    store.put([an_event(20, name, "nobody.wants.it", unroutable="fail")])
    store.put([an_event(n, name, "good") for n in range(21, 25)])
    with store.engine.begin() as connection:
        for wrong in ("headers = '[1]'", "headers = '{not json'"):
            connection.execute(
                text(
                    "INSERT INTO outbox_events (id, aggregatetype, aggregateid, type, payload,"
                    " exchange, content_type, occurred_at, stored_at, available_at)"
                    " SELECT 'wrong', 'a', 'a', 'good', payload, exchange, content_type,"
                    " occurred_at, stored_at, available_at FROM outbox_events WHERE id = 'e0'"
                )
            )
            connection.execute(
                text(f"UPDATE outbox_events SET {wrong} WHERE id = 'wrong' AND headers IS NULL")
            )
    with running(Relay(store, publisher)) as relay:
        arrived = inspector.messages(name, 24)
        wait_until(lambda: is_empty(store))
    assert {message.id for message in arrived} == {f"e{n}" for n in range(25)} - {"e20"}
    reasons = {id: reason for _, id, _, reason in store.dead()}
    assert "unroutable" in reasons["e20"]
    assert "no event" in reasons["wrong"]
    assert len(store.dead()) == 3
    assert relay.stats().buried == 1


def test_an_unroutable_event_is_parked_and_its_row_deleted(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("good",))
    store.put([an_event(1, name, "nobody.wants.it"), an_event(2, name, "x", unroutable="ignore")])
    assert Relay(store, publisher).run_once() == 2
    assert is_empty(store)


@pytest.mark.parametrize("ordered", [False, True])
def test_run_once_raises_when_the_broker_is_away_and_releases_the_rows(
    store: Store, proxy: FaultProxy, name: str, ordered: bool
) -> None:
    store.put(many(3, name, key="k"))
    proxy.refuse()
    with Publisher(proxy.url, exchange=name, drain_timeout=0.1) as publisher:
        with pytest.raises(BrokerError):
            Relay(store, publisher, ordered=ordered).run_once()
    assert store.status().waiting == 3


# ------------------------------------------------------------------------------ the database


@pytest.mark.hazard("F16")
def test_a_connection_lost_between_confirm_and_delete_only_repeats_the_same_ids(
    postgresql_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    store = opened(postgresql_url)
    inspector.queue(name, name)
    store.put(many(50, name))
    with FaultProxy(postgresql_url) as proxy:
        cut = proxy.cut_at(lambda piece: b"DELETE FROM outbox_events" in piece.data)
        with running(Relay(proxy.url, publisher, lease=1)):
            assert cut.wait(10)
            wait_until(lambda: is_empty(store), 20)
    arrived = [message.id for message in inspector.all(name)]
    assert set(arrived) == {f"e{n}" for n in range(50)}
    store.engine.dispose()


@pytest.mark.hazard("F21")
@pytest.mark.one_python
@pytest.mark.slow
def test_a_restarted_database_does_not_end_a_relay(
    mortal_postgresql: PrivatePostgreSQL, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    mortal_postgresql.start()
    inspector.queue(name, name)
    store = opened(mortal_postgresql.url)
    with running(Relay(store, publisher)):
        store.put([an_event(1, name)])
        assert inspector.get(name).id == "e1"
        mortal_postgresql.kill()
        time.sleep(0.3)
        mortal_postgresql.start()
        for _ in range(2):  # the pool's old connections fail once
            with contextlib.suppress(OperationalError):
                store.put([an_event(2, name)])
                break
        while inspector.get(name).id != "e2":
            pass  # that the first one was deleted may be lost with the server
    store.engine.dispose()


def test_a_missing_table_is_reported_at_the_start(
    postgresql_url: str, publisher: Publisher
) -> None:
    with pytest.raises(UsageError, match="outbox sql create"):
        Relay(postgresql_url, publisher).start()


@pytest.mark.parametrize("options", [{"batch": 0}, {"lease": 0}, {"lease": -1}])
def test_wrong_arguments_are_refused(
    store: Store, publisher: Publisher, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="must be"):
        Relay(store, publisher, **options)


# ------------------------------------------------------------------------------- kill -9


class Relaying:
    """``outbox relay`` as a process."""

    def __init__(self, database: str, broker: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outbox", "relay", "--database", database, "--url", broker,
             "--lease", "1", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self.process.wait(20)


Rule = Callable[[Frame], bool]
POINTS: dict[str, tuple[str, Rule]] = {
    "in its claim": ("database", lambda piece: b"FOR UPDATE SKIP LOCKED" in piece.data),
    "when it publishes": ("broker", lambda frame: frame.method == (60, 40)),
    "when the confirm comes": (
        "broker",
        lambda frame: frame.way is Way.DOWN and frame.method == (60, 80),
    ),
    "when it deletes": ("database", lambda piece: b"DELETE FROM outbox_events" in piece.data),
}


@pytest.mark.hazard("F16")
@pytest.mark.one_python
@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize("point", POINTS)
def test_a_relay_killed_at_any_point_loses_nothing_and_only_repeats_the_same_ids(
    point: str, database_url: str, amqp_url: str, inspector: Inspector, name: str
) -> None:
    store = opened(database_url)
    inspector.queue(name, name)
    store.put(many(200, name))
    where, rule = POINTS[point]
    with FaultProxy(database_url) as database, FaultProxy(amqp_url) as broker:
        found: list[Relaying] = []
        started = threading.Event()

        def kill_here(frame: Frame) -> bool:
            if not rule(frame):
                return False
            started.wait(10)
            found[0].kill()
            return True

        killed = (database if where == "database" else broker).cut_at(kill_here)
        first = Relaying(database.url, broker.url, "--batch", "50")
        found.append(first)
        started.set()
        assert killed.wait(30)
        first.end()
    assert store.status().queues[""] > 0
    second = Relaying(database_url, amqp_url)
    try:
        wait_until(lambda: is_empty(store), 20)
    finally:
        second.end()
    arrived = [message.id for message in inspector.all(name)]
    assert set(arrived) == {f"e{n}" for n in range(200)}
    store.engine.dispose()


@pytest.mark.hazard("F14")
@pytest.mark.one_python
@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.slow
def test_three_ordered_relays_with_one_killed_keep_the_order_of_every_key(
    database_url: str, amqp_url: str, inspector: Inspector, name: str
) -> None:
    store = opened(database_url)
    inspector.queue(name, name)
    store.put([an_event(n, name, key=f"k{n % 5}") for n in range(500)])
    options = ("--ordered", "--batch", "20")
    relays = [Relaying(database_url, amqp_url, *options) for _ in range(3)]
    try:
        wait_until(lambda: store.status().queues.get("", 0) < 480, 20)
        random.choice(relays).kill()
        wait_until(lambda: is_empty(store), 30)
    finally:
        for relay in relays:
            relay.end()
    first: dict[str, list[int]] = {}
    seen: set[int] = set()
    for message in inspector.all(name):
        if message.payload not in seen:  # a repetition comes later, with the same id
            seen.add(message.payload)
            first.setdefault(message.properties.headers["outbox-key"], []).append(message.payload)
    assert seen == set(range(500))
    assert all(numbers == sorted(numbers) for numbers in first.values())
    store.engine.dispose()


@pytest.mark.one_python
@pytest.mark.slow
def test_a_broker_killed_and_restarted_loses_nothing(
    private_broker: Any, postgresql_url: str, name: str
) -> None:
    inspector = Inspector(private_broker.url)
    inspector.queue(name, name, arguments={"x-queue-type": "classic"})
    store = opened(postgresql_url)
    parked: list[Event] = []  # just after its start the broker may not know the binding yet
    with Publisher(private_broker.url, exchange=name, on_parked=parked.extend) as publisher:
        with running(Relay(store, publisher, batch=50)):
            store.put(many(500, name))
            wait_until(lambda: store.status().queues.get("", 0) < 400)
            private_broker.restart()
            wait_until(lambda: is_empty(store), 30)
    arrived = {message.id for message in inspector.all(name)} | {event.id for event in parked}
    assert arrived == {f"e{n}" for n in range(500)}
    inspector.close()
    store.engine.dispose()
