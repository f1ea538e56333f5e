"""Hints by PostgreSQL's NOTIFY and LISTEN: that they arrive, and what happens when they don't."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

from outbox.storage.notifications import Listener, Sender, channel_of
from outbox.storage.notifications import listening as listening_module
from proving.proxy import FaultProxy
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

logger = logging.getLogger("outbox.consumer")

ORDERS = channel_of("orders")


def engine_for(url: str, driver: str = "psycopg", **arguments: Any) -> Engine:
    address = make_url(url).set(drivername=f"postgresql+{driver}")
    return create_engine(address, poolclass=NullPool, connect_args=arguments)


@pytest.fixture
def engine(postgresql_url: str) -> Engine:
    """An engine for an empty database."""
    return engine_for(postgresql_url)


class Wakes:
    """Counts how often a listener wakes."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(time.monotonic())

    def wait_for(self, count: int) -> None:
        """Wait until it has been woken ``count`` times, and not more often."""
        wait_until(lambda: len(self.at) >= count)
        assert len(self.at) == count


@contextlib.contextmanager
def listening(
    engine: Engine, *queues: str, notifying: Engine | None = None
) -> Iterator[tuple[Listener, Wakes]]:
    """Listen within the block."""
    wakes = Wakes()
    channels = [channel_of(queue) for queue in queues]
    found = Listener(engine, channels, wakes, logger=logger, remedy="polling", notifying=notifying)
    found.start()
    try:
        yield found, wakes
    finally:
        found.stop()
    assert found._thread.ended


@contextlib.contextmanager
def sending(engine: Engine, **options: Any) -> Iterator[Sender]:
    """Close a sender after the block."""
    found = Sender(engine, **options)
    try:
        yield found
    finally:
        found.close()
    assert found._thread.ended or not found._thread.started


def backends(engine: Engine, query: str) -> list[int]:
    """Return the server's processes whose last statement begins with ``query``."""
    with engine.connect() as connection:
        found = "SELECT pid FROM pg_stat_activity WHERE query LIKE :query AND pid <> :own"
        own = connection.execute(text("SELECT pg_backend_pid()")).scalar()
        values = {"query": f"{query}%", "own": own}
        return list(connection.execute(text(found), values).scalars())


def terminate(engine: Engine, query: str) -> None:
    pids = backends(engine, query)
    assert pids
    with engine.connect() as connection:
        for pid in pids:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_notification_wakes_those_who_listen_on_its_queue(
    postgresql_url: str, driver: str
) -> None:
    engine = engine_for(postgresql_url, driver)
    with (
        listening(engine, "orders", "mail") as (one, wakes),
        listening(engine, "other") as (other, its_wakes),
        sending(engine) as notifier,
    ):
        wait_until(lambda: one.is_proven and other.is_proven)
        assert len(wakes.at) == len(its_wakes.at) == 1  # to look, now that they listen
        for number, queue in enumerate(["orders", "mail"], 2):
            began = time.monotonic()
            notifier.notify([channel_of(queue)])
            wakes.wait_for(number)
            assert wakes.at[-1] - began < 0.5
            time.sleep(0.03)
        assert len(its_wakes.at) == 1


def test_many_commits_are_announced_together_and_the_last_one_is(engine: Engine) -> None:
    with listening(engine, "orders") as (one, wakes), sending(engine) as notifier:
        wait_until(lambda: one.is_proven)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            notifier.notify([ORDERS])
            time.sleep(0.0005)
        last = time.monotonic()
        notifier.notify([ORDERS])
        wait_until(lambda: wakes.at[-1] > last)
        time.sleep(0.1)
        assert 5 <= len(wakes.at) <= 1 + 0.6 / 0.02 + 2


def test_what_waits_to_be_announced_is_sent_when_the_sender_is_closed(engine: Engine) -> None:
    with listening(engine, "orders", "mail") as (one, wakes):
        wait_until(lambda: one.is_proven)
        with sending(engine) as notifier:
            notifier.notify([ORDERS])
            wakes.wait_for(2)
            notifier.notify([channel_of("mail")])  # not yet, so soon after the first one
        wakes.wait_for(3)


def test_a_lost_sending_connection_is_replaced_without_a_word(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(engine, "orders") as (one, wakes), sending(engine) as notifier:
        wait_until(lambda: one.is_proven)
        notifier.notify([ORDERS])
        wakes.wait_for(2)
        terminate(engine, "SELECT set_config('synchronous_commit'")
        notifier.notify([ORDERS])
        wakes.wait_for(3)
    assert caplog.messages == []


def test_an_unused_sending_connection_is_closed(engine: Engine) -> None:
    notify = "SELECT set_config('synchronous_commit'"
    with sending(engine, idle_timeout=0.2) as notifier:
        for _ in range(2):
            notifier.notify([ORDERS])
            wait_until(lambda: backends(engine, notify))
            wait_until(lambda: not backends(engine, notify))


def test_a_server_that_takes_no_notification_costs_a_warning_and_a_few_connections(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultProxy(postgresql_url) as proxy, sending(engine_for(proxy.url)) as notifier:
        with listening(engine_for(postgresql_url), "orders") as (one, wakes):
            proxy.refuse()
            until = time.monotonic() + 1
            while time.monotonic() < until:
                notifier.notify([ORDERS])
                time.sleep(0.01)
            [warning] = caplog.messages
            assert warning.startswith("cannot notify workers or relays, which look for events")
            wait_until(lambda: one.is_proven)
            proxy.heal()
            before = len(wakes.at)
            while len(wakes.at) == before:
                notifier.notify([ORDERS])
                time.sleep(0.05)
        assert proxy.accepted <= 3


def _notify_in_child(engine: Engine, parents: Sender) -> None:
    with sending(engine) as notifier:
        notifier.notify([channel_of("mail")])
    del parents


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_connections_to_its_parent(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(engine, "orders", "mail") as (one, wakes), sending(engine) as notifier:
        wait_until(lambda: one.is_proven)
        notifier.notify([ORDERS])
        wakes.wait_for(2)
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_notify_in_child, args=(engine, notifier))
        child.start()
        child.join(10)
        assert child.exitcode == 0
        wakes.wait_for(3)
        pids = backends(engine, "SELECT set_config('synchronous_commit'")
        notifier.notify([ORDERS])
        wakes.wait_for(4)
        assert backends(engine, "SELECT set_config('synchronous_commit'") == pids
    assert caplog.messages == []


def test_those_who_found_nothing_leave_the_next_message_to_others(engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(listening(engine, "orders")) for _ in range(6)]
        notifier = stack.enter_context(sending(engine))
        wait_until(lambda: all(one.is_proven for one, _ in found))
        won = 0
        for turn in range(2, 13):
            first = found[0][0]
            first.has_found = True
            notifier.notify([ORDERS])
            for _, wakes in found:
                wakes.wait_for(turn)
            # At first nobody has found nothing yet.
            won += turn > 2 and min(range(6), key=lambda each: found[each][1].at[-1]) == 0
            time.sleep(0.03)
        assert won >= 6


def test_a_listener_whose_connection_is_cut_says_so_and_listens_again(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.consumer")
    with listening(engine, "orders") as (one, wakes), sending(engine) as notifier:
        wait_until(lambda: one.is_proven)
        terminate(engine, "LISTEN")
        wait_until(lambda: not one.is_proven)
        wait_until(lambda: one.is_proven)
        # To poll, and to look for what was committed meanwhile.
        assert len(wakes.at) == 3
        notifier.notify([ORDERS])
        wakes.wait_for(4)
    first, second = caplog.messages
    assert re.fullmatch(r"LISTEN failed: .+; polling", first)
    assert second == "notifications arrive again"


def test_a_server_that_refuses_listeners_is_asked_less_and_less_often(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultProxy(postgresql_url) as proxy:
        with listening(engine_for(proxy.url), "orders") as (one, _):
            wait_until(lambda: one.is_proven)
            proxy.cut_at(lambda frame: True)
            before = proxy.accepted
            proxy.cut()
            for _ in range(120):
                time.sleep(0.01)
                if proxy._rule is None:
                    proxy.cut_at(lambda frame: True)
            assert 1 <= proxy.accepted - before <= 6
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connection_that_delivers_nothing_any_more_is_noticed(
    postgresql_url: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_module, "_QUIET", 0.3)
    monkeypatch.setattr(listening_module, "_PROBE", 0.5)
    direct = engine_for(postgresql_url, driver)
    with (
        FaultProxy(postgresql_url) as proxy,
        listening(engine_for(proxy.url, driver, connect_timeout=2), "orders", notifying=direct) as (
            one,
            wakes,
        ),
    ):
        wait_until(lambda: one.is_proven)
        time.sleep(1)  # it hears itself
        assert one.is_proven
        assert len(wakes.at) == 1
        proxy.black_hole()
        wait_until(lambda: not one.is_proven, 3)
        proxy.heal()
        wait_until(lambda: one.is_proven, 5)


def test_behind_a_pooler_listening_is_not_believed(
    pooled_url: str, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    pooled = engine_for(pooled_url, prepare_threshold=None)
    with listening(pooled, "orders") as (one, wakes):
        wait_until(lambda: caplog.messages)
        time.sleep(1.6)  # another attempt
        assert not one.is_proven
        assert wakes.at == []
    assert caplog.messages == ["LISTEN failed: notifications do not arrive; polling"]
    with (
        listening(engine_for(postgresql_url), "orders", notifying=pooled) as (one, wakes),
        sending(pooled) as notifier,
    ):
        wait_until(lambda: one.is_proven)
        notifier.notify([ORDERS])
        wakes.wait_for(2)


def test_listening_at_another_database_is_not_believed(
    postgresql: Any, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = engine_for(postgresql.url)
    with listening(elsewhere, "orders", notifying=engine_for(postgresql_url)) as (one, _):
        wait_until(lambda: caplog.messages)
        assert not one.is_proven
