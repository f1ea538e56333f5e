"""Collecting: units of work, child buffers, joining, closing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outbox import (
    AutoPublishingEventCollector,
    CollectorClosed,
    CollectorFull,
    Event,
    EventCollector,
    NotConfigured,
    Publisher,
    UsageError,
    auto_publishing,
    clear_events,
    configure,
    enqueue_event,
    publish,
    publish_async,
)
from outbox.testing import CollectedEvents
from outbox.transports.memory import MemoryTransport


@pytest.fixture
def publisher() -> Publisher:
    return configure("memory://")


def published(publisher: Publisher) -> list[object]:
    transport = publisher._own
    assert isinstance(transport, MemoryTransport)
    return [event.payload for event in transport.published]


class Boom(Exception):
    pass


# ------------------------------------------------------------------------------ blocks


def test_a_block_publishes_at_its_end_and_not_before(publisher: Publisher) -> None:
    with auto_publishing() as block:
        event = enqueue_event(1, "x")
        assert published(publisher) == []
        assert block.events == (event,)
        assert len(block) == 1
    assert published(publisher) == [1]
    assert block.report is not None
    assert block.report.published == (event,)
    assert block.closed


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_block_that_raises_publishes_nothing(
    publisher: Publisher, error: type[BaseException]
) -> None:
    with pytest.raises(error), auto_publishing():
        enqueue_event(1, "x")
        raise error
    assert published(publisher) == []


def test_a_block_left_by_system_exit_warns_of_what_it_dropped(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit), auto_publishing():
        raise SystemExit(0)
    assert not caplog.records
    with pytest.raises(SystemExit), auto_publishing():
        event = enqueue_event(1, "x")
        raise SystemExit(0)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert event.id in record.getMessage()


def test_a_nested_block_joins_and_its_failure_drops_only_its_own_events(
    publisher: Publisher,
) -> None:
    with auto_publishing() as outer:
        enqueue_event(1, "x")
        with auto_publishing() as inner:
            enqueue_event(2, "x")
            assert [event.payload for event in inner.events] == [2]
        assert published(publisher) == []
        with pytest.raises(Boom), auto_publishing():
            enqueue_event(3, "x")
            with auto_publishing():
                enqueue_event(4, "x")
            raise Boom
        enqueue_event(5, "x")
        assert [event.payload for event in outer.events] == [1, 2, 5]
    assert inner.joined
    assert inner.report is None
    assert published(publisher) == [1, 2, 5]


def test_an_independent_block_never_joins(publisher: Publisher) -> None:
    with pytest.raises(Boom), auto_publishing():
        enqueue_event(1, "x")
        with auto_publishing(independent=True) as inner:
            enqueue_event(2, "x")
        assert not inner.joined
        assert published(publisher) == [2]
        raise Boom
    assert published(publisher) == [2]


def test_a_block_inside_a_plain_collector_is_outermost(
    publisher: Publisher,
) -> None:
    collector = EventCollector()
    with EventCollector.use(collector):
        enqueue_event(1, "x")
        with auto_publishing() as block:
            enqueue_event(2, "x")
        assert not block.joined
        assert published(publisher) == [2]
        assert [event.payload for event in collector.events] == [1]


def test_options_on_a_block_that_would_join_are_refused(publisher: Publisher) -> None:
    with auto_publishing():
        with pytest.raises(UsageError, match="autoflush"), auto_publishing(autoflush=True):
            pass
        with auto_publishing(autoflush=True, independent=True):
            enqueue_event(1, "x")
            assert published(publisher) == [1]
    with pytest.raises(UsageError, match="no option colour"):
        auto_publishing(colour="red")  # type: ignore[call-overload]


def test_a_block_can_be_entered_only_once(publisher: Publisher) -> None:
    block = auto_publishing()
    with block, pytest.raises(UsageError, match="entered only once"), block:
        pass
    with pytest.raises(UsageError, match="entered only once"), block:
        pass


def test_a_decorated_function_has_a_block_for_each_call(publisher: Publisher) -> None:
    @auto_publishing
    def bare(n: int) -> int:
        enqueue_event(n, "x")
        if n == 2:
            raise Boom
        return n if n < 3 else bare(n - 2)

    @auto_publishing(independent=True)
    async def coroutine(n: int) -> int:
        enqueue_event(n, "x")
        await asyncio.sleep(0)
        return n

    assert bare(1) == 1
    with pytest.raises(Boom):
        bare(2)
    assert bare(3) == 1
    assert published(publisher) == [1, 3, 1]
    assert bare.__name__ == "bare"

    async def main() -> list[int]:
        return await asyncio.gather(*(coroutine(n) for n in range(10, 15)))

    assert asyncio.run(main()) == [10, 11, 12, 13, 14]
    assert sorted(published(publisher)[3:]) == [10, 11, 12, 13, 14]  # type: ignore[type-var]


def test_generator_functions_are_refused(publisher: Publisher) -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(UsageError, match="generator function"):
        auto_publishing()(generator)
    with pytest.raises(UsageError, match="generator function"):
        auto_publishing(async_generator)


def plainly_wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def without_wraps(function: Any) -> Any:
    return lambda *args: function(*args)


class Callable_:
    def __init__(self, function: Any) -> None:
        self.function = function

    async def __call__(self, *args: Any) -> Any:
        return await self.function(*args)


async def enqueues_twice(n: int) -> int:
    enqueue_event(n, "x")
    await asyncio.sleep(0)
    enqueue_event(n, "x")
    if n < 0:
        raise Boom
    return n


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(plainly_wrapped(enqueues_twice), id="wrapped"),
        pytest.param(plainly_wrapped(plainly_wrapped(enqueues_twice)), id="wrapped twice"),
        pytest.param(functools.partial(enqueues_twice), id="partial"),
        pytest.param(functools.partial(plainly_wrapped(enqueues_twice)), id="partial of wrapped"),
        pytest.param(Callable_(enqueues_twice), id="object"),
        pytest.param(staticmethod(enqueues_twice), id="staticmethod"),
    ],
)
@pytest.mark.parametrize("joins", [False, True])
def test_every_form_of_a_coroutine_function_has_a_block_around_all_of_it(
    publisher: Publisher, form: Any, joins: bool
) -> None:
    decorated = auto_publishing(form)

    async def main() -> None:
        if joins:
            async with auto_publishing():
                assert await decorated(1) == 1
                assert published(publisher) == []
        else:
            assert await decorated(1) == 1
        assert published(publisher) == [1, 1]
        with pytest.raises(Boom):
            await decorated(-1)
        assert await asyncio.gather(*map(decorated, (2, 3))) == [2, 3]

    asyncio.run(main())
    assert sorted(published(publisher)) == [1, 1, 2, 2, 3, 3]  # type: ignore[type-var]


def test_a_wrapper_that_runs_its_coroutine_is_a_plain_function(publisher: Publisher) -> None:
    @auto_publishing
    @functools.wraps(enqueues_twice)
    def command(n: int) -> int:
        return asyncio.run(enqueues_twice(n))

    assert command(1) == 1
    assert published(publisher) == [1, 1]
    with pytest.raises(Boom):
        command(-1)
    assert published(publisher) == [1, 1]


def test_a_function_whose_result_would_run_after_its_block_is_refused(
    publisher: Publisher,
) -> None:
    def numbers() -> Iterator[int]:
        enqueue_event(1, "x")
        yield 1

    refused = [
        without_wraps(enqueues_twice),
        without_wraps(numbers),
        plainly_wrapped(numbers),
        contextlib.contextmanager(numbers),
    ]
    for function in refused:
        arguments = (1,) if function is refused[0] else ()
        with pytest.raises(UsageError, match="would run after the block"):
            auto_publishing(function)(*arguments)
    assert published(publisher) == []
    for kind in (functools.partial(numbers), dict):
        with pytest.raises(UsageError):
            auto_publishing(kind)


def test_a_synchronous_block_on_an_event_loop_is_refused_at_once_unless_it_joins(
    publisher: Publisher,
) -> None:
    async def main() -> None:
        with pytest.raises(UsageError, match="async with"), auto_publishing():
            pytest.fail("entered")
        async with auto_publishing():
            with auto_publishing() as inner:
                enqueue_event(1, "x")
            assert inner.joined
        with auto_publishing(autoflush=True):  # submits, and does not wait
            enqueue_event(2, "x")
        assert published(publisher) == [1, 2]

    asyncio.run(main())


def test_concurrent_tasks_in_one_block_never_touch_each_others_events(
    publisher: Publisher,
) -> None:
    async def one(n: int) -> None:
        with contextlib.suppress(Boom):
            async with auto_publishing():
                enqueue_event(n, "x")
                await asyncio.sleep(0)
                assert [event.payload for event in EventCollector.current().events] == [n]
                if n % 2:
                    raise Boom

    async def main() -> None:
        async with auto_publishing():
            await asyncio.gather(*(one(n) for n in range(10)))

    asyncio.run(main())
    assert sorted(published(publisher)) == [0, 2, 4, 6, 8]  # type: ignore[type-var]


def test_a_joined_block_whose_unit_has_ended_publishes_itself(
    publisher: Publisher,
) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def late() -> None:
            async with auto_publishing() as block:
                enqueue_event("late", "x")
                assert block.joined
                await ended.wait()
            assert block.report is not None

        async with auto_publishing():
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        assert published(publisher) == []
        ended.set()
        await task
        assert published(publisher) == ["late"]

    asyncio.run(main())


def test_an_event_of_a_task_that_outlived_its_unit_is_refused_rather_than_lost(
    publisher: Publisher,
) -> None:
    async def main() -> None:
        async def late() -> None:
            await asyncio.sleep(0.01)
            enqueue_event("late", "x")

        async with auto_publishing():
            task = asyncio.create_task(late())
        with pytest.raises(CollectorClosed, match="after its unit of work had ended"):
            await task

        async def block_of_its_own() -> None:
            await asyncio.sleep(0.01)
            async with auto_publishing() as block:
                enqueue_event("own", "x")
            assert not block.joined

        async with auto_publishing():
            task = asyncio.create_task(block_of_its_own())
        await task
        assert published(publisher) == ["own"]

    asyncio.run(main())


def test_a_block_whose_publisher_was_closed_raises_and_names_the_lost_events(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match="closed"), auto_publishing():
        event = enqueue_event(1, "x")
        publisher.close()
    assert f"lost at the end of a block: '{event.id}'" in caplog.text


# ------------------------------------------------------------------------------ savepoints


def test_savepoints_nest_and_drop_only_their_own_events(publisher: Publisher) -> None:
    with auto_publishing() as block:
        enqueue_event(1, "x")
        with contextlib.suppress(Boom), block.savepoint():
            enqueue_event(2, "x")
            raise Boom
        with block.savepoint() as collector:
            enqueue_event(3, "x")
            with contextlib.suppress(Boom), block.savepoint():
                enqueue_event(4, "x")
                raise Boom
            assert [event.payload for event in collector.events] == [3]
        with EventCollector.current().savepoint():
            enqueue_event(5, "x")
            assert [event.payload for event in clear_events()] == [5]
        enqueue_event(6, "x")
    assert published(publisher) == [1, 3, 6]


def test_a_savepoint_of_a_unit_that_has_ended_refuses_events(publisher: Publisher) -> None:
    def late() -> None:
        with block.savepoint(), block.savepoint():
            with pytest.raises(CollectorClosed, match="after its unit of work had ended"):
                enqueue_event("late", "x")

    with auto_publishing() as block:
        context = contextvars.copy_context()  # a task's or a thread's, which outlives the unit
    context.run(late)
    assert published(publisher) == []


def test_a_savepoint_whose_unit_ends_before_it_raises_and_names_its_events(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def late() -> Event:
            with block.savepoint():
                event = enqueue_event("late", "x")
                events.append(event)
                await ended.wait()
            return event

        events: list[Event] = []
        async with auto_publishing() as block:
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        ended.set()
        with pytest.raises(CollectorClosed, match=r"1 event\(s\) of a savepoint"):
            await task
        assert events[0].id in caplog.text

    asyncio.run(main())
    assert published(publisher) == []


def test_publish_and_clear_act_on_the_innermost_buffer(publisher: Publisher) -> None:
    with auto_publishing() as block:
        enqueue_event(1, "x")
        with block.savepoint():
            enqueue_event(2, "x")
            assert len(publish().published) == 1
            assert published(publisher) == [2]
        assert [event.payload for event in block.events] == [1]
        block.clear_events()
    assert published(publisher) == [2]


def test_a_collector_named_explicitly_takes_its_innermost_buffer(publisher: Publisher) -> None:
    one, other = EventCollector(), EventCollector()
    with EventCollector.use(one), one.savepoint(), EventCollector.use(other):
        one.enqueue_event("one", "x")
        other.enqueue_event("other", "x")
        assert EventCollector.current() is other
        assert [event.payload for event in one.events] == ["one"]
        assert [event.payload for event in other.events] == ["other"]
    assert len(one) == 1


# ------------------------------------------------------------------------------ bounds


@pytest.mark.hazard("H6")
def test_a_collector_is_bounded_by_events_and_by_bytes(publisher: Publisher) -> None:
    few = EventCollector(max_events=3)
    with EventCollector.use(few), few.savepoint():
        for n in range(3):
            enqueue_event(n, "x")
        with pytest.raises(CollectorFull, match="max_events=3"):
            enqueue_event(3, "x")
        clear_events()
        enqueue_event(4, "x")
    assert [event.payload for event in few.events] == [4]
    small = EventCollector(max_bytes=10)
    small.enqueue_event("12345678", "x")
    with pytest.raises(CollectorFull, match="max_bytes=10"):
        small.enqueue_event("1", "x")


def test_the_bounds_come_from_the_publishers_settings() -> None:
    configure("memory://", max_events=1)
    with auto_publishing():
        enqueue_event(1, "x")
        with pytest.raises(CollectorFull):
            enqueue_event(2, "x")


def test_eight_threads_enqueueing_into_one_collector_lose_nothing(publisher: Publisher) -> None:
    def work(thread: int) -> None:
        for n in range(1000):
            enqueue_event([thread, n], "x")

    with auto_publishing() as block, ThreadPoolExecutor(8) as pool:
        contexts = [contextvars.copy_context() for _ in range(8)]
        list(pool.map(lambda n: contexts[n].run(work, n), range(8)))
    assert block.report is not None
    assert len(block.report.published) == 8000
    assert len(set(block.report.published)) == 8000


# ------------------------------------------------------------------------------ outside of units


@pytest.mark.hazard("E2")
def test_outside_of_any_unit_events_are_published_by_publish_and_nothing_warns(
    publisher: Publisher,
) -> None:
    def script() -> None:
        enqueue_event(1, "x")  # warnings are errors here
        enqueue_event(2, "x")
        assert [event.payload for event in publish().published] == [1, 2]
        enqueue_event(3, "x")
        assert len(clear_events()) == 1

    contextvars.copy_context().run(script)


@pytest.mark.hazard("E2")
@pytest.mark.parametrize("then", ["enqueue", "publish"])
def test_what_one_job_of_a_pooled_thread_has_left_warns_the_next_one(
    publisher: Publisher, then: str
) -> None:
    def failing() -> None:
        enqueue_event("left behind", "x")
        raise Boom

    def following() -> None:
        if then == "enqueue":
            enqueue_event("next", "x")
        else:
            publish()

    line = failing.__code__.co_firstlineno + 1
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(Boom):
            pool.submit(failing).result()
        with pytest.raises(RuntimeWarning, match=f"{__file__}:{line}, by a job that has ended"):
            pool.submit(following).result()
        assert published(publisher) == []  # a filter made it an exception: nothing has happened
        assert len(pool.submit(clear_events).result()) == 1


def test_jobs_of_a_pooled_thread_that_publish_are_not_warned(publisher: Publisher) -> None:
    def helper(n: int) -> None:
        enqueue_event(n, "x")

    def job(n: int) -> None:
        helper(n)
        helper(n)
        publish()

    with ThreadPoolExecutor(1) as pool:
        for n in range(3):
            pool.submit(job, n).result()
    assert published(publisher) == [0, 0, 1, 1, 2, 2]


def test_tasks_that_publish_their_own_events_are_not_warned(publisher: Publisher) -> None:
    async def job(n: int) -> None:
        enqueue_event(n, "x")
        await asyncio.sleep(0)
        enqueue_event(n, "x")
        await publish_async()

    async def main() -> None:
        await asyncio.gather(*(job(n) for n in range(3)))

    asyncio.run(main())
    assert len(published(publisher)) == 6


@pytest.mark.hazard("E2")
def test_each_thread_has_its_own_collector(publisher: Publisher) -> None:
    found: list[EventCollector] = []

    def work() -> None:
        found.append(EventCollector.current())
        assert EventCollector.current() is found[-1]

    with auto_publishing() as block:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found[0] is not block


def test_an_implicit_collector_discarded_with_events_logs_which(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    event = contextvars.Context().run(lambda: enqueue_event(1, "x"))
    gc.collect()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert event.id in record.getMessage()
    assert f"at {__file__}:" in record.getMessage()
    contextvars.Context().run(lambda: (enqueue_event(1, "x"), publish()))
    gc.collect()
    assert len(caplog.records) == 1


def test_a_script_that_forgets_to_publish_is_warned_at_exit() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import outbox; outbox.configure('memory://'); print(outbox.enqueue_event(1, 'x').id)",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "<string>:1: RuntimeWarning: an event was enqueued outside" in done.stderr
    assert f"never published: '{done.stdout.strip()}'" in done.stderr


def test_enqueueing_without_a_url_names_the_possible_forms() -> None:
    with pytest.raises(NotConfigured, match=r"amqp://.*sqlite:///outbox.db.*memory://"):
        EventCollector().enqueue_event(1, "x")
    with pytest.raises(UsageError), auto_publishing():
        enqueue_event(1, "x")


def test_no_url_is_needed_without_events() -> None:
    with auto_publishing():
        pass
    assert publish().ok
    assert asyncio.run(publish_async()).ok
    assert clear_events() == ()


def test_the_url_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_URL", "memory://")
    monkeypatch.setenv("OUTBOX_EXCHANGE", "from-environment")
    with auto_publishing():
        assert enqueue_event(1, "x").exchange == "from-environment"


def test_autoflush_publishes_each_event_at_once(publisher: Publisher) -> None:
    with auto_publishing(autoflush=True):
        enqueue_event(1, "x")
        assert published(publisher) == [1]
        enqueue_event(2, "x")
        assert published(publisher) == [1, 2]


@pytest.mark.parametrize("console", [["-i", "-q"], ["-m", "asyncio"]], ids=["python", "asyncio"])
def test_autoflush_stays_on_between_the_lines_of_a_console(console: list[str]) -> None:
    lines = [
        "import outbox",
        "publisher = outbox.configure('memory://')",
        "_ = outbox.auto_publishing(autoflush=True).open()",
        "_ = outbox.enqueue_event(1, 'x')",
        "_ = outbox.enqueue_event(2, 'x')",
        "print('published', [event.payload for event in publisher._own.published])",
    ]
    done = subprocess.run(
        [sys.executable, *console],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "TERM": "dumb", "PYTHON_BASIC_REPL": "1"},
    )
    assert "published [1, 2]" in done.stdout, done.stdout + done.stderr
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("console", [["-i", "-q"], ["-m", "asyncio"]], ids=["python", "asyncio"])
def test_an_event_waits_for_publish_in_a_later_line_of_a_console(console: list[str]) -> None:
    publish = "await outbox.publish_async()" if "asyncio" in console else "outbox.publish()"
    lines = [
        "import outbox",
        "publisher = outbox.configure('memory://')",
        "_ = outbox.enqueue_event(1, 'x')",
        "_ = outbox.enqueue_event(2, 'x')",
        f"_ = {publish}",
        "print('published', [event.payload for event in publisher._own.published])",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", *console],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "TERM": "dumb", "PYTHON_BASIC_REPL": "1"},
    )
    assert "published [1, 2]" in done.stdout, done.stdout + done.stderr
    assert "lost" not in done.stderr


def test_a_console_block_can_be_closed(publisher: Publisher) -> None:
    def console() -> None:
        block = auto_publishing(autoflush=True).open()
        assert contextvars.Context().run(EventCollector.current) is block
        block.close()
        assert contextvars.Context().run(EventCollector.current) is not block

    contextvars.copy_context().run(console)


# ------------------------------------------------------------------------------ processes


@pytest.mark.hazard("A7")
def test_a_forked_child_has_no_events_of_its_parent(publisher: Publisher) -> None:
    reader, writer = os.pipe()
    with auto_publishing() as block:
        enqueue_event("parent", "x")
        pid = os.fork()
        if pid == 0:
            try:
                current = EventCollector.current()
                answer = f"{current is not block} {len(current)}"
                try:
                    block.enqueue_event(1, "x")
                except UsageError as error:
                    answer += f" {error}"
                os.write(writer, answer.encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    os.close(writer)
    answer = os.read(reader, 1000).decode()
    os.close(reader)
    assert answer.startswith("True 0 this collector belongs to the process")
    assert published(publisher) == ["parent"]


def _in_child(queue: multiprocessing.Queue[int]) -> None:
    with auto_publishing() as block:
        enqueue_event("child", "x")
    assert block.report is not None
    queue.put(len(block.report.published))


def test_a_forked_child_publishes_its_own(publisher: Publisher) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[int] = context.Queue()
    with auto_publishing():
        enqueue_event("parent", "x")
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=20) == 1
        child.join(20)
    queue.close()
    queue.join_thread()
    assert child.exitcode == 0
    assert published(publisher) == ["parent"]


# ------------------------------------------------------------------------------ contexts


def test_a_block_left_in_another_context_still_publishes(publisher: Publisher) -> None:
    block = auto_publishing()
    context = contextvars.copy_context()
    context.run(block.__enter__)
    context.run(enqueue_event, 1, "x")
    block.__exit__(None, None, None)
    assert published(publisher) == [1]

    def after() -> None:
        with auto_publishing() as another:  # the closed one cannot be joined
            enqueue_event(2, "x")
        assert not another.joined

    context.run(after)
    assert published(publisher) == [1, 2]


def test_a_generator_may_enter_a_block_and_be_closed_elsewhere(publisher: Publisher) -> None:
    def dependency() -> Iterator[AutoPublishingEventCollector]:
        with auto_publishing() as block:
            yield block

    found = dependency()
    block = contextvars.copy_context().run(next, found)
    block.enqueue_event(1, "x")
    with pytest.raises(StopIteration):
        contextvars.copy_context().run(next, found)
    assert published(publisher) == [1]


def test_the_recorder_sees_threads_tasks_and_explicit_publishers(
    collected_events: CollectedEvents,
) -> None:
    def work() -> None:
        with auto_publishing(publisher=Publisher("amqp://127.0.0.1:1/")):
            enqueue_event("thread", "t")

    async def task() -> None:
        async with auto_publishing():
            enqueue_event("task", "t")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    asyncio.run(task())
    assert [event.payload for event in collected_events.published] == ["thread", "task"]


def test_headers_count_towards_the_limit_in_bytes() -> None:
    collector = EventCollector(publisher=Publisher("memory://"), max_bytes=3_000)
    for _ in range(2):
        collector.enqueue_event(1, "t", headers={"trace": "x" * 1_000})
    with pytest.raises(CollectorFull, match="max_bytes=3000"):
        collector.enqueue_event(1, "t", headers={"trace": "x" * 1_000})
    collector.enqueue_event(1, "t")
    collector.publish()
    collector.enqueue_event(1, "t", headers={"trace": "x" * 2_900})
