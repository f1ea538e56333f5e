"""Live tests of an application: the test's own broker, real publishers, real workers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from outbox import (
    InvalidEvent,
    Publisher,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.consumers import Consumer, Requeue, RetryPolicy, Worker, consumer
from outbox.testing import LiveEvents, live, recorded
from outbox.testing.broker import PrivateBroker
from tests.invoicing import Invoices, Mails


def place(number: int = 1, target: str = "order.placed", **options: Any) -> None:
    with auto_publishing():
        enqueue_event({"id": number}, target, **options)


@pytest.fixture(params=["live_events", "embedded_events"])
def events(request: pytest.FixtureRequest) -> LiveEvents:
    """Both ways, one after the other."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, LiveEvents)
    found.patience = 20.0  # on a busy machine
    return found


def test_assertions_see_the_events_that_arrived(events: LiveEvents) -> None:
    events.assert_nothing_published()
    with auto_publishing():
        enqueue_event({"id": 1}, "order.placed", key="k", headers={"tenant": "acme"}, priority=2)
        events.assert_pending("order.placed")
        enqueue_event({"id": 2}, "order.paid")
    with pytest.raises(KeyError), auto_publishing():
        enqueue_event({"id": 3}, "order.lost")
        raise KeyError
    event = events.assert_published(
        "order.placed", {"id": 1}, headers={"tenant": "acme"}, key="k", priority=2, delay=None
    )
    assert event.occurred_at <= datetime.datetime.now(datetime.UTC)
    events.assert_published_in_order("order.placed", "order.paid")
    events.assert_cleared("order.lost")
    events.assert_nothing_else_published()
    assert repr(events) == "<LiveEvents 2 published, 1 cleared>"


def test_consumers_process_until_quiet_events_published_before_and_after(
    events: LiveEvents,
) -> None:
    place(1, key="k", headers={"tenant": "acme"})
    first = events.deliver_all(Invoices)
    assert [(one.event.target, one.event.key, one.acked) for one in first] == [
        ("order.placed", "k", True)
    ]
    assert first[0].event.headers == {"tenant": "acme"}
    assert [event.target for event in first[0].follow_ons] == ["invoice.sent"]
    assert events.deliver_all(Invoices) == []
    place(2)
    rest = events.deliver_all(Invoices, Mails)
    assert [one.consumer.queue for one in rest].count("mails") == 2
    events.assert_published("mail.sent", times=2)
    events.assert_published("invoice.sent", times=2)
    assert events.deliver(Invoices, Mails) == []


def test_a_handlers_error_is_raised_and_its_message_is_a_dead_letter(events: LiveEvents) -> None:
    place(13)
    with pytest.raises(ValueError, match="thirteen"):
        events.deliver_all(Invoices)
    letter = events.assert_published("invoices.dead", {"id": 13}, exchange="")
    assert letter.headers["outbox-dead-reason"] == "ValueError: thirteen"
    assert letter.headers["outbox-dead-target"] == "order.placed"
    place(14)
    [found] = events.deliver_all(Invoices, raise_errors=False)
    assert found.dead
    assert found.follow_ons == ()


def test_a_message_that_is_given_back_is_delivered_again(events: LiveEvents) -> None:
    times = 0

    class Later(Consumer):
        queue = "later"

        def process(self, event: Any) -> None:
            nonlocal times
            times += 1
            if times == 1:
                raise Requeue

    place(1, "later")
    assert [one.acked for one in events.deliver_all(Later)] == [False, True]


@pytest.mark.parametrize("delay", [0, 0.1])
def test_a_retry_is_awaited_and_counts_as_the_same_message(
    events: LiveEvents, delay: float
) -> None:
    class Flaky(Consumer):
        queue = "order.placed"  # named like the event, as in the README
        retry = RetryPolicy(max_attempts=2, delay=delay)

        def process(self, event: Any) -> None:
            if event.attempt < event.payload["id"]:
                raise OSError(f"printer, {event.attempt}")

    place(2)
    done = events.deliver_all(Flaky)
    assert [(one.retried, one.acked) for one in done] == [(True, False), (False, True)]
    events.assert_published("order.placed", times=1)
    place(9)
    with pytest.raises(OSError, match="printer, 2"):
        events.deliver_all(Flaky)
    events.assert_published("order.placed", times=2)
    events.assert_nothing_else_published()
    assert [letter.target for letter in events.dead_letters] == ["order.placed.dead"]
    assert repr(events) == "<LiveEvents 2 published, 1 dead-lettered>"


def test_a_retry_that_comes_too_late_is_named(events: LiveEvents) -> None:
    @consumer("flaky", retry=RetryPolicy(delay=60))
    def flaky(event: Any) -> None:
        raise OSError("printer")

    with pytest.raises(AssertionError, match=r"OSError\('printer'\) and is retried 60 s later"):
        events.perform(flaky, timeout=0.5)


def test_delivering_nothing_is_an_error_after_some_patience(events: LiveEvents) -> None:
    assert events.deliver_all(Invoices, Mails, allow_none=True) == []
    events.patience = 0.2
    place(1, "order_placed")
    with pytest.raises(AssertionError, match=r"'mails' takes .*\n.*\n.*'order_placed' to"):
        events.deliver_all(Invoices, Mails)
    events.patience = 20
    late = threading.Timer(0.2, place)
    late.start()
    assert [one.consumer.queue for one in events.deliver_all(Invoices, Mails)] == [
        "invoices",
        "mails",
    ]
    assert events.deliver_all(Invoices, Mails) == []
    late.join()


def test_deduplication_needs_no_database_of_the_applications(
    events: LiveEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_DATABASE_URL", raising=False)
    configure("amqp://127.0.0.1:1/")

    class Once(Mails):
        queue = "once"
        deduplicate = True

    place(1, "invoice.sent", id="twice")
    assert [one.duplicate for one in events.deliver_all(Once)] == [False]
    place(1, "invoice.sent", id="twice")
    assert [one.duplicate for one in events.deliver_all(Once)] == [True]


@pytest.mark.asyncio
async def test_a_worker_does_not_block_the_tests_event_loop(events: LiveEvents) -> None:
    @consumer("a", topics=["order.*"])
    async def asynchronous(event: Any) -> None:
        await asyncio.sleep(0)

    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async with auto_publishing():
        enqueue_event({"id": 1}, "order.placed")
    ticking = asyncio.create_task(tick())
    [done] = await events.deliver_all_async(asynchronous, allow_none=True)
    assert done.acked
    assert (await events.perform_async(asynchronous, {"id": 2}, timeout=20)).acked
    assert await events.deliver_async(asynchronous) == []
    assert ticks > 2
    ticking.cancel()


def test_an_endless_loop_of_events_is_reported(events: LiveEvents) -> None:
    class Echo(Consumer):
        queue = "echo"
        auto_publish = True

        def process(self, event: Any) -> None:
            enqueue_event(event.payload, "echo")

    place(1, "echo")
    with pytest.raises(AssertionError, match=r"left after 0\.5 s: 'echo' has settled"):
        events.deliver_all(Echo, timeout=0.5)


def test_a_single_consumer_performs_a_single_message(events: LiveEvents) -> None:
    done = events.perform(Invoices, {"id": 5}, target="order.placed")
    assert done.acked
    assert done.event.target == "order.placed"
    again = events.perform(Invoices, {"id": 5}, target="order.placed", id=done.event.id)
    assert again.follow_ons[0].id == done.follow_ons[0].id
    with pytest.raises(ValueError, match="thirteen"):
        events.perform(Invoices, {"id": 13})


def test_no_publisher_reaches_the_broker_that_its_url_names(events: LiveEvents) -> None:
    configure("amqp://127.0.0.1:1/", exchange="mine")
    place(1)
    explicit = Publisher("amqp://127.0.0.1:2/", exchange="theirs")
    with auto_publishing(publisher=explicit):
        enqueue_event(2, "explicit")
    explicit.close()
    assert events.assert_published("order.placed").exchange == "mine"
    assert events.assert_published("explicit").exchange == "theirs"


def test_the_applications_own_worker_consumes_from_the_tests_broker(
    events: LiveEvents,
) -> None:
    configure("amqp://127.0.0.1:1/")
    assert events.deliver_all(Mails, allow_none=True) == []  # from now on there is a queue
    worker = Worker([Mails])
    worker.start()
    try:
        place(1, "invoice.sent")
        events.assert_published("mail.sent", {"id": 1})
    finally:
        worker.stop()


def test_an_assertion_waits_for_what_a_thread_publishes(events: LiveEvents) -> None:
    looking = threading.Event()

    def work() -> None:
        looking.wait(5)
        place(1, "late")

    thread = threading.Thread(target=work)
    thread.start()
    timer = threading.Timer(0.2, looking.set)
    timer.start()
    events.assert_published("late")
    thread.join()
    timer.join()


def test_another_process_publishes_to_the_tests_broker(events: LiveEvents) -> None:
    program = "from outbox import *\nwith auto_publishing():\n    enqueue_event(1, 'elsewhere')"
    subprocess.run([sys.executable, "-c", program], env=events.environ, check=True, timeout=30)
    events.assert_published("elsewhere", 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_publishes_to_the_tests_broker(events: LiveEvents) -> None:
    place(1, "parent")
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            place(2, "child")
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    events.assert_published("child", {"id": 2})
    place(3, "parent")
    events.assert_published("parent", times=2)


def test_a_stored_event_is_published_after_its_commit(events: LiveEvents, tmp_path: Any) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    import outbox.sql

    engine = create_engine(f"sqlite:///{tmp_path / 'application.db'}")
    outbox.sql.metadata.create_all(engine)
    with Session(engine) as session:
        enqueue_event(1, "dropped", session=session)
        session.rollback()
        events.assert_cleared("dropped")
        enqueue_event(2, "committed", session=session)
        events.assert_stored("committed")
        events.assert_nothing_published()
        session.commit()
    events.assert_published("committed", 2)
    assert events.stored == ()
    engine.dispose()


def test_a_delayed_event_is_published_but_does_not_arrive_yet(events: LiveEvents) -> None:
    place(1, delay=3600)
    events.assert_published("order.placed", delay=3600)
    events.patience = 0.1
    with pytest.raises(AssertionError, match=r"'order\.placed' .* due at 20"):
        events.deliver_all(Invoices)
    assert events.deliver_all(Invoices, allow_none=True) == []


def test_a_delay_that_is_too_long_is_refused_as_rabbitmq_would(live_events: LiveEvents) -> None:
    with pytest.raises(InvalidEvent, match="its transport delays events by"):
        place(1, delay=datetime.timedelta(days=4000))


def test_a_failed_assertion_shows_what_arrived(events: LiveEvents) -> None:
    events.patience = 0
    place(1)
    with pytest.raises(AssertionError) as caught:
        events.assert_published("order.placed", {"id": 2})
    assert "expected at least 1 published event to 'order.placed'" in str(caught.value)
    assert '+     "id": 1' in str(caught.value)


def test_recording_in_a_live_test_is_refused_naming_both_places(events: LiveEvents) -> None:
    with pytest.raises(
        UsageError, match=r"by the fixture \w+_events of .*both_places.*: me cannot"
    ):
        with recorded("me"):
            pass


@pytest.mark.slow
def test_virtual_hosts_are_empty_and_never_the_same(outbox_broker: PrivateBroker) -> None:
    found = [outbox_broker.empty_url() for _ in range(17)]
    assert len(set(found)) == 17
    for url in found:
        outbox_broker.give_back(url)


@pytest.mark.slow
def test_a_test_sees_nothing_of_the_one_before(
    outbox_broker: PrivateBroker, caplog: pytest.LogCaptureFixture
) -> None:
    left = auto_publishing()
    with live(outbox_broker.empty_url(), "the first") as first:
        place(13)
        first.deliver_all(Invoices, raise_errors=False)
        place(1)
        place(2, "nobody", exchange="")
        assert len(first.parked) == 1
        left.__enter__()
        enqueue_event(3, "left")
    with live(outbox_broker.empty_url(), "the second") as second:
        left.__exit__(None, None, None)
        assert second.deliver_all(Invoices, allow_none=True) == []
        assert repr(second) == "<LiveEvents none>"
    assert "their unit of work began in a test that is over, the first" in caplog.text


def test_live_tests_share_the_broker_of_the_session(
    live_events: LiveEvents, outbox_broker: PrivateBroker
) -> None:
    assert live_events.url.startswith(outbox_broker.url)
    assert live_events.url != outbox_broker.url
    assert live_events.environ["OUTBOX_URL"] == live_events.url


ON_A_SERVER = """
import os
import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool
from sqlalchemy import create_engine, inspect, make_url

from outbox import auto_publishing, enqueue_event
from outbox.consumers import consumer
from outbox.url import BrokerURL

@consumer("invoices", topics=["order.*"], deduplicate=True)
def invoices(event):
    enqueue_event({}, "invoice.sent")

invoices.auto_publish = True

def arrives(events, scheme):
    events.assert_nothing_published()
    with auto_publishing():
        enqueue_event({}, "order.placed")
    events.deliver_all(invoices)
    events.assert_published("invoice.sent", times=1)
    assert BrokerURL.parse(events.url).scheme == scheme

def test_on_the_server_of_the_environment(embedded_events):
    arrives(embedded_events, "postgresql")

@pytest.mark.embedded_events(url=os.environ["OTHER"])
def test_on_the_server_of_the_marker(embedded_events):
    arrives(embedded_events, "mariadb")

@pytest.mark.embedded_events(url="postgresql://127.0.0.1:9/nowhere")
def test_on_no_server(embedded_events):
    pass
"""


@pytest.mark.one_python
@pytest.mark.slow
def test_the_fixture_has_a_place_on_a_server_for_each_test(
    postgresql_url: str,
    mariadb_url: str,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = names_on(postgresql_url), names_on(mariadb_url)
    pytester.makepyfile(ON_A_SERVER)
    monkeypatch.setenv("OUTBOX_TEST_DATABASE_URL", postgresql_url)
    monkeypatch.setenv("OTHER", mariadb_url)
    result = pytester.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*embedded_events: postgresql://127.0.0.1:9/nowhere: *refused*"])
    assert (names_on(postgresql_url), names_on(mariadb_url)) == before


def names_on(url: str) -> set[str]:
    """Return the schemas, or databases, on a server."""
    engine = create_engine(url, poolclass=NullPool)
    return set(inspect(engine).get_schema_names())
