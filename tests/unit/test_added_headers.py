"""Headers that the setting ``headers`` adds to every event."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import outbox.sql
from outbox import (
    EventCollector,
    InvalidEvent,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.consumers import Retry, Worker, consumer
from outbox.storage.store import Store
from tests.waiting import wait_until

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")


@contextlib.contextmanager
def as_tenant(name: str) -> Iterator[None]:
    token = tenant.set(name)
    yield
    tenant.reset(token)


def test_they_are_read_where_the_event_is_enqueued() -> None:
    threads: list[threading.Thread] = []

    def headers() -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {"tenant": tenant.get()}

    configure("memory://", headers=headers)
    with auto_publishing():
        with as_tenant("acme"):
            first = enqueue_event(1, "a")
        second = enqueue_event(2, "b", headers={"n": 1})
        assert threads == [threading.current_thread()] * 2
    assert len(threads) == 2
    assert first.headers == {"tenant": "acme"}
    assert second.headers == {"tenant": "none", "n": 1}


def test_the_callers_win_and_then_the_last_function() -> None:
    configure(
        "memory://",
        headers=[
            lambda: {"a": 1, "b": 1, "c": 1},
            lambda: None,
            lambda: {"b": 2, "c": 2},
        ],
    )
    with auto_publishing():
        assert enqueue_event(1, "a", headers={"c": 3}).headers == {"a": 1, "b": 2, "c": 3}
        assert enqueue_event(1, "a").headers == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ({"outbox-key": "k"}, "'outbox-key' is reserved"),
        ({"x": object()}, "is a object"),
        (["x"], "must be a mapping, not a list"),
        ({"x": "y" * 130_000}, "more than 120000"),
    ],
)
def test_they_obey_the_rules_for_headers(returned: Any, expected: str) -> None:
    def of_tenant() -> Any:
        return returned

    configure("memory://", headers=of_tenant)
    with auto_publishing() as collector:
        with pytest.raises(InvalidEvent, match=expected) as caught:
            enqueue_event(1, "a")
        assert "of_tenant" in str(caught.value)
        assert not collector.events


def test_they_and_the_callers_together_must_fit() -> None:
    configure("memory://", headers=lambda: {"x": "y" * 70_000})
    with auto_publishing() as collector:
        with pytest.raises(InvalidEvent, match="more than 120000"):
            enqueue_event(1, "a", headers={"z": "y" * 70_000})
        with pytest.raises(InvalidEvent, match="must be a mapping"):
            enqueue_event(1, "a", headers=["z"])  # type: ignore[arg-type]
        assert not collector.events


def test_what_a_function_raises_comes_out_of_enqueue_event() -> None:
    def broken() -> dict[str, Any]:
        raise LookupError("no tenant")

    configure("memory://", headers=broken)
    with auto_publishing() as collector:
        with pytest.raises(LookupError, match="no tenant"):
            enqueue_event(1, "a")
        assert not collector.events


class _Awaited:
    async def __call__(self) -> dict[str, Any]:
        return {}

    async def method(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    "wrong",
    [_Awaited(), _Awaited().method, functools.partial(_Awaited().method), [dict, _Awaited()]],
)
def test_a_coroutine_function_is_refused_when_it_is_configured(wrong: Any) -> None:
    before = configure("memory://")
    with pytest.raises(UsageError, match="the coroutine function"):
        configure("memory://", headers=wrong)
    assert EventCollector.current().publisher is before


def test_a_coroutine_that_a_function_returns_is_refused() -> None:
    configure("memory://", headers=lambda: _Awaited().method())  # type: ignore[arg-type,return-value]
    with auto_publishing(), pytest.raises(InvalidEvent, match="must be a mapping, not a coroutine"):
        enqueue_event(1, "a")


def test_a_stored_event_has_them_too(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/orders.db")
    store = Store(engine)
    store.create()
    configure("memory://", headers=lambda: {"tenant": tenant.get()}, after_commit="nothing")
    with as_tenant("acme"), Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    [row] = store.claim(10, lease=60)
    assert row.event.headers == {"tenant": "acme"}
    engine.dispose()
    outbox.sql.drain()


def test_a_retry_keeps_those_of_the_event_and_a_follow_on_event_gets_new_ones(
    tmp_path: Path,
) -> None:
    calls: list[str] = []

    def headers() -> dict[str, Any]:
        calls.append(tenant.get())
        return {"tenant": tenant.get()}

    seen: list[Any] = []

    @consumer("orders", auto_publish=True)
    def orders(event: Any) -> None:
        seen.append(event.headers)
        if event.attempt == 1:
            raise Retry(delay=0)
        tenant.set("worker")
        enqueue_event(2, "bills", exchange="")

    @consumer("bills")
    def bills(event: Any) -> None:
        seen.append(event.headers)

    publisher = configure(f"sqlite:///{tmp_path}/queue.db", headers=headers)
    worker = Worker([orders, bills], publisher=publisher, threads=1)
    worker.start()
    try:
        wait_until(lambda: worker.is_consuming)  # the queue exists
        with as_tenant("acme"), auto_publishing():
            enqueue_event(1, "orders", exchange="")
        wait_until(lambda: len(seen) == 3, 10)
    finally:
        worker.stop()
    assert seen == [{"tenant": "acme"}, {"tenant": "acme"}, {"tenant": "worker"}]
    assert calls == ["acme", "worker"]
