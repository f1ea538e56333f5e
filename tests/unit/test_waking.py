"""Awaiting, on an event loop, what other threads resolve."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from outbox.waking import Waker, resolved


def test_many_tasks_wait_for_what_another_thread_resolves() -> None:
    futures: list[Future[int]] = [Future() for _ in range(200)]

    def resolve() -> None:
        for number, future in enumerate(futures):
            future.set_result(number)

    async def main() -> None:
        thread = threading.Thread(target=resolve)
        waiting = asyncio.gather(*(resolved(one, 30) for one in futures))
        await asyncio.sleep(0)
        thread.start()
        await waiting
        thread.join()

    asyncio.run(main())
    assert all(one.done() for one in futures)


def test_what_is_not_resolved_in_time_is_left_as_it_was() -> None:
    future: Future[None] = Future()
    asyncio.run(resolved(future, 0.01))
    assert not future.done()
    assert not future.cancelled()


def test_each_has_its_own_time() -> None:
    order: list[str] = []

    async def wait(name: str, seconds: float) -> None:
        await resolved(Future(), seconds)
        order.append(name)

    async def main() -> None:
        last = asyncio.create_task(wait("last", 0.06))
        await asyncio.gather(wait("second", 0.03), wait("first", 0.01), wait("now", 0))
        await last

    asyncio.run(asyncio.wait_for(main(), 10))
    assert order == ["now", "first", "second", "last"]


def test_a_time_without_end_is_one() -> None:
    async def main() -> None:
        future: Future[None] = Future()
        task = asyncio.create_task(resolved(future, float("inf")))
        await asyncio.sleep(0.01)
        assert not task.done()
        future.set_result(None)
        await task

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_cancelled_task_leaves_the_future_alone_and_the_others_waiting() -> None:
    async def main() -> None:
        futures: list[Future[None]] = [Future(), Future()]
        tasks = [asyncio.create_task(resolved(one, 30)) for one in futures]
        await asyncio.sleep(0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert not futures[0].done()
        for future in futures:
            future.set_result(None)
        await tasks[1]

    asyncio.run(asyncio.wait_for(main(), 10))


def test_what_is_due_at_the_same_time_is_one_call_of_the_loop() -> None:
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
    future: Future[None] = Future()
    asyncio.run(resolved(future, 0))
    future.set_result(None)


def test_one_thread_has_one_loop_after_the_other() -> None:
    for _ in range(3):
        future: Future[None] = Future()
        threading.Timer(0.01, future.set_result, [None]).start()
        asyncio.run(asyncio.wait_for(resolved(future, 30), 10))
        assert future.done()
