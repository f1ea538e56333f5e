"""A relay under faults: it claims nothing in vain, and neither waits, loses nor repeats."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from outbox import Publisher, UsageError
from outbox.sql import Relay, Store
from outbox.sql import relay as module
from outbox.storage.floors import NO_FLOOR
from outbox.storage.notifications import RELAY_CHANNEL
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.relaying import an_event, is_empty, many, opened, running
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


@pytest.fixture
def slow(proxy: FaultProxy, name: str) -> Iterator[Publisher]:
    """A publisher behind the proxy, which does not wait long at its end."""
    with Publisher(proxy.url, exchange=name, drain_timeout=0.1) as found:
        yield found


def published_one(store: Store, inspector: Inspector, name: str) -> None:
    """Return when a running relay is known to be connected."""
    store.put([an_event(1000, name)])
    inspector.get(name)
    wait_until(lambda: is_empty(store))


def columns(store: Store, what: str) -> list[Any]:
    with store.engine.begin() as connection:
        return [
            tuple(one)
            for one in connection.execute(text(f"SELECT {what} FROM outbox_events ORDER BY seq"))
        ]


def change(store: Store, assignment: str, id: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(
            text(f"UPDATE outbox_events SET {assignment} WHERE id = :id"), {"id": id}
        )


# --------------------------------------------------------------------------------- the broker


@pytest.mark.parametrize("ordered", [False, True])
def test_while_the_broker_is_away_nothing_is_claimed_and_no_attempt_counted(
    store: Store,
    slow: Publisher,
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    ordered: bool,
) -> None:
    inspector.queue(name, name)
    with running(Relay(store, slow, batch=10, ordered=ordered)) as relay:
        published_one(store, inspector, name)
        proxy.black_hole()
        store.put(many(100, name))  # more than may be on their way
        wait_until(lambda: store.status().leased)
        proxy.refuse()
        wait_until(lambda: store.status().waiting == 100)
        claimed = relay.stats().claimed
        time.sleep(0.3)
        assert relay.stats().claimed == claimed
        assert set(columns(store, "attempts")) == {(0,)}
        proxy.heal()
        arrived = inspector.messages(name, 100)
        wait_until(lambda: is_empty(store))
    assert {message.id for message in arrived} == {f"e{n}" for n in range(100)}


@pytest.mark.parametrize("ordered", [False, True])
def test_a_broker_slower_than_the_lease_still_gets_every_event_once(
    store: Store,
    slow: Publisher,
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    ordered: bool,
) -> None:
    inspector.queue(name, name)
    with running(Relay(store, slow, lease=0.6, ordered=ordered)):
        published_one(store, inspector, name)
        proxy.black_hole()
        store.put(many(5, name))
        wait_until(lambda: store.status().leased == 5)
        for _ in range(12):
            assert store.claim(5) == []  # what any other relay would get
            time.sleep(0.1)
        proxy.heal()
        wait_until(lambda: is_empty(store))
    assert [message.id for message in inspector.all(name)] == [f"e{n}" for n in range(5)]


def test_a_stopped_ordered_relay_sends_no_more_and_releases_its_rows_in_time(
    store: Store, slow: Publisher, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    relay = Relay(store, slow, ordered=True)
    relay.start()
    published_one(store, inspector, name)
    proxy.black_hole()
    store.put(many(20, name, key="k"))
    wait_until(lambda: store.status().leased == 20)
    begin = time.monotonic()
    assert not relay.stop(0.3)
    assert time.monotonic() - begin < 2
    assert store.status().waiting == 20
    proxy.heal()
    wait_until(lambda: slow.drain())
    assert len(inspector.all(name)) <= 1  # of the key, one was on its way


def test_a_refused_event_holds_up_only_its_key_and_only_its_own_attempts_count(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("free",))
    full = inspector.queue(f"{name}-full", name, ("full",), arguments=FULL)
    store.put([an_event(n, name, "full", key="k") for n in range(4)])
    store.put([an_event(n, name, "free", key="other") for n in range(4, 6)])
    with running(Relay(store, publisher, ordered=True)):
        assert [inspector.get(name).payload for _ in range(2)] == [4, 5]
        wait_until(lambda: store.status().scheduled == 1)
        found = columns(store, "id, attempts")
        assert [attempts for _, attempts in found] == [1] + [0] * (len(found) - 1)
        assert [inspector.get(full).payload for _ in range(4)] == [0, 1, 2, 3]
        wait_until(lambda: is_empty(store))


def test_a_closed_publisher_makes_the_relay_release_its_rows(
    store: Store, publisher: Publisher, name: str
) -> None:
    store.put(many(3, name))
    publisher.close()
    with pytest.raises(UsageError, match="closed"):
        Relay(store, publisher).run_once()
    assert store.status().waiting == 3


# ------------------------------------------------------------------------- rows of other programs


@pytest.mark.parametrize("ordered", [False, True])
def test_a_row_that_cannot_be_encoded_dies_alone(
    store: Store, publisher: Publisher, inspector: Inspector, name: str, ordered: bool
) -> None:
    inspector.queue(name, name)
    store.put([an_event(n, name, key="k") for n in range(9)])
    change(store, "priority = 300", "e4")
    assert Relay(store, publisher, ordered=ordered).run_once() == 8
    assert [message.payload for message in inspector.all(name)] == [0, 1, 2, 3, 5, 6, 7, 8]
    [(_, id, _, reason)] = store.dead()
    assert (id, reason.partition(":")[0]) == ("e4", "cannot be encoded")


@pytest.mark.parametrize("ordered", [False, True])
def test_a_row_that_the_driver_cannot_read_dies_alone(
    store: Store, publisher: Publisher, inspector: Inspector, name: str, ordered: bool
) -> None:
    inspector.queue(name, name)
    store.put([an_event(n, name, key="k") for n in range(5)])
    unreadable = {
        "postgresql": "'infinity'",
        # The zero date; MariaDB takes it where its mode isn't strict.
        "mariadb": "'0000-00-00'",
        "sqlite": "'yesterday'",
    }
    change(store, f"occurred_at = {unreadable[store.engine.dialect.name]}", "e2")
    assert Relay(store, publisher, ordered=ordered).run_once() == 4
    assert [message.payload for message in inspector.all(name)] == [0, 1, 3, 4]
    [(_, id, _, reason)] = store.dead()
    assert (id, reason.partition(":")[0]) == ("e2", "no event")


def test_text_stored_by_sqlite_instead_of_bytes_is_published(
    tmp_path: Path, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    store = opened(f"sqlite:///{tmp_path}/events.db")
    inspector.queue(name, name)
    store.put([an_event(1, name)])
    change(store, "payload = '\"ä\"'", "e1")
    assert Relay(store, publisher).run_once() == 1
    assert inspector.get(name).payload == "ä"
    store.engine.dispose()


# ------------------------------------------------------------------------------- the database


def test_a_lost_listener_reconnects(
    postgresql_store: Store,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_IDLE", (60.0, 60.0))
    inspector.queue(name, name)

    def listeners() -> list[int]:
        with postgresql_store.engine.begin() as connection:
            # Not any LISTEN: the relay first tries one on a channel of another name.
            found = "SELECT pid FROM pg_stat_activity WHERE query = :query"
            statement = f'LISTEN "{RELAY_CHANNEL}"'
            return list(connection.execute(text(found), {"query": statement}).scalars())

    with running(Relay(postgresql_store, publisher, listen=True)):
        wait_until(listeners)
        [first] = listeners()
        postgresql_store.put([an_event(1, name)])
        with postgresql_store.engine.begin() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": first})
        wait_until(lambda: set(listeners()) - {first})
        assert inspector.get(name).id == "e1"  # looked for when it listened again


def test_a_claim_does_not_read_dead_or_scheduled_rows(postgresql_store: Store) -> None:
    store = postgresql_store
    store.put([an_event(0, "x")])
    with store.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox_events (id, aggregatetype, aggregateid, type, payload,"
                " exchange, content_type, occurred_at, stored_at, available_at, dead_at)"
                " SELECT n::text, 'a', n::text, 'a', 'x', 'x', 'text/plain', now(), now(),"
                " now() + (n % 2) * interval '1 day', CASE n % 2 WHEN 0 THEN now() END"
                " FROM generate_series(1, 200000) n"
            )
        )
        connection.execute(text("ANALYZE outbox_events"))
    claim = store._statements.lease_due
    asked = {
        "of_queue": "", "of_rank": 0, "at_most": 1000, "max_bytes": 1 << 20,
        "of_token": "t", "seconds": 60.0, "floor": NO_FLOOR,
    }  # fmt: skip
    compiled = claim.compile(store.engine)
    with store.engine.begin() as connection:
        plan = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS) {compiled}",
            {**compiled.params, **asked},
        )
        lines = [line for (line,) in plan]
    assert any("outbox_events_due" in line for line in lines), lines
    assert not any("Seq Scan on outbox_events" in line for line in lines), lines
    assert not any("Rows Removed" in line for line in lines), lines
    hits = next(line for line in lines if "Buffers:" in line)
    assert sum(int(part.partition("=")[2]) for part in hits.split() if "=" in part) < 100, hits


@pytest.mark.slow
def test_relays_killed_at_random_lose_nothing(
    postgresql_url: str, amqp_url: str, inspector: Inspector, name: str
) -> None:
    store = opened(postgresql_url)
    inspector.queue(name, name)
    store.put(many(2000, name))
    command = [
        sys.executable, "-m", "outbox", "relay", "--database", postgresql_url, "--url", amqp_url,
        "--lease", "1", "--batch", "20",
    ]  # fmt: skip
    for last in (False, False, True):
        left = store.status().queues[""]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if last:
                wait_until(lambda: is_empty(store), 20)
            else:
                wait_until(lambda before=left: store.status().queues.get("", 0) < before)  # type: ignore[misc]
                time.sleep(random.uniform(0, 0.05))
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait(10)
    arrived = [message.id for message in inspector.all(name)]
    assert set(arrived) == {f"e{n}" for n in range(2000)}
    assert len(arrived) <= 2000 + 2 * 3 * 20  # again: at most what each had on its way
    store.engine.dispose()


# ------------------------------------------------------------------------------------- statistics


def test_the_relay_counts_the_fates_of_events_and_how_late_they_are(
    store: Store, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("good",))
    store.put([an_event(1, name, "good"), an_event(2, name, "nobody.wants.it")])
    store.put([an_event(3, name, "nobody.wants.it", unroutable="fail")])
    time.sleep(0.2)
    relay = Relay(store, publisher)
    assert relay.run_once() == 2
    stats = relay.stats()
    assert (stats.claimed, stats.published, stats.parked, stats.buried) == (3, 1, 1, 1)
    assert stats.lag == 0.0  # as of the last look, which found nothing
    store.put([an_event(4, name, "good")])
    time.sleep(0.2)
    [claimed] = store.claim(1)
    assert 0.2 <= claimed.age < 10


def test_a_relay_can_run_only_once(store: Store, publisher: Publisher) -> None:
    relay = Relay(store, publisher)
    with running(relay):
        for again in (relay.start, relay.run_once):
            with pytest.raises(UsageError, match="has run already"):
                again()
    with pytest.raises(UsageError, match="has run already"):
        relay.start()
