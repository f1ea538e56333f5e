"""The testing kit: matching, states, deliberate failures, consumers, simulated transactions."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import re
import sys
import threading
import time
import unittest
import unittest.mock
import uuid
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

import outbox.sql
from outbox import (
    CollectorClosed,
    Event,
    Publisher,
    PublishFailed,
    PublishTimeout,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
    publish,
    publish_async,
)
from outbox.consumers import (
    ACK,
    Consumer,
    ProcessTimeout,
    Requeue,
    RetryPolicy,
    Worker,
    consumer,
)
from outbox.observer import seam
from outbox.testing import CollectedEvents, CollectedEventsMixin, SimulatedCrash, recorded
from outbox.testing.matching import Wanted
from tests.invoicing import Invoices, Mails


def place(number: int = 1, target: str = "order.placed", **options: Any) -> Event:
    with auto_publishing():
        return enqueue_event({"id": number, "name": f"order {number}"}, target, **options)


# ---------------------------------------------------------------------------------- matching


def test_a_payload_matches_expressions_functions_and_stand_ins(
    collected_events: CollectedEvents,
) -> None:
    place(7)
    for payload in (
        {"name": re.compile(r"^order \d$")},
        {"id": lambda found: found > 6},
        lambda payload: payload["id"] == 7,
        {"id": unittest.mock.ANY},
    ):
        collected_events.assert_published("order.*", payload)
    for wrong in (
        {"name": re.compile("x")},
        {"id": lambda found: found > 7},
        lambda payload: False,
    ):
        collected_events.assert_not_published("order.*", wrong)
    collected_events.assert_not_published("order.*", {"id": re.compile("7")})


def test_key_priority_and_exchange_can_be_asserted(collected_events: CollectedEvents) -> None:
    place(1, key="k", priority=3, exchange="other")
    place(2)
    for criteria in ({"key": "k"}, {"priority": 3}, {"exchange": "other"}):
        assert collected_events.assert_published("#", **criteria).payload["id"] == 1
    assert collected_events.assert_published("#", key=None, priority=None).payload["id"] == 2
    collected_events.assert_not_published("#", priority=4)


def test_a_delay_matches_within_the_tolerance(collected_events: CollectedEvents) -> None:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    place(1, delay=60)
    place(2, deliver_at=at)
    place(3)
    assert collected_events.assert_published("#", delay=60).payload["id"] == 1
    minute = datetime.timedelta(minutes=1)
    assert collected_events.assert_published("#", delay=minute).payload["id"] == 1
    assert collected_events.assert_published("#", delay=58, tolerance=3).payload["id"] == 1
    assert collected_events.assert_published("#", deliver_at=at).payload["id"] == 2
    assert collected_events.assert_published("#", delay=None).payload["id"] == 3
    collected_events.assert_not_published("#", delay=58)


def test_a_failure_shows_how_the_nearest_event_differs(collected_events: CollectedEvents) -> None:
    place(1)
    place(2)
    with pytest.raises(AssertionError) as caught:
        collected_events.assert_published("order.placed", {"id": 2, "name": "order 3"}, priority=1)
    difference = str(caught.value).partition("wanted (-) and closest (+):\n")[2]
    assert '-     "name": "order 3"' in difference
    assert '+     "name": "order 2"' in difference
    assert '-   "priority": 1' in difference
    assert '+   "priority": null' in difference


def test_a_difference_in_any_criterion_is_shown() -> None:
    event = Event(id="1", target="b", exchange="x", body=b"[1]", deliver_at=None)
    difference = Wanted("a", [2], headers={"h": 1}, delay=5).difference(event)
    for line in (
        '-   "target": "a"',
        '+   "target": "b"',
        "-     2",
        "+     1",
        '-   "delay": "5"',
    ):
        assert line in difference
    assert Wanted("b", lambda _: False).difference(event) == ""


def test_events_are_asserted_in_order(collected_events: CollectedEvents) -> None:
    for number, target in enumerate(("a.x", "noise", "b", "a.y")):
        place(number, target)
    found = collected_events.assert_published_in_order("a.*", "b", "a.*")
    assert [event.target for event in found] == ["a.x", "b", "a.y"]
    with pytest.raises(AssertionError, match="expected a published event to 'b' after 'a\\.y'"):
        collected_events.assert_published_in_order("a.y", "b")


def test_nothing_else_means_events_that_no_assertion_has_matched(
    collected_events: CollectedEvents,
) -> None:
    place(1)
    place(2, "extra")
    collected_events.assert_published("order.placed")
    with pytest.raises(AssertionError, match="to match an assertion, but 1 did not"):
        collected_events.assert_nothing_else_published()
    collected_events.assert_published("extra")
    collected_events.assert_nothing_else_published()


def test_swapped_or_misspelt_arguments_are_reported(collected_events: CollectedEvents) -> None:
    place(1)
    swapped: Any = {"id": 1}
    with pytest.raises(TypeError, match="assertions take the target first, then the payload"):
        collected_events.assert_published(swapped, "order.placed")
    misspelt: Any = {"header": {}}
    with pytest.raises(TypeError, match=r"'header' .* did you mean 'headers'"):
        collected_events.assert_published("order.placed", **misspelt)
    with pytest.raises(TypeError, match="did you mean 'times'"):
        collected_events.assert_not_published("order.placed", time=1)  # type: ignore[call-arg]


def test_events_of_another_shape_do_not_make_a_function_matcher_fail(
    collected_events: CollectedEvents,
) -> None:
    place(1, "order.placed")
    with auto_publishing():
        enqueue_event({"other": 1}, "order.paid")
        enqueue_event(None, "order.sent")
    assert collected_events.assert_published("#", lambda payload: payload["id"] == 1, times=1)
    assert collected_events.assert_published("#", lambda payload: 1 / payload["id"] == 1, times=1)


@dataclasses.dataclass
class Line:
    item: str
    price: decimal.Decimal


class Colour(enum.Enum):
    RED = "red"


def test_an_expected_payload_matches_as_the_serializer_sends_it(
    collected_events: CollectedEvents,
) -> None:
    number, day = uuid.uuid4(), datetime.date(2026, 2, 1)
    line = Line("tea", decimal.Decimal("12.50"))
    whole = {"id": number, "day": day, "colour": Colour.RED, "lines": [line]}
    with auto_publishing():
        enqueue_event(whole, "order.placed", headers={"trace": number, "ratio": 1.5})
        enqueue_event(line, "line.added")
    for payload in (
        whole,
        {"id": number},
        {"lines": [{"price": decimal.Decimal("12.50")}]},
        {"lines": [line], "colour": "red"},
    ):
        collected_events.assert_published("order.placed", payload)
    collected_events.assert_published("line.added", line)
    collected_events.assert_published("order.placed", headers={"trace": number, "ratio": 1.5})
    for wrong in ({"id": uuid.uuid4()}, {"lines": [Line("tea", decimal.Decimal(13))]}, number):
        collected_events.assert_not_published("order.placed", wrong)
    with pytest.raises(AssertionError) as failure:
        collected_events.assert_published("line.added", Line("tea", decimal.Decimal(13)))
    assert 'with {"item": "tea", "price": "13"}, found 0' in str(failure.value)
    assert '-     "price": "13"' in str(failure.value)


def test_a_function_matcher_that_raises_is_an_error_and_no_answer(
    collected_events: CollectedEvents,
) -> None:
    place(1)
    for name in ("assert_published", "assert_not_published"):
        with pytest.raises(KeyError, match="nmae") as raised:
            getattr(collected_events, name)("order.placed", lambda payload: payload["nmae"])
        assert "'order.placed'" in raised.value.__notes__[0]
        with pytest.raises(ZeroDivisionError):
            getattr(collected_events, name)("order.placed", {"id": lambda found: found / 0})

    async def never(payload: object) -> bool:
        return False

    with pytest.raises(TypeError, match="is asynchronous"):
        collected_events.assert_not_published("order.placed", never)


def test_an_undecodable_payload_is_shown_by_its_size(
    collected_events: CollectedEvents,
) -> None:
    Publisher("memory://").publish([Event(id="1", target="a", exchange="x", body=b"{")])
    with pytest.raises(AssertionError, match="'a' <1 bytes of application/json>"):
        collected_events.assert_published("a", {})
    assert collected_events.assert_published("a").body == b"{"


# ------------------------------------------------------------------------------------ states


def test_each_state_has_its_assertion(collected_events: CollectedEvents) -> None:
    with pytest.raises(RuntimeError), auto_publishing():
        enqueue_event(1, "dropped")
        collected_events.assert_pending("dropped", 1)
        raise RuntimeError
    collected_events.assert_cleared("dropped", 1)
    with collected_events.broker_down():
        place(2, "waits")
        collected_events.assert_kept("waits")
        collected_events.assert_not_published("waits")
    collected_events.assert_published("waits")
    with pytest.raises(AssertionError, match="at least 1 stored"):
        collected_events.assert_stored("#")
    assert repr(collected_events) == "<CollectedEvents 1 published, 1 cleared>"


def test_events_stored_in_a_session_follow_its_transaction(
    collected_events: CollectedEvents,
) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    import outbox.sql

    engine = create_engine("sqlite://")
    outbox.sql.metadata.create_all(engine)
    with Session(engine) as session:
        enqueue_event(1, "kept", session=session)
        with pytest.raises(RuntimeError), session.begin_nested():
            enqueue_event(2, "inner", session=session)
            session.flush()
            raise RuntimeError
        collected_events.assert_cleared("inner")
        session.commit()
        enqueue_event(3, "closed", session=session)
    collected_events.assert_cleared("closed")
    collected_events.assert_stored("kept")
    collected_events.assert_enqueued("kept", 1)
    collected_events.assert_not_enqueued("closed")
    with pytest.raises(AssertionError, match="expected no enqueued event to 'kept'"):
        collected_events.assert_not_enqueued("kept")
    assert collected_events.commit()[0].target == "kept"
    collected_events.assert_published("kept")
    engine.dispose()


def test_an_enqueued_event_was_published_or_is_in_a_transaction(
    collected_events: CollectedEvents,
) -> None:
    collected_events.assert_nothing_enqueued()
    with auto_publishing():
        enqueue_event(1, "order.placed")
        with pytest.raises(AssertionError, match="pending"):
            collected_events.assert_enqueued("order.placed")
        collected_events.assert_nothing_enqueued()
    collected_events.assert_enqueued("order.*", 1, times=1)
    collected_events.assert_nothing_else_published()
    with pytest.raises(AssertionError, match=r"at least 1 enqueued event(.|\n)*closest") as raised:
        collected_events.assert_enqueued("order.placed", 2)
    assert "published:" in str(raised.value)
    with pytest.raises(AssertionError, match="expected no enqueued event, found 1"):
        collected_events.assert_nothing_enqueued()


def test_a_transaction_can_be_simulated(collected_events: CollectedEvents) -> None:
    with auto_publishing() as block:
        enqueue_event(1, "a")
        with pytest.raises(RuntimeError), collected_events.savepoint():
            enqueue_event(2, "b")
            raise RuntimeError
        collected_events.assert_cleared("b")
        assert [event.target for event in collected_events.commit()] == ["a"]
        collected_events.assert_published("a", times=1)
        enqueue_event(3, "c")
        assert [event.target for event in collected_events.rollback()] == ["c"]
        block.clear_events()
    collected_events.assert_not_published("c")


def test_a_simulated_end_is_not_repeated_at_the_end_of_its_block(
    collected_events: CollectedEvents,
) -> None:
    with auto_publishing():
        enqueue_event(1, "a")
        collected_events.commit()
        enqueue_event(2, "b")
        collected_events.rollback()
        enqueue_event(3, "c")
    collected_events.assert_published_in_order("a", "c")
    collected_events.assert_published("#", times=2)
    collected_events.assert_cleared("b", times=1)


# ------------------------------------------------------------------------ failures on purpose


def test_publishing_fails_after_the_given_number_of_events(
    collected_events: CollectedEvents,
) -> None:
    error = PublishTimeout("slow")
    with collected_events.fail_publish(after=2, error=error):
        with auto_publishing() as block:
            for n in range(4):
                enqueue_event(n, "a")
        assert block.report is not None
        assert [event.payload for event in block.report.published] == [0, 1]
        assert [event.payload for event in block.report.kept] == [2, 3]
        assert block.report.error is error
    assert [event.payload for event in collected_events.published] == [0, 1, 2, 3]


def test_events_kept_one_after_the_other_are_published_in_that_order(
    collected_events: CollectedEvents,
) -> None:
    publisher = configure("memory://")
    with collected_events.broker_down():
        for number in (1, 2, 3):
            place(number)
        with collected_events.fail_publish(after=1):
            place(4)
        assert [event.payload["id"] for event in publisher.kept] == [1, 2, 3]
        place(5)
        assert [event.payload["id"] for event in publisher.kept] == [1, 2, 3, 5]
    assert [event.payload["id"] for event in collected_events.published] == [4, 1, 2, 3, 5]
    stats = publisher.stats()
    assert (stats.published, stats.kept, stats.ever_kept) == (5, 0, 4)


def test_an_event_without_a_queue_is_parked_failed_or_ignored(
    collected_events: CollectedEvents,
) -> None:
    with collected_events.unroutable("lost.*"), auto_publishing() as block:
        enqueue_event(1, "lost.one")
        enqueue_event(2, "lost.two", unroutable="fail")
        enqueue_event(3, "lost.three", unroutable="ignore")
        enqueue_event(4, "found")
    report = block.report
    assert report is not None
    assert [event.payload for event in report.parked] == [1]
    assert [one.event.payload for one in report.rejected] == [2]
    assert [event.payload for event in report.ignored] == [3]
    assert [event.payload for event in report.published] == [4]
    assert [event.payload for event in collected_events.parked] == [1]


def test_a_crash_after_the_confirm_leaves_the_event_published(
    collected_events: CollectedEvents,
) -> None:
    with collected_events.crash_after_confirm(), pytest.raises(SimulatedCrash):
        place(1)
    collected_events.assert_published("order.placed")
    assert not issubclass(SimulatedCrash, Exception)


# --------------------------------------------------------------------------------- consumers


def test_consumers_process_published_events_until_quiet(
    collected_events: CollectedEvents,
) -> None:
    place(1, key="k", headers={"tenant": "acme"})
    place(2)
    first = collected_events.deliver(Invoices)
    assert [one.acked for one in first] == [True, True]
    assert [event.target for event in first[0].follow_ons] == ["invoice.sent"]
    assert collected_events.deliver(Invoices) == []
    rest = collected_events.deliver_all(Invoices, Mails)
    assert {one.consumer.queue for one in rest} == {"mails"}
    collected_events.assert_published("mail.sent", times=2)


def test_a_handlers_error_is_raised_and_its_message_is_a_dead_letter(
    collected_events: CollectedEvents,
) -> None:
    place(13)
    with pytest.raises(ValueError, match="thirteen"):
        collected_events.deliver_all(Invoices)
    letter = collected_events.assert_published("invoices.dead", {"id": 13}, exchange="")
    assert letter.headers["outbox-dead-reason"] == "ValueError: thirteen"
    collected_events.assert_not_published("invoice.#")
    place(14)
    [found] = collected_events.deliver_all(Invoices, raise_errors=False)
    assert found.dead
    assert collected_events.deliver_all(Invoices) == []


def test_an_endless_loop_of_events_is_reported(collected_events: CollectedEvents) -> None:
    class Echo(Consumer):
        queue = "echo"
        auto_publish = True

        def process(self, event: Any) -> None:
            enqueue_event(event.payload, "echo")

    place(1, "echo")
    with pytest.raises(AssertionError, match="after 100 rounds"):
        collected_events.deliver_all(Echo)


def test_a_single_consumer_performs_a_single_message(collected_events: CollectedEvents) -> None:
    done = collected_events.perform(Invoices, {"id": 5}, target="order.placed")
    assert done.outcome == ACK
    assert done.acked
    assert [event.payload for event in done.follow_ons] == [{"order": 5}]
    again = collected_events.perform(Invoices, {"id": 5}, target="order.placed", id=done.event.id)
    assert again.follow_ons[0].id == done.follow_ons[0].id
    with pytest.raises(ValueError, match="thirteen"):
        collected_events.perform(Invoices, {"id": 13})
    assert collected_events.perform(Invoices, {"id": 13}, raise_errors=False).dead


@pytest.mark.asyncio
async def test_consumers_also_publish_in_asynchronous_tests(
    collected_events: CollectedEvents,
) -> None:
    async with auto_publishing():
        enqueue_event({"id": 1}, "order.placed")
    assert [one.acked for one in collected_events.deliver_all(Invoices)] == [True]
    assert collected_events.perform(Invoices, {"id": 2}).acked


def test_a_worker_on_recorded_events_is_refused(
    collected_events: CollectedEvents, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"deliver_all\(\), or .* the fixture live_events"):
        Worker([Invoices], publisher=Publisher(f"sqlite:///{tmp_path}/unused.db"))


def test_a_message_that_is_given_back_is_delivered_again(collected_events: CollectedEvents) -> None:
    class Later(Consumer):
        queue = "later"
        times = 0

        def process(self, event: Any) -> None:
            Later.times += 1
            if Later.times == 1:
                raise Requeue

    place(1, "later")
    assert not collected_events.deliver(Later)[0].acked
    assert collected_events.deliver(Later)[0].acked


def test_a_message_with_unconfirmed_follow_ons_is_not_acked(
    collected_events: CollectedEvents,
) -> None:
    place(1)
    with collected_events.broker_down(), pytest.raises(PublishFailed):
        collected_events.deliver(Invoices)
    assert collected_events.kept == ()
    collected_events.assert_not_published("invoice.#")


class Flaky(Consumer):
    """It is named like the event, and fails until the attempt that the event asks for."""

    queue = "order.placed"
    retry = RetryPolicy(max_attempts=3, delay=60)

    def process(self, event: Any) -> None:
        if event.attempt < event.payload["id"]:
            raise OSError(f"printer, {event.attempt}")


@pytest.mark.collected_events(strict=True)
def test_retries_and_dead_letters_do_not_count_as_published_by_the_application(
    collected_events: CollectedEvents,
) -> None:
    place(2)
    done = collected_events.deliver_all(Flaky)
    assert [(one.retried, one.acked) for one in done] == [(True, False), (False, True)]
    assert collected_events.assert_published("order.placed", {"id": 2}, times=1).exchange
    place(9)
    with pytest.raises(OSError, match="printer, 3"):
        collected_events.deliver_all(Flaky)
    collected_events.assert_published("order.placed", times=2)
    collected_events.assert_not_published("#", exchange="")
    collected_events.assert_nothing_else_published()
    [letter] = collected_events.dead_letters
    assert letter is collected_events.assert_published("order.placed.dead", {"id": 9}, times=1)
    assert repr(collected_events) == "<CollectedEvents 2 published, 1 dead-lettered>"


def test_an_attempt_that_this_call_will_not_repeat_is_raised(
    collected_events: CollectedEvents,
) -> None:
    place(2)
    for deliver in (collected_events.deliver, collected_events.perform):
        arguments: Any = [Flaky] if deliver == collected_events.deliver else [Flaky, {"id": 2}]
        with pytest.raises(OSError, match="printer, 1"):
            deliver(*arguments)
    assert [one.acked for one in collected_events.deliver(Flaky)] == [True, True]


def test_the_handlers_own_lines_are_shown_and_nothing_before_them(
    collected_events: CollectedEvents,
) -> None:
    class Later(Invoices):
        queue = "later"

        async def process(self, event: Any) -> None:  # type: ignore[override]
            raise ValueError("thirteen")

    for failing in (Invoices, Later):
        with pytest.raises(ValueError, match="thirteen") as failure:
            collected_events.perform(failing, {"id": 13})
        assert failure.value.__context__ is None
        engine = [
            entry.frame.f_globals["__name__"]
            for entry in failure.traceback
            if not entry.frame.f_locals.get("__tracebackhide__")
        ]
        assert not [name for name in engine if name.startswith(("outbox", "asyncio"))]
        assert failure.traceback[-1].name == "process"


def test_delivering_nothing_is_an_error_that_lists_what_there_was(
    collected_events: CollectedEvents,
) -> None:
    place(1, "order_placed")
    for deliver in (collected_events.deliver, collected_events.deliver_all):
        with pytest.raises(AssertionError) as failure:
            deliver(Invoices, Mails)
        assert "'invoices' takes ['invoices', 'order.*'] from the exchange" in str(failure.value)
        assert "'order_placed' to the exchange" in str(failure.value)
        assert deliver(Invoices, allow_none=True) == []
    place(1)
    assert len(collected_events.deliver_all(Invoices, Mails)) == 2
    assert collected_events.deliver_all(Invoices, Mails) == []


def test_a_worker_would_refuse_these_consumers(collected_events: CollectedEvents) -> None:
    class Nameless(Consumer):
        def process(self, event: Any) -> None: ...

    class Twin(Mails):
        pass

    for consumers, message in (
        ([Nameless], "names no queue"),
        ([Mails, Twin], "mails"),
        ([type("Idle", (Consumer,), {"queue": "idle"})], r"has no process\(\)"),
        ([], "at least one consumer"),
    ):
        with pytest.raises(UsageError, match=message):
            collected_events.deliver_all(*consumers)


def test_a_plain_handler_is_held_to_its_timeout(collected_events: CollectedEvents) -> None:
    refused: list[BaseException] = []
    called: list[str] = []

    class Slow(Consumer):
        queue = "slow"
        timeout = 0.05

        def process(self, event: Any) -> None:
            enqueue_event(1, "early")
            for _ in range(100):
                time.sleep(0.05)
                try:
                    enqueue_event(2, "late")
                except CollectorClosed as error:
                    refused.append(error)
                    return

        def on_timeout(self, event: Any) -> None:
            called.append(threading.current_thread().name)

    before = threading.active_count()
    with pytest.raises(ProcessTimeout, match=r"more than 0\.05 s"):
        collected_events.perform(Slow)
    assert refused
    assert called == [threading.current_thread().name]
    collected_events.assert_nothing_published()
    [letter] = collected_events.dead_letters
    assert "ProcessTimeout" in letter.headers["outbox-dead-reason"]
    assert threading.active_count() == before

    class Quick(Slow):
        timeout = 60

        def process(self, event: Any) -> None:
            enqueue_event(1, "early")
            publish()

    assert collected_events.perform(Quick).acked
    assert threading.active_count() == before


def test_a_message_is_processed_only_once_by_a_consumer_that_deduplicates(
    collected_events: CollectedEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(Consumer):
        queue = "once"
        topics = ("order.*",)
        deduplicate: ClassVar[bool | datetime.timedelta] = datetime.timedelta(days=2)
        done: ClassVar[list[str]] = []

        def process(self, event: Any) -> None:
            if not event.payload["id"]:
                raise ValueError("no id")
            self.done.append(event.id)

    class Again(Once):
        queue = "again"
        deduplicate = False

    first = collected_events.perform(Once, {"id": 1})
    event_id = first.event.id
    assert (first.acked, first.duplicate) == (True, False)
    second = collected_events.perform(Once, {"id": 1}, id=event_id)
    assert (second.acked, second.duplicate) == (True, True)
    assert not collected_events.perform(Again, {"id": 1}, id=event_id).duplicate
    assert not collected_events.perform(Again, {"id": 1}, id=event_id).duplicate
    assert Once.done == [event_id] * 3
    place(2, id="twice")
    place(2, id="twice")
    assert [one.duplicate for one in collected_events.deliver_all(Once)] == [False, True]
    for _ in range(2):  # a failed attempt is not remembered
        assert collected_events.perform(Once, {"id": 0}, id="f", raise_errors=False).dead

    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return tomorrow

    monkeypatch.setattr(datetime, "datetime", Frozen)
    assert not collected_events.perform(Once, {"id": 1}, id=event_id).duplicate


def test_the_tests_own_session_is_left_as_it_is(
    collected_events: CollectedEvents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where other tests have set Django up, coroutines run in a thread beside that of its queries.
    monkeypatch.delitem(sys.modules, "django.db", raising=False)
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
    session = scoped_session(sessionmaker(engine))
    seen: list[Any] = []

    class Counting(Consumer):
        queue = "counting"
        topics = ("order.*",)

        def process(self, event: Any) -> None:
            seen.append(session())
            rows = session.execute(text("SELECT count(*) FROM orders")).scalar()
            assert rows == event.payload["id"]

    class CountingLater(Counting):
        queue = "counting.later"

        async def process(self, event: Any) -> None:  # type: ignore[override]
            Counting.process(self, event)

    outbox.sql.bind(session)
    try:
        session.execute(text("INSERT INTO orders VALUES (1)"))
        mine = session()
        for counting in (Counting, CountingLater):
            assert collected_events.perform(counting, {"id": 1}).acked
        with pytest.raises(AssertionError):
            collected_events.perform(Counting, {"id": 5})
        assert session() is mine
        assert set(seen) == {mine}
        assert session.execute(text("SELECT count(*) FROM orders")).scalar() == 1
        session.remove()
        del seen[:]
        for counting in (Counting, CountingLater):
            assert collected_events.perform(counting, {"id": 0}).acked
        assert len(set(seen)) == 2  # each message had one for itself, which was removed
        assert not session.registry.has()
    finally:
        session.remove()
        outbox.sql.bind(None)
        engine.dispose()


@pytest.mark.asyncio
async def test_coroutines_run_in_the_tests_own_loop_or_not_at_all(
    collected_events: CollectedEvents,
) -> None:
    loops: list[Any] = []

    @consumer("a", topics=["order.*"], timeout=5)
    async def asynchronous(event: Any) -> None:
        loops.append((asyncio.get_running_loop(), asyncio.current_task()))
        await asyncio.sleep(0)
        enqueue_event({"id": 1}, "invoice.sent")
        await publish_async()

    async with auto_publishing():
        enqueue_event({"id": 1}, "order.placed")
    for refused in (
        lambda: collected_events.deliver(asynchronous),
        lambda: collected_events.deliver_all(Invoices, asynchronous),
        lambda: collected_events.perform(asynchronous),
    ):
        with pytest.raises(UsageError, match=r"await deliver_async\(\)"):
            refused()
    assert loops == []
    done = await collected_events.deliver_all_async(asynchronous, Mails)
    assert [one.consumer.queue for one in done] == ["a", "mails"]
    assert (await collected_events.perform_async(asynchronous)).acked
    assert (await collected_events.perform_async(Invoices, {"id": 1})).acked
    assert await collected_events.deliver_async(asynchronous) == []
    assert {loop for loop, _ in loops} == {asyncio.get_running_loop()}
    assert asyncio.current_task() not in [task for _, task in loops]

    @consumer("slow", timeout=0.02)
    async def slow(event: Any) -> None:
        await asyncio.sleep(60)

    with pytest.raises(ProcessTimeout):
        await collected_events.perform_async(slow)

    @consumer("crash", retry=RetryPolicy())
    async def crashing(event: Any) -> None:
        pytest.fail("as a mock would")

    with pytest.raises(pytest.fail.Exception, match="as a mock would"):
        await collected_events.perform_async(crashing)


def test_a_synchronous_test_keeps_its_current_event_loop(
    collected_events: CollectedEvents,
) -> None:
    @consumer("a")
    async def asynchronous(event: Any) -> None: ...

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        assert collected_events.perform(asynchronous).acked
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_what_could_not_be_settled_is_delivered_again_by_the_next_call(
    collected_events: CollectedEvents,
) -> None:
    place(1)
    place(13)
    with collected_events.broker_down():
        left = collected_events.deliver_all(Invoices, raise_errors=False)
    assert not any(one.acked for one in left)
    collected_events.assert_not_published("invoice.#")
    assert collected_events.dead_letters == ()
    done = collected_events.deliver_all(Invoices, raise_errors=False)
    assert [(one.acked, one.dead) for one in done] == [(True, False), (False, True)]
    place(2)
    with collected_events.crash_after_confirm(), pytest.raises(SimulatedCrash):
        collected_events.deliver_all(Invoices)
    [again] = collected_events.deliver_all(Invoices)
    assert again.acked


# ----------------------------------------------------------------------------------- fixtures


def test_recording_twice_is_refused_naming_both_places(collected_events: CollectedEvents) -> None:
    with pytest.raises(UsageError, match=r"by the fixture collected_events of .*both_places.*: me"):
        with recorded("me"):
            pass


def test_without_the_fixture_nothing_is_left_behind() -> None:
    with recorded("a block") as found:
        place(1)
        found.assert_published("order.placed")
    publisher = configure("memory://")
    place(2)
    assert publisher.stats().published == 1


def test_tracebacks_end_at_the_tests_own_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from outbox import auto_publishing, enqueue_event

        def test_one(collected_events):
            with auto_publishing():
                enqueue_event(1, "a")
                enqueue_event(2, "a")
            collected_events.assert_published("b")

        def test_two(collected_events):
            with auto_publishing():
                enqueue_event(1, "a")
                enqueue_event(2, "a")
            collected_events.assert_published("a").payload

        def test_three(collected_events):
            collected_events.assert_published("a", header={})

        def test_four(embedded_events):
            embedded_events.patience = 0
            embedded_events.assert_published("a")
        """
    )
    result = pytester.runpytest_subprocess("--tb=short", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=4)
    places = [line for line in result.outlines if ": in " in line]
    assert len(places) == 4
    assert all(line.startswith("test_tracebacks_end") for line in places)


@pytest.mark.slow
def test_a_strict_test_fails_for_events_that_no_assertion_has_matched(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest
        from outbox import auto_publishing, enqueue_event

        def publish():
            with auto_publishing():
                enqueue_event(1, "spoken.of")
                enqueue_event(2, "overlooked")

        @pytest.mark.collected_events(strict=True)
        def test_strict(collected_events):
            publish()
            collected_events.assert_published("spoken.of")

        def test_lenient(collected_events):
            publish()

        @pytest.mark.collected_events(strict=True)
        def test_complete(collected_events):
            publish()
            collected_events.assert_published("#", times=2)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*to match an assertion, but 1 did not*", "*'overlooked' 2*"])
    pytester.makeini("[pytest]\noutbox_strict = true\n")
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2)


class TestMixin(CollectedEventsMixin, unittest.TestCase):
    def test_it_collects(self) -> None:
        place(1)
        self.collected_events.assert_published("order.placed", {"id": 1})

    def test_it_starts_empty(self) -> None:
        self.collected_events.assert_nothing_published()


class TestMixinWithSetUpOfItsOwn(CollectedEventsMixin, unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:  # without super()
        place(1)
        self.addCleanup(self.look, 4)

    async def asyncSetUp(self) -> None:
        async with auto_publishing():
            enqueue_event(2, "order.placed")

    async def test_it_collects_from_the_beginning_to_the_end(self) -> None:
        self.look(2)
        async with auto_publishing():
            enqueue_event(3, "order.placed")

    def tearDown(self) -> None:
        place(4)

    def look(self, number: int) -> None:
        self.collected_events.assert_published("order.placed", times=number)


def test_a_test_case_collects_when_it_is_debugged_too() -> None:
    TestMixin("test_it_collects").debug()
    assert seam.observer is None


def test_a_strict_test_case_fails_for_unmatched_events_too() -> None:
    class Strict(CollectedEventsMixin):
        strict_events = True

        def runTest(self) -> None:
            place(1)

    result = unittest.TestResult()
    Strict().run(result)
    [(_, output)] = result.failures
    assert "expected every published event to match an assertion" in output


def test_configure_needs_no_url_where_events_are_recorded(
    collected_events: CollectedEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_URL", raising=False)
    publisher = configure(exchange="shop")
    with auto_publishing():
        assert enqueue_event(1, "x").exchange == "shop"
    assert [event.payload for event in collected_events.published] == [1]
    publisher.close()
