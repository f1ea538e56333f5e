"""Forks wait for outbox's threads, and these for forks, for a bounded time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from outbox.system import fork_pause
from outbox.system.fork_pause import Pause
from tests.waiting import wait_until


class Work:
    """A thread that works for ``seconds`` at a time, and notes each time that it has begun."""

    def __init__(self, seconds: float) -> None:
        self.begun: list[float] = []
        self.seconds = seconds
        self.stopping = False
        self.in_work = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.begun)

    def run(self) -> None:
        pause = Pause()
        while not self.stopping:
            pause.busy = True
            if Pause.forking:
                pause.wait()
            self.in_work = True
            self.begun.append(time.monotonic())
            time.sleep(self.seconds)
            self.in_work = False
            pause.busy = False
            time.sleep(0.001)
        pause.end()

    def stop(self) -> None:
        self.stopping = True
        self.thread.join()


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work(0.02)
    yield work
    work.stop()


def test_a_child_never_begins_while_a_thread_works(work: Work) -> None:
    for _ in range(30):
        child = os.fork()
        if not child:
            os._exit(int(work.in_work))
        assert os.waitpid(child, 0)[1] == 0
    count = len(work.begun)
    wait_until(lambda: len(work.begun) > count)  # it goes on


def test_a_thread_that_works_for_long_delays_a_fork_only_for_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fork_pause, "_LONGEST", 0.2)
    work = Work(1)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(0)
    assert 0.2 <= time.monotonic() - begin < 0.9
    assert os.waitpid(child, 0)[1] == 0
    work.stop()


def test_a_fork_by_a_working_thread_does_not_wait_for_itself() -> None:
    pause = Pause()
    try:
        begin = time.monotonic()
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert time.monotonic() - begin < 1
    finally:
        pause.end()
