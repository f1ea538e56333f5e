"""The watch over calls with a time limit."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from outbox.consumers.worker.deadlines import Deadlines


@pytest.fixture
def watch() -> Iterator[Deadlines]:
    watch = Deadlines()
    yield watch
    watch.close()


def test_a_call_that_takes_too_long_is_reported_and_has_not_left_in_time(watch: Deadlines) -> None:
    late = threading.Event()
    ticket = watch.enter(0.01, late.set)
    assert late.wait(10)
    assert not watch.leave(ticket)


def test_a_call_that_leaves_in_time_is_never_reported(watch: Deadlines) -> None:
    reported: list[str] = []
    other = threading.Event()
    left = watch.enter(0.05, lambda: reported.append("left"))
    watch.enter(0.1, other.set)
    assert watch.leave(left)
    assert other.wait(10)
    assert reported == []


def test_a_time_limit_shorter_than_earlier_ones_is_honoured(watch: Deadlines) -> None:
    late = threading.Event()
    watch.enter(3600, lambda: None)
    watch.enter(0.01, late.set)
    assert late.wait(10)


def test_a_call_is_watched_after_a_longer_one_has_left(watch: Deadlines) -> None:
    late = threading.Event()
    assert watch.leave(watch.enter(0.02, lambda: None))
    watch.enter(0.05, late.set)
    assert late.wait(10)


def test_calls_that_are_late_together_are_reported_in_order_of_their_deadlines(
    watch: Deadlines,
) -> None:
    reported: list[int] = []
    busy, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def hold_up() -> None:
        busy.set()
        go_on.wait(10)

    def second() -> None:
        reported.append(2)
        done.set()

    watch.enter(0, hold_up)
    assert busy.wait(10)
    watch.enter(0.002, second)
    watch.enter(0.001, lambda: reported.append(1))
    overdue = threading.Timer(0.02, go_on.set)
    overdue.start()
    assert done.wait(10)
    overdue.join()
    assert reported == [1, 2]


def test_a_call_that_keeps_the_watch_from_running_is_late(watch: Deadlines) -> None:
    late = threading.Event()
    asleep = threading.Event()
    watch.enter(0, asleep.set)
    assert asleep.wait(10)
    time.sleep(0.1)  # the watch waits for the next call, without the GIL
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        ticket = watch.enter(0.05, late.set)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
        assert not watch.leave(ticket)
    finally:
        sys.setswitchinterval(interval)
    assert late.wait(10)


@pytest.mark.hazard("G4")
def test_nothing_is_kept_of_a_call_that_left_long_before_its_deadline(watch: Deadlines) -> None:
    class Message:
        def on_late(self) -> None:
            raise AssertionError("it left in time")

    message = Message()
    gone = weakref.ref(message)
    assert watch.leave(watch.enter(3600, message.on_late))
    del message
    gc.collect()
    assert gone() is None


def test_nothing_expires_after_closing(watch: Deadlines) -> None:
    ticket = watch.enter(3600, lambda: None)
    [thread] = [one for one in threading.enumerate() if one.name == "outbox-worker-watch"]
    watch.close()
    thread.join(10)
    assert not thread.is_alive()
    assert watch.leave(ticket)


@pytest.mark.hazard("G4")
def test_a_callback_that_raises_does_not_end_the_watch(
    watch: Deadlines, caplog: pytest.LogCaptureFixture
) -> None:
    reported = threading.Event()

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    watch.enter(0.01, fail)
    watch.enter(0.05, reported.set)
    assert reported.wait(5)
    assert "could not give up a late call" in caplog.text
