"""The broker goes away, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from outbox import (
    CollectorFull,
    ConnectFailed,
    Event,
    EventCollector,
    Publisher,
    PublishTimeout,
    auto_publishing,
    clear_events,
    configure,
    enqueue_event,
    publish,
)
from outbox.consumers import ReceivedEvent
from outbox.testing.broker import PrivateBroker
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.integration.test_worker import running, send
from tests.waiting import wait_until

# A quorum queue that is a second old when its only node is killed may not come back with it
# (RabbitMQ 3.10.8: its name is not on disk yet).
CLASSIC = {"x-queue-type": "classic"}


def lasting_queue(broker: PrivateBroker, inspector: Inspector, name: str) -> str:
    """Declare a queue that outlives a kill: RabbitMQ writes it, and its binding, a little later."""
    queue = inspector.queue(name, name, arguments=CLASSIC)
    broker.ctl("eval", "mnesia:sync_log().")
    return queue


@pytest.mark.one_python
def test_every_event_arrives_when_the_broker_is_killed_in_the_middle_of_200_flushes(
    private_broker: PrivateBroker, name: str
) -> None:
    inspector = Inspector(private_broker.url)
    queue = lasting_queue(private_broker, inspector, name)
    committed: list[str] = []
    rolled_back: list[str] = []
    with Publisher(private_broker.url, exchange=name, timeout=2, drain_timeout=30) as publisher:
        for number in range(200):
            if number == 100:
                restart = threading.Thread(target=private_broker.restart)
                restart.start()
            with auto_publishing(publisher=publisher):
                committed += [enqueue_event([number, part], "ok").id for part in range(3)]
            with pytest.raises(KeyError), auto_publishing(publisher=publisher):
                rolled_back.append(enqueue_event([number], "rolled.back").id)
                raise KeyError
            time.sleep(0.005)
        restart.join()
        assert publisher.drain(30)
    arrived = [message.id for message in inspector.messages(queue, 600)]
    arrived += [message.id for message in inspector.all(queue)]
    assert set(arrived) == set(committed)
    assert not set(arrived) & set(rolled_back)
    first_times = list(dict.fromkeys(arrived))
    assert first_times == committed  # in order, second deliveries aside
    inspector.close()


@pytest.mark.one_python
@pytest.mark.slow
def test_a_rollback_does_not_touch_events_kept_from_an_earlier_publish(
    private_broker: PrivateBroker, name: str
) -> None:
    inspector = Inspector(private_broker.url)
    queue = lasting_queue(private_broker, inspector, name)
    private_broker.kill()
    configure(private_broker.url, exchange=name)
    with auto_publishing() as block:
        kept = enqueue_event({"n": 1}, "kept")
    assert block.report is not None
    assert block.report.kept == (kept,)
    assert isinstance(block.report.error, ConnectFailed)
    with pytest.raises(KeyError), auto_publishing():
        enqueue_event({"n": 2}, "rolled.back")
        raise KeyError
    with EventCollector.use(EventCollector()):
        enqueue_event({"n": 3}, "rolled.back")
        clear_events()
        newer = enqueue_event({"n": 4}, "newer")
        publish()
    private_broker.start()
    assert [message.id for message in inspector.messages(queue, 2)] == [kept.id, newer.id]
    assert inspector.all(queue) == []
    inspector.close()


@pytest.mark.hazard("A5", "B4")
@pytest.mark.slow
def test_while_the_broker_is_away_only_the_first_flush_takes_time(
    private_broker: PrivateBroker, name: str
) -> None:
    private_broker.kill()
    with Publisher(private_broker.url, exchange=name, drain_timeout=0.1) as publisher:
        times = []
        for _ in range(21):
            with auto_publishing(publisher=publisher) as block:
                enqueue_event({}, "x")
                begin = time.perf_counter()
            times.append(time.perf_counter() - begin)
            assert block.report is not None
            assert len(block.report.kept) == 1
        assert sorted(times[1:])[10] < 0.005, times
        assert len(publisher.kept) == 21
        assert not publisher.connected


@pytest.mark.hazard("A5")
@pytest.mark.one_python
def test_a_frozen_broker_costs_one_caller_its_timeout_and_nothing_is_sent_twice(
    private_broker: PrivateBroker, name: str
) -> None:
    inspector = Inspector(private_broker.url)
    queue = inspector.queue(name, name, arguments=CLASSIC)
    with Publisher(private_broker.url, exchange=name, timeout=0.5, heartbeat=60) as publisher:
        collector = EventCollector(publisher=publisher)
        events = [collector.enqueue_event({"n": n}, "x") for n in range(4)]
        assert publisher.publish(events[:1]).ok
        private_broker.pause()
        try:
            begin = time.monotonic()
            report = publisher.publish(events[1:2])
            assert 0.4 < time.monotonic() - begin < 2
            assert report.kept == (events[1],)
            assert isinstance(report.error, PublishTimeout)
            begin = time.monotonic()
            assert publisher.publish(events[2:3]).kept == (events[2],)
            assert time.monotonic() - begin < 0.1  # others do not wait
            assert publisher.kept == tuple(events[1:3])
        finally:
            private_broker.resume()
        assert publisher.drain(10)
        assert publisher.publish(events[3:]).ok  # and waiting is worth while again
    assert [m.id for m in inspector.messages(queue, 4)] == [event.id for event in events]
    assert inspector.all(queue) == []
    inspector.close()


@pytest.mark.one_python
@pytest.mark.slow
def test_a_connection_without_a_confirm_for_the_stall_timeout_is_closed(
    private_broker: PrivateBroker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    inspector = Inspector(private_broker.url)
    queue = inspector.queue(name, name, arguments=CLASSIC)
    with Publisher(
        private_broker.url, exchange=name, timeout=0.2, stall_timeout=1, connect_timeout=1
    ) as publisher:
        collector = EventCollector(publisher=publisher)
        events = [collector.enqueue_event({"n": n}, "x") for n in range(2)]
        assert publisher.publish(events[:1]).ok
        private_broker.pause()
        try:
            assert publisher.publish(events[1:]).kept
            deadline = time.monotonic() + 10
            while "has confirmed nothing for" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert not publisher.connected
        finally:
            private_broker.resume()
        assert publisher.drain(20)
    assert {m.id for m in inspector.messages(queue, 2)} == {event.id for event in events}
    inspector.close()


def test_awaiting_callers_time_out_and_their_loop_stays_free(
    private_broker: PrivateBroker, name: str
) -> None:
    with Publisher(
        private_broker.url, exchange=name, timeout=0.5, drain_timeout=0.1, unroutable="ignore"
    ) as publisher:
        event = EventCollector(publisher=publisher).enqueue_event({}, "x")
        assert publisher.publish([event]).ok

        async def main() -> int:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0.01)
                    turns += 1

            counting = asyncio.create_task(count())
            report = await publisher.publish_async([event])
            assert report.kept == (event,)
            counting.cancel()
            return turns

        private_broker.pause()
        try:
            assert asyncio.run(main()) > 20
        finally:
            private_broker.resume()
        publisher.drain(10)


@pytest.mark.slow
def test_kept_events_are_drained_at_process_exit(private_broker: PrivateBroker, name: str) -> None:
    inspector = Inspector(private_broker.url)
    queue = lasting_queue(private_broker, inspector, name)
    private_broker.kill()
    script = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, private_broker.url, name, "30"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    event_id = script.stdout.readline().strip()
    private_broker.start()
    assert script.wait(30) == 0
    script.stdout.close()
    assert inspector.get(queue).id == event_id
    inspector.close()


def test_events_that_cannot_be_drained_at_exit_are_named_in_the_log(
    private_broker: PrivateBroker, name: str
) -> None:
    private_broker.kill()
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, private_broker.url, name, "0.5"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert time.monotonic() - begin < 10
    assert f"1 event(s) lost, never confirmed: '{done.stdout.strip()}'" in done.stderr


_SCRIPT = """
import sys
from outbox import auto_publishing, configure, enqueue_event
configure(sys.argv[1], exchange=sys.argv[2], drain_timeout=float(sys.argv[3]))
with auto_publishing() as block:
    print(enqueue_event({}, "x").id, flush=True)
assert block.report.kept
"""


@pytest.mark.hazard("A5")
def test_at_max_kept_new_work_is_refused_before_it_commits(
    private_broker: PrivateBroker, name: str
) -> None:

    private_broker.kill()
    with Publisher(private_broker.url, exchange=name, max_kept=10, drain_timeout=0.1) as publisher:
        for _ in range(10):
            with auto_publishing(publisher=publisher):
                enqueue_event({}, "x")
        with (
            auto_publishing(publisher=publisher) as block,
            pytest.raises(CollectorFull, match="max_kept=10"),
        ):
            enqueue_event({}, "x")
        assert block.events == ()
        # A chunk that was collected before is kept all the same: its work has committed.
        late = Event(id="late", target="x", exchange=name, body=b"{}")
        assert publisher.publish([late]).kept == (late,)
        assert len(publisher.kept) == 11


@pytest.mark.slow
def test_reconnects_and_kept_events_are_counted_and_reported(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    calls: list[str] = []
    with (
        FaultProxy(amqp_url) as proxy,
        Publisher(
            proxy.url,
            exchange=name,
            on_connected=lambda address: calls.append(f"connected to {address}"),
            on_disconnected=lambda error: calls.append(type(error).__name__),
        ) as publisher,
    ):
        queue = inspector.queue(name, name)
        collector = EventCollector(publisher=publisher)
        collector.enqueue_event({"n": 1}, "x")
        assert collector.publish().ok
        proxy.refuse()
        collector.enqueue_event({"n": 2}, "x")
        assert len(collector.publish().kept) == 1
        assert publisher.stats().kept == 1
        proxy.heal()
        assert publisher.drain(10)
        stats = publisher.stats()
        assert len(inspector.messages(queue, 2)) == 2
    address = f"127.0.0.1:{proxy.port}"
    assert calls == [f"connected to {address}", "ConnectionLost", f"connected to {address}"]
    assert (stats.published, stats.kept, stats.ever_kept, stats.reconnects) == (2, 0, 1, 1)
    assert stats.connected


@pytest.mark.hazard("C5")
@pytest.mark.one_python
@pytest.mark.slow
def test_under_a_real_memory_alarm_publishers_keep_events_and_workers_go_on_acking(
    private_broker: PrivateBroker, name: str
) -> None:
    inspector = Inspector(private_broker.url)
    follow_ons = inspector.queue(f"{name}-next", name, ("next",), arguments=CLASSIC)
    other = inspector.queue(f"{name}-other", name, ("other",), arguments=CLASSIC)

    def process(event: ReceivedEvent) -> None:
        begun.release()
        alarmed.wait(30)
        if event.payload == "publishes":
            enqueue_event({}, "next")
            publish()

    begun, alarmed = threading.Semaphore(0), threading.Event()
    with Publisher(private_broker.url, exchange=name, timeout=1) as publisher:
        with running(publisher, inspector, process, name, threads=4) as worker:
            send(publisher, name, "publishes", 1, 2, 3)
            for _ in range(4):
                assert begun.acquire(timeout=10)
            private_broker.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
            try:
                event = Event(id="kept", target="other", exchange=name, body=b"{}")
                publisher.publish([event])  # the broker reports the alarm after the first publish
                wait_until(lambda: not publisher.connected)
                assert publisher.kept == (event,)
                alarmed.set()
                acks = worker._subscription._consumers[name].acks  # type: ignore[attr-defined]
                wait_until(lambda: len(acks._settled) + acks._lowest - 1 == 3)
            finally:
                private_broker.ctl("set_vm_memory_high_watermark", "0.4")
            assert publisher.drain(10)
            assert inspector.get(follow_ons).payload == {}
            assert inspector.get(other).id == "kept"
            assert worker.stop(10)
    assert inspector.all(name) == []
    inspector.close()


@pytest.mark.parametrize("how", ["never connected", "silent since it connected"])
@pytest.mark.slow
def test_what_is_submitted_to_a_silent_broker_is_bounded_like_what_is_kept(
    private_broker: PrivateBroker, name: str, how: str
) -> None:
    with (
        contextlib.closing(Inspector(private_broker.url)) as inspector,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        inspector.queue(name, name)
        url = private_broker.url
        if how == "never connected":
            url = f"amqp://127.0.0.1:{silent.getsockname()[1]}"
        with Publisher(url, exchange=name, max_kept=500, drain_timeout=0) as publisher:
            collector = EventCollector(publisher=publisher)
            if how != "never connected":
                collector.enqueue_event({}, "x")
                assert collector.publish().ok
            private_broker.pause()
            submitted = 0
            try:
                with pytest.raises(CollectorFull, match="max_kept=500"):
                    while submitted < 100_000:
                        collector.enqueue_event({}, "x")
                        collector.submit()
                        submitted += 1
                        time.sleep(0.001)
            finally:
                private_broker.resume()
            assert 500 <= submitted <= (500 if how == "never connected" else 2_000)


def test_a_short_timeout_of_one_caller_does_not_end_the_waiting_of_others(
    proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with Publisher(proxy.url, exchange=name) as publisher:
        collector = EventCollector(publisher=publisher)
        assert publisher.publish([collector.enqueue_event({}, "x")]).ok
        proxy.delay = 0.15
        for _ in range(3):
            hurried = publisher.publish([collector.enqueue_event({}, "x")], timeout=0.01)
            assert len(hurried.kept) == 1
            assert publisher.publish([collector.enqueue_event({}, "x")]).ok


def test_hooks_are_called_on_the_publishers_thread_alone(name: str) -> None:
    threads: set[str] = set()

    def note(_: object) -> None:
        threads.add(threading.current_thread().name)

    with Publisher("amqp://127.0.0.1:1", exchange=name, timeout=0.1, on_kept=note) as publisher:
        event = Event(id="x", target="x", exchange=name, body=b"0")
        publisher.publish([event])
        asyncio.run(publisher.publish_async([event]))
        publisher.submit([event]).result()
        publisher.drain(0.2)
        wait_until(lambda: threads)
        publisher.close(0)
    assert threads == {"outbox-publisher"}
