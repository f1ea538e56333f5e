"""The testing kit: matching, states, deliberate failures, consumers, simulated transactions."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import re
import unittest
import unittest.mock
import uuid
from pathlib import Path
from typing import Any

import pytest

from outbox import (
    Event,
    Publisher,
    PublishFailed,
    PublishTimeout,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.consumers import ACK, Consumer, Requeue, Worker
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
    assert collected_events.commit()[0].target == "kept"
    collected_events.assert_published("kept")
    engine.dispose()


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
