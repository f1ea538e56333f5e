"""``configure()`` again, with rotated credentials say, while others publish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from outbox import (
    CollectorFull,
    Event,
    Publisher,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from proving.proxy import FaultProxy
from tests.amqp import Inspector


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.slow
def test_configure_under_load_loses_nothing_and_fails_nobody(
    amqp_url: str, inspector: Inspector, name: str, keep: bool
) -> None:
    queue = inspector.queue(name, name)
    until = time.monotonic() + 4
    done: list[str] = []
    errors: list[BaseException] = []
    publisher = configure(amqp_url, exchange=name)

    def work(thread: int) -> None:
        number = 0
        while time.monotonic() < until:
            event_id = f"{thread}-{number}"
            number += 1
            try:
                if keep:
                    with auto_publishing():
                        enqueue_event(0, "x", id=event_id)
                else:  # through the first publisher, as a middleware or a relay would
                    event = Event(id=event_id, target="x", exchange=name, body=b"0")
                    publisher.publish([event], keep=False).raise_for_failure()
            except BaseException as error:
                errors.append(error)
            else:
                done.append(event_id)
            time.sleep(0.005)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    replaced = 0
    while time.monotonic() < until:
        time.sleep(0.3)
        configure(amqp_url, exchange=name)
        replaced += 1
    for thread in threads:
        thread.join()
    assert replaced > 5
    assert errors == []
    arrived = [message.id for message in inspector.all(queue)]
    assert set(done) == set(arrived)
    assert len(arrived) == len(done)
    with contextlib.suppress(UsageError):
        publisher.close()
    publishing = [each for each in threading.enumerate() if each.name == "outbox-publisher"]
    assert len(publishing) <= 2


def test_who_waits_for_confirms_goes_on_waiting_and_the_order_is_kept(
    proxy: FaultProxy, amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    first = configure(proxy.url, exchange=name, timeout=20)
    first.publish([Event(id="0", target="x", exchange=name, body=b"0")])
    proxy.black_hole()
    waiting = threading.Thread(
        target=lambda: reports.append(
            first.publish([Event(id="1", target="x", exchange=name, body=b"0")])
        )
    )
    reports: list[object] = []
    waiting.start()
    time.sleep(0.2)
    configure(amqp_url, exchange=name)
    waiting.join(5)
    assert [str(report) for report in reports] == ["1 published"]
    with auto_publishing():
        enqueue_event(0, "x", id="2")
    assert [message.id for message in inspector.all(queue)] == ["0", "1", "2"]


def test_kept_events_move_before_later_ones_of_any_caller(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    first = configure("amqp://127.0.0.1:1/", exchange=name, timeout=0.2)
    events = [Event(id=str(n), target="x", exchange=name, body=b"0") for n in range(50)]
    for event in events[:30]:
        first.submit([event])
    configure(amqp_url, exchange=name)
    for event in events[30:]:
        first.submit([event])
    assert first.drain(10)
    assert [message.id for message in inspector.all(queue)] == [event.id for event in events]


@pytest.mark.parametrize("scheme", ["sqlite", "memory"])
def test_events_move_to_another_kind_of_transport(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path, scheme: str
) -> None:
    url = f"sqlite:///{tmp_path}/outbox.db" if scheme == "sqlite" else "memory://"
    configure("amqp://127.0.0.1:1/", exchange=name, timeout=0.2, unroutable="ignore")
    with auto_publishing() as block:
        enqueue_event(0, "x")
    assert block.report is not None
    assert block.report.kept
    second = configure(url, exchange=name, unroutable="ignore")
    assert second.drain(10)
    assert second.kept == ()
    third = configure(amqp_url, exchange=name)
    queue = inspector.queue(name, name)
    with auto_publishing():
        enqueue_event(0, "x", id="last")
    assert [message.id for message in inspector.all(queue)] == ["last"]
    assert third.kept == ()


def test_configure_on_an_event_loop_under_load(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    configure(amqp_url, exchange=name)
    done: list[str] = []

    async def work(task: int) -> None:
        for number in range(60):
            async with auto_publishing():
                enqueue_event(0, "x", id=f"{task}-{number}")
            done.append(f"{task}-{number}")

    async def main() -> None:
        tasks = [asyncio.create_task(work(number)) for number in range(8)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.05)
            configure(amqp_url, exchange=name)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert sorted(message.id for message in inspector.all(queue)) == sorted(done)


def test_a_wrong_second_configure_changes_nothing(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    configure(amqp_url, exchange=name)
    with pytest.raises(UsageError):
        configure("amqp://", exchange=name)
    with auto_publishing():
        enqueue_event(0, "x", id="one")
    assert inspector.get(queue).id == "one"


def test_a_closed_publisher_stays_closed(amqp_url: str, name: str) -> None:
    first = configure(amqp_url, exchange=name)
    first.close()
    second = configure(amqp_url, exchange=name)
    with pytest.raises(UsageError, match="closed"):
        first.submit([Event(id="x", target="x", exchange=name, body=b"0")])
    assert isinstance(second, Publisher)


def test_a_full_publisher_can_be_replaced(amqp_url: str, inspector: Inspector, name: str) -> None:
    queue = inspector.queue(name, name)
    first = configure("amqp://127.0.0.1:1/", exchange=name, timeout=0.2, max_kept=5)
    with pytest.raises(CollectorFull):
        for _ in range(10):
            with auto_publishing():
                enqueue_event(0, "x")
    kept = first.kept
    assert len(kept) == 5
    second = configure(amqp_url, exchange=name, max_kept=2)
    assert second.drain(10)
    assert [message.id for message in inspector.all(queue)] == [event.id for event in kept]


def test_a_replaced_publisher_is_replaced_in_a_forked_child_too(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    first = configure("amqp://127.0.0.1:1/", exchange=name)
    configure("amqp://127.0.0.1:2/", exchange=name)
    last = configure(amqp_url, exchange=name)
    child = os.fork()
    if not child:
        code = 1
        try:
            event = Event(id="x", target="x", exchange=name, body=b"0")
            code = 0 if first.publish([event]).ok and first.drain(1) and last.drain(1) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [message.id for message in inspector.all(queue)] == ["x"]


def test_drain_follows_events_that_move_meanwhile(name: str) -> None:
    first = configure("amqp://127.0.0.1:1/", exchange=name, timeout=0.2, drain_timeout=0)
    first.submit([Event(id="x", target="x", exchange=name, body=b"0")]).result(10)
    drained: list[bool] = []
    draining = threading.Thread(target=lambda: drained.append(first.drain(1.5)))
    draining.start()
    time.sleep(0.3)
    second = configure("amqp://127.0.0.1:2/", exchange=name, timeout=0.2, drain_timeout=0)
    draining.join()
    assert drained == [False]
    assert [event.id for event in second.kept] == ["x"]


def test_the_caller_does_not_wait_for_the_end_of_a_silent_connection(
    proxy: FaultProxy, amqp_url: str, name: str
) -> None:
    configure(proxy.url, exchange=name)
    with auto_publishing():
        enqueue_event(0, "x", unroutable="ignore")
    proxy.black_hole()
    began = time.monotonic()
    configure(amqp_url, exchange=name)
    assert time.monotonic() - began < 1


class TimeLimit(BaseException):
    """What a signal handler raises."""


@pytest.mark.slow
def test_an_interrupted_configure_leaves_a_publisher_that_works(
    proxy: FaultProxy, amqp_url: str, inspector: Inspector, name: str
) -> None:
    def interrupt(*_: object) -> None:
        raise TimeLimit

    queue = inspector.queue(name, name)
    first = configure(proxy.url, exchange=name, timeout=0.2)
    first.publish([Event(id="0", target="x", exchange=name, body=b"0")])
    proxy.black_hole()
    first.publish([Event(id="1", target="x", exchange=name, body=b"0")])  # unconfirmed
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeLimit):
            configure(amqp_url, exchange=name)
    finally:
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    assert first.drain(10)
    gc.collect()
    with auto_publishing():
        enqueue_event(0, "x", id="2")
    assert first.drain(10)
    assert [message.id for message in inspector.all(queue)] == ["0", "1", "2"]


def test_the_thread_of_a_replaced_publisher_ends_while_the_program_still_refers_to_it(
    tmp_path: Path, name: str
) -> None:
    first = configure(f"sqlite:///{tmp_path}/first.db", exchange=name, unroutable="ignore")
    with auto_publishing():
        enqueue_event(0, "x")
    [thread] = [each for each in threading.enumerate() if each.name == "outbox-publisher"]
    configure(f"sqlite:///{tmp_path}/second.db", exchange=name)
    thread.join(5)
    assert not thread.is_alive()
    assert first.kept == ()


@pytest.mark.slow
def test_events_follow_publishers_that_are_replaced_before_they_start(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    first = configure("amqp://127.0.0.1:1/", exchange=name, timeout=0.2)
    kept = [Event(id=str(n), target="x", exchange=name, body=b"0") for n in range(20)]
    first.publish(kept)
    for _ in range(1500):  # far more than Python's recursion limit
        configure("amqp://127.0.0.1:1/", exchange=name)
        first.submit([])
    last = configure(amqp_url, exchange=name)
    assert last.drain(10)
    assert first.drain(10)
    assert [message.id for message in inspector.all(queue)] == [event.id for event in kept]
