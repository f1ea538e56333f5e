"""The watch over calls that have a time limit."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from outbox.consumers.watch import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    found = Watch()
    yield found
    found.close()


def test_a_call_is_told_when_its_time_is_over_and_has_then_not_left_in_time(watch: Watch) -> None:
    told = threading.Event()
    ticket = watch.enter(0.01, told.set)
    assert told.wait(5)
    assert not watch.leave(ticket)


def test_the_shorter_limit_is_told_first_whenever_it_began(watch: Watch) -> None:
    told: list[str] = []
    both = threading.Barrier(2)

    def last() -> None:
        told.append("long")
        both.wait(5)

    watch.enter(0.2, last)
    watch.enter(0.01, lambda: told.append("short"))
    both.wait(5)
    assert told == ["short", "long"]


def test_calls_that_have_left_take_no_memory_until_their_time_would_be_over(watch: Watch) -> None:
    running = [watch.enter(3600, lambda: None) for _ in range(8)]
    for _ in range(100_000):
        assert watch.leave(watch.enter(3600, lambda: None))
    assert len(watch._heap) < 200
    assert {entry[2] for entry in watch._heap} >= set(running)


def test_a_call_that_has_left_holds_nothing_of_its_message(watch: Watch) -> None:
    class Message:
        def give_up(self) -> None: ...

    message = Message()
    gone = weakref.ref(message)
    ticket = watch.enter(3600, message.give_up)
    watch.leave(ticket)
    del message
    gc.collect()
    assert gone() is None


def test_one_that_cannot_be_told_does_not_end_the_watch(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    watch.enter(0.01, fail)
    watch.enter(0.05, told.set)
    assert told.wait(5)
    assert "could not be told" in caplog.text
