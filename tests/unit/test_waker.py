"""Awaiting on an event loop what other threads resolve."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest

from outbox import PublishReport
from outbox.backlog.chunk import Chunk
from outbox.backlog.waker import Waker, reported

REPORT = PublishReport()


def test_many_tasks_wait_for_what_another_thread_resolves() -> None:
    chunks = [Chunk([]) for _ in range(200)]

    def resolve() -> None:
        for chunk in chunks:
            chunk.resolve(REPORT)

    async def main() -> None:
        thread = threading.Thread(target=resolve)
        waiting = asyncio.gather(*(reported(one, 30) for one in chunks))
        await asyncio.sleep(0)
        thread.start()
        await waiting
        thread.join()

    asyncio.run(main())
    assert all(one.reported is REPORT for one in chunks)


def test_a_chunk_not_resolved_in_time_is_left_unchanged() -> None:
    chunk = Chunk([])
    asyncio.run(reported(chunk, 0.01))
    assert chunk.reported is None


def test_each_waiter_has_its_own_timeout() -> None:
    order: list[str] = []

    async def wait(name: str, seconds: float) -> None:
        await reported(Chunk([]), seconds)
        order.append(name)

    async def main() -> None:
        last = asyncio.create_task(wait("last", 0.06))
        await asyncio.gather(wait("second", 0.03), wait("first", 0.01), wait("now", 0))
        await last

    asyncio.run(asyncio.wait_for(main(), 10))
    assert order == ["now", "first", "second", "last"]


def test_an_infinite_timeout_is_allowed() -> None:
    async def main() -> None:
        chunk = Chunk([])
        task = asyncio.create_task(reported(chunk, float("inf")))
        await asyncio.sleep(0.01)
        assert not task.done()
        chunk.resolve(REPORT)
        await task

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_cancelled_task_leaves_the_chunk_alone_and_other_tasks_waiting() -> None:
    async def main() -> None:
        chunks = [Chunk([]), Chunk([])]
        tasks = [asyncio.create_task(reported(one, 30)) for one in chunks]
        await asyncio.sleep(0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert chunks[0].reported is None
        for chunk in chunks:
            chunk.resolve(REPORT)
        await tasks[1]

    asyncio.run(asyncio.wait_for(main(), 10))


def test_simultaneous_wakeups_are_a_single_call_of_the_loop() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls: list[object] = []

        class Counting:
            def call_soon_threadsafe(self, callback: object) -> None:
                calls.append(callback)
                loop.call_soon_threadsafe(callback)  # type: ignore[arg-type]

        waker = Waker(Counting())  # type: ignore[arg-type]
        first, second, third = (loop.create_future() for _ in range(3))
        waker.wake(first)
        waker.wake(second)
        await asyncio.gather(first, second)
        waker.wake(third)
        await third
        assert len(calls) == 2

    asyncio.run(asyncio.wait_for(main(), 10))


def test_resolving_after_the_loop_was_closed_is_harmless() -> None:
    chunk = Chunk([])
    asyncio.run(reported(chunk, 0))
    chunk.resolve(REPORT)


def test_a_thread_may_run_several_loops_in_turn() -> None:
    for _ in range(3):
        chunk = Chunk([])
        threading.Timer(0.01, chunk.resolve, [REPORT]).start()
        asyncio.run(asyncio.wait_for(reported(chunk, 30), 10))
        assert chunk.reported is REPORT


class TimeLimit(Exception):
    """What a signal handler raises; asyncio logs it, and the loop goes on."""


def test_an_exception_in_the_loop_delays_one_wake_and_no_later_one() -> None:
    def trace(frame: FrameType, what: str, _argument: Any) -> None:
        if what == "call" and frame.f_code is Waker.wake_due.__code__:
            sys.settrace(before)
            raise TimeLimit

    async def wait() -> float:
        chunk = Chunk([])
        threading.Timer(0.02, chunk.resolve, [REPORT]).start()
        began = time.monotonic()
        assert await reported(chunk, 1)
        return time.monotonic() - began

    async def main() -> list[float]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        sys.settrace(trace)
        return [await wait() for _ in range(3)]

    before = sys.gettrace()
    try:
        first, *later = asyncio.run(main())
    finally:
        sys.settrace(before)
    assert first >= 1
    assert max(later) < 0.9
