"""Tests of applications that freeze the time: what waits for the kit must not wait forever."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from outbox import auto_publishing, enqueue_event
from outbox.consumers import Consumer, ProcessTimeout, RetryPolicy, consumer
from outbox.testing import CollectedEvents, LiveEvents

NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)

Freeze = Callable[[], AbstractContextManager[Any]]


class FrozenDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return NOON.astimezone(tz)


@contextlib.contextmanager
def frozen_by_hand() -> Iterator[None]:
    """Replace the clocks as freezegun does: wherever a module has them as an attribute."""
    stopped = time.monotonic()

    def standing_still() -> float:
        return stopped

    fakes: dict[int, Any] = {
        id(time.monotonic): standing_still,
        id(time.perf_counter): standing_still,
        id(datetime.datetime): FrozenDatetime,
    }
    with pytest.MonkeyPatch.context() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith(("outbox.", "asyncio.")) or module in (time, datetime):
                for attribute, value in list(vars(module).items()):
                    if id(value) in fakes:
                        patches.setattr(module, attribute, fakes[id(value)])
        yield


@pytest.fixture(params=["by hand", "freezegun", "time_machine"])
def freeze(request: pytest.FixtureRequest) -> Freeze:
    if request.param == "by hand":
        return frozen_by_hand
    tool: Any = pytest.importorskip(request.param)
    if request.param == "freezegun":
        return lambda: tool.freeze_time(NOON)
    return lambda: tool.travel(NOON, tick=False)


@pytest.fixture(params=["live_events", "embedded_events"])
def events(request: pytest.FixtureRequest) -> LiveEvents:
    events = request.getfixturevalue(request.param)
    assert isinstance(events, LiveEvents)
    return events


class Flaky(Consumer):
    queue = "flaky"
    topics = ("order.*",)
    retry = RetryPolicy(max_attempts=2, delay=0)
    timeout = 20

    def process(self, event: Any) -> None:
        if event.attempt == 1:
            raise ConnectionError


@consumer("late", topics=["order.*"], timeout=0.05)
def late(event: Any) -> None:
    time.sleep(0.3)


@consumer("late.task", topics=["order.*"], timeout=0.05)
async def late_task(event: Any) -> None:
    await asyncio.sleep(60)


def place() -> None:
    with auto_publishing():
        enqueue_event({"id": 1}, "order.placed")


def test_a_live_worker_gets_quiet(events: LiveEvents, freeze: Freeze) -> None:
    with freeze():
        place()
        done = events.deliver_all(Flaky, timeout=20)
        event = events.assert_published("order.placed", times=1)
        assert event.occurred_at == NOON
    assert [one.acked for one in done] == [False, True]


def test_a_live_assertion_fails_when_its_patience_is_over(
    events: LiveEvents, freeze: Freeze
) -> None:
    events.patience = 0.1
    with freeze():
        with pytest.raises(AssertionError, match="found 0"):
            events.assert_published("order.placed")
        with pytest.raises(AssertionError, match="nothing was delivered"):
            events.deliver_all(Flaky)
        place()
        with pytest.raises(AssertionError, match=r"to 'b' after 'order\.placed'"):
            events.assert_published_in_order("order.placed", "b")


def test_time_limits_are_kept(events: LiveEvents, freeze: Freeze) -> None:
    with freeze():
        place()
        with pytest.raises(ProcessTimeout):
            events.deliver_all(late, timeout=20)


def test_recorded_events_have_the_frozen_time(
    collected_events: CollectedEvents, freeze: Freeze
) -> None:
    with freeze():
        with auto_publishing():
            enqueue_event({"id": 1}, "order.placed", delay=60)
        event = collected_events.assert_published("order.placed", delay=60)
        for too_late in (late, late_task):
            with pytest.raises(ProcessTimeout):
                collected_events.deliver_all(too_late)
        assert [one.acked for one in collected_events.deliver_all(Flaky)] == [False, True]
    assert event.occurred_at == NOON
    assert event.deliver_at == NOON + datetime.timedelta(minutes=1)
    assert "2026-01-01T12:00" in collected_events.dead_letters[0].headers["outbox-dead-at"]
