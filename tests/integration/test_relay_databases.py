"""A relay whose database is behind a pooler, or changes its role."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from outbox import Publisher
from outbox.sql import Inbox, Relay
from outbox.transports import outages
from tests.relaying import an_event, is_empty, many, opened, running
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A publisher that confirms at once."""
    with Publisher("memory://") as found:
        yield found


def test_relays_and_inboxes_work_behind_a_pooler_in_transaction_mode(
    pooled_url: str, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(pooled_url)
    relays = [Relay(pooled_url, publisher, batch=3, ordered=n % 2 == 1) for n in range(4)]
    caplog.set_level(logging.WARNING, "outbox")
    inbox = Inbox(pooled_url)
    for relay in relays:
        relay.start()
    for number in range(100):
        store.put([an_event(number, "x", key=f"k{number % 7}")])
        assert not inbox.entry(_Consumer(), _Message(number)).is_done()
        time.sleep(0.01)
    wait_until(lambda: is_empty(store), 20)
    for relay in relays:
        assert relay.stop()
    assert len(cast(Any, publisher)._own.published) == 100
    assert caplog.messages == []
    for engine in (store.engine, inbox.engine):
        engine.dispose()


def test_behind_a_pooler_listening_is_replaced_by_polling(
    pooled_url: str,
    publisher: Publisher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = opened(pooled_url)
    with running(Relay(pooled_url, publisher, listen=True)):
        wait_until(lambda: "notifications do not arrive" in caplog.text, 10)
        store.put(many(3, "x"))
        wait_until(lambda: is_empty(store), 5)
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "database" not in caplog.text
    store.engine.dispose()


def test_without_a_pooler_a_relay_listens(
    postgresql_url: str, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "outbox.relay")
    store = opened(postgresql_url)
    with running(Relay(postgresql_url, publisher, listen=True)):
        time.sleep(1.5)
    assert "LISTEN failed" not in caplog.text
    store.engine.dispose()


def test_a_relay_leaves_a_server_that_has_become_read_only(
    postgresql_url: str,
    publisher: Publisher,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages, "_REMINDED_EVERY", 0.5)
    store = opened(postgresql_url)
    caplog.set_level(logging.INFO, "outbox.relay")
    name = make_url(postgresql_url).database
    admin = create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def set_read_only(value: str) -> None:
        # For the connections that begin from now on, like a failover.
        with admin.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(
                f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"
            )

    store.put(many(3, "x"))
    set_read_only("on")
    with running(Relay(postgresql_url, publisher)):
        wait_until(lambda: re.search(r"read-only.*; down for \d+ s$", caplog.text, re.MULTILINE))
        set_read_only("off")
        wait_until(lambda: is_empty(store), 10)
        wait_until(lambda: "the database is available again, after " in caplog.text)
    store.engine.dispose()


class _Consumer:
    queue = "q"
    deduplicate = True


class _Message:
    def __init__(self, number: int) -> None:
        self.id = f"m{number}"
