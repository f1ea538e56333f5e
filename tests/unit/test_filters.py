"""Filters and callbacks of consumers, run on recorded events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

import pytest

from outbox import UsageError, enqueue_event, publish
from outbox.consumers import (
    REJECT,
    Consumer,
    ReceivedEvent,
    Reject,
    RetryPolicy,
    after,
    around,
    before,
)
from outbox.consumers.filters import Filters
from outbox.consumers.outcome import Again
from outbox.testing import CollectedEvents


class Traced(Consumer):
    """Notes the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @around
    def outermost(self, event: ReceivedEvent) -> Iterator[None]:
        self.calls.append("outermost")
        try:
            yield
        finally:
            self.calls.append("/outermost")

    @before
    def check(self, event: ReceivedEvent) -> Any:
        self.calls.append("check")
        return REJECT if event.payload == "bad" else None

    @after
    def count(self, event: ReceivedEvent) -> None:
        self.calls.append("count")


class Child(Traced):
    queue = "q"

    @around
    def inner(self, event: ReceivedEvent) -> Iterator[None]:
        self.calls.append("inner")
        try:
            yield
        except KeyError:
            self.calls.append("swallowed")

    @before
    def also(self, event: ReceivedEvent) -> None:
        self.calls.append("also")

    @after
    def announce(self, event: ReceivedEvent) -> None:
        self.calls.append("announce")

    def process(self, event: ReceivedEvent) -> None:
        self.calls.append("process")
        if isinstance(event.payload, dict):
            raise {"key": KeyError, "value": ValueError}[event.payload["raise"]]


def test_filters_run_around_process_the_bases_outermost(collected_events: CollectedEvents) -> None:
    child = Child()
    assert collected_events.perform(child, "good").acked
    assert child.calls == (
        ["outermost", "inner", "check", "also", "process", "announce", "count", "/outermost"]
    )


def test_a_before_filter_can_decide_the_outcome(collected_events: CollectedEvents) -> None:
    child = Child()
    assert collected_events.perform(child, "bad").dead
    assert child.calls == ["outermost", "inner", "check", "/outermost"]


def test_an_exception_passes_through_the_filters_around_it(
    collected_events: CollectedEvents,
) -> None:
    child = Child()
    with pytest.raises(ValueError):
        collected_events.perform(child, {"raise": "value"})
    assert child.calls[-2:] == ["process", "/outermost"]
    child = Child()
    assert collected_events.perform(child, {"raise": "key"}).acked
    assert child.calls[-3:] == ["process", "swallowed", "/outermost"]


def test_a_subclass_and_its_subclasses_skip_the_filters_it_names(
    collected_events: CollectedEvents,
) -> None:
    class Skipping(Child):
        skip = ("check", "inner")

    class Below(Skipping):
        pass

    for kind in (Skipping, Below):
        consumer = kind()
        assert collected_events.perform(consumer, "bad").acked
        assert consumer.calls == (
            ["outermost", "also", "process", "announce", "count", "/outermost"]
        )


def test_a_method_that_overrides_a_filter_replaces_it(
    collected_events: CollectedEvents,
) -> None:
    class Overriding(Child):
        def check(self, event: ReceivedEvent) -> None:
            self.calls.append("checked otherwise")

    consumer = Overriding()
    assert collected_events.perform(consumer, "bad").acked
    assert consumer.calls[2:4] == ["checked otherwise", "also"]


def test_a_subclass_may_skip_more_than_its_base_does() -> None:
    class Base(Child):
        skip: ClassVar[Sequence[str]] = ("check",)

    class Wider(Base):
        skip = (*Base.skip, "inner")

    assert Wider.filters == Filters(
        before=("also",), after=("announce", "count"), around=("outermost",)
    )


def test_a_filter_may_be_overridden_by_another_kind_of_filter() -> None:
    class Later(Child):
        @after
        def check(self, event: ReceivedEvent) -> None: ...

    assert "check" not in Later.filters.before
    assert "check" in Later.filters.after


def test_a_filter_can_be_overridden_only_by_a_method() -> None:
    with pytest.raises(UsageError, match="Wrong: check is a filter, but not a method"):
        type("Wrong", (Child,), {"check": None})


def test_wrong_skips_and_wrong_overrides_of_filters_are_refused() -> None:
    with pytest.raises(UsageError, match="Wrong: skip names 'nothing', which is not one of its"):
        type("Wrong", (Child,), {"skip": ["nothing"]})
    with pytest.raises(UsageError, match="skip is 'check', not a list"):
        type("Wrong", (Child,), {"skip": "check"})
    with pytest.raises(UsageError, match="inner overrides a filter and needs @around"):
        type("Wrong", (Child,), {"inner": lambda self, event: None})
    with pytest.raises(UsageError, match="has no yield"):
        around(lambda self, event: None)


def test_asynchronous_filters_are_awaited(collected_events: CollectedEvents) -> None:
    calls = []

    class Async(Consumer):
        queue = "q"

        @around
        async def outer(self, event: ReceivedEvent) -> AsyncIterator[None]:
            calls.append("outer")
            await asyncio.sleep(0)
            yield
            calls.append("/outer")

        @before
        async def first(self, event: ReceivedEvent) -> None:
            await asyncio.sleep(0)
            calls.append("first")

        @before
        def plain(self, event: ReceivedEvent) -> None:
            calls.append("plain")

        async def process(self, event: ReceivedEvent) -> None:
            await asyncio.sleep(0)
            calls.append("process")

        async def on_success(self, event: ReceivedEvent) -> None:
            await asyncio.sleep(0)
            calls.append("success")

    assert collected_events.perform(Async, 1).acked
    assert calls == ["outer", "first", "plain", "process", "/outer", "success"]


def test_a_plain_consumer_has_no_asynchronous_filter() -> None:
    async def check(self: Any, event: ReceivedEvent) -> None: ...

    members = {"check": before(check), "process": lambda self, event: None, "queue": "q"}
    with pytest.raises(UsageError, match=r"check\(\) is asynchronous, but process\(\) is not"):
        type("Wrong", (Consumer,), members)


class Called(Consumer):
    """Notes which callbacks were called."""

    queue = "q"
    retry = RetryPolicy(max_attempts=2, give_up_on=(KeyError,))

    def __init__(self) -> None:
        self.called: list[str] = []

    def process(self, event: ReceivedEvent) -> None:
        if event.payload is not None:
            raise {"value": ValueError, "key": KeyError, "reject": Reject}[event.payload]("why")

    def on_success(self, event: ReceivedEvent) -> None:
        self.called.append("success")

    def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
        self.called.append(f"failure {type(error).__name__}")

    def on_dead(self, event: ReceivedEvent, reason: str) -> None:
        self.called.append(f"dead {reason}")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (None, ["success"]),
        ("value", ["failure ValueError"]),
        ("key", ["failure KeyError", "dead KeyError: 'why'"]),
        ("reject", ["dead why"]),
    ],
)
def test_callbacks_report_the_outcome_of_a_message(
    collected_events: CollectedEvents, payload: Any, expected: list[str]
) -> None:
    consumer = Called()
    done = collected_events.perform(consumer, payload, raise_errors=False)
    assert consumer.called == expected
    assert isinstance(done.outcome, Again) == (payload == "value")


def test_events_enqueued_by_a_callback_are_published_even_after_a_failure(
    collected_events: CollectedEvents,
) -> None:
    class Announcing(Consumer):
        queue = "q"

        def process(self, event: ReceivedEvent) -> None:
            enqueue_event("dropped", "dropped")
            raise ValueError

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            enqueue_event({"why": reason}, "work.given.up")
            enqueue_event({"why": reason}, "work.given.up")
            publish()

    for _ in range(2):
        collected_events.perform(Announcing, 1, raise_errors=False)
    collected_events.assert_not_published("dropped")
    found = collected_events.assert_published("work.given.up", times=4)
    assert len({event.id for event in found}) == 4  # two messages, two events each


def test_a_callback_that_fails_changes_nothing(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Consumer):
        queue = "q"

        def process(self, event: ReceivedEvent) -> None: ...

        def on_success(self, event: ReceivedEvent) -> None:
            enqueue_event("x", "t")
            raise ValueError

    assert collected_events.perform(Failing, 1).acked
    collected_events.assert_not_published("t")
    assert "on_success of" in caplog.text


def test_an_object_that_has_every_attribute_is_not_taken_for_a_filter() -> None:
    class Anything:
        def __getattr__(self, name: str) -> Any:
            return self

    class Odd(Consumer):
        queue = "odd"
        client = Anything()

        def process(self, event: ReceivedEvent) -> None: ...

    assert Odd.filters == Filters()


@pytest.mark.parametrize("window", [3600, "1d", 0])
def test_the_window_of_deduplication_must_be_a_timedelta(
    window: Any,
) -> None:
    with pytest.raises(UsageError, match=f"Wrong: deduplicate is {window!r}, not a bool or a time"):
        type("Wrong", (Consumer,), {"deduplicate": window})
