"""Functions that run when a worker starts and stops."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outbox import Publisher, UsageError, exit_codes
from outbox.consumers import (
    Consumer,
    ReceivedEvent,
    Worker,
    on_worker_start,
    on_worker_stop,
    worker_state,
)
from outbox.consumers.hooks import HookFailed
from outbox.consumers.worker import hook_runner
from tests.consuming import Command
from tests.places import Place, SQLitePlace, events_for, made, working
from tests.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), name)


@pytest.fixture
def publisher(place: SQLitePlace) -> Iterator[Publisher]:
    with place.publisher() as publisher:
        yield publisher


def plain(place: SQLitePlace, name: str, process: Callable[[], Any]) -> type[Consumer]:
    class Plain(Consumer):
        queue = made(place, name)

        def process(self, event: ReceivedEvent) -> None:
            process()

    return Plain


def asynchronous(place: SQLitePlace, name: str, process: Callable[[], Any]) -> type[Consumer]:
    class Asynchronous(Consumer):
        queue = made(place, name)

        async def process(self, event: ReceivedEvent) -> None:
            process()

    return Asynchronous


def here() -> tuple[str, object]:
    """Return the thread and the loop of the caller."""
    try:
        return threading.current_thread().name, asyncio.get_running_loop()
    except RuntimeError:
        return threading.current_thread().name, None


def send(publisher: Publisher, *queues: str) -> None:
    publisher.publish(events_for(publisher, queues, exchange="")).raise_for_failure()


def test_hooks_run_in_order_around_the_messages_where_the_handlers_run(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    log: list[tuple[str, tuple[str, object]]] = []

    def note(word: str) -> None:
        log.append((word, here()))

    @on_worker_start
    def first() -> None:
        note("first")

    @on_worker_start
    async def second() -> None:
        await asyncio.sleep(0.05)
        note("second")

    @on_worker_start
    def third() -> None:
        note("third")

    @on_worker_stop
    async def close_second() -> None:
        await asyncio.sleep(0.05)
        note("close second")

    @on_worker_stop
    def close_third() -> None:
        note("close third")

    consumers = [
        plain(place, f"{name}-plain", lambda: note("plain")),
        asynchronous(place, f"{name}-async", lambda: note("async")),
    ]
    send(publisher, f"{name}-plain")
    with working(publisher, *consumers, threads=1):
        wait_until(lambda: len(log) == 4)
        send(publisher, f"{name}-async")
        wait_until(lambda: len(log) == 5)
    words = [word for word, _ in log]
    assert words == ["first", "second", "third", "plain", "async", "close third", "close second"]
    places = dict(log)
    assert places["first"] == places["third"] == places["plain"] == places["close third"]
    assert places["plain"] == ("outbox-worker-1", None)
    assert places["second"] == places["async"] == places["close second"]
    assert places["async"][1] is not None
    wait_until(lambda: not any("worker" in each.name for each in threading.enumerate()))


def test_plain_hooks_run_on_the_loop_where_there_are_no_threads(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    loops = []

    @on_worker_start
    def start() -> None:
        loops.append(asyncio.get_running_loop())

    @on_worker_stop
    def stop() -> None:
        loops.append(asyncio.get_running_loop())

    consumer = asynchronous(place, name, lambda: loops.append(asyncio.get_running_loop()))
    with working(publisher, consumer):
        send(publisher, name)
        wait_until(lambda: len(loops) == 2)
    assert len(loops) == 3
    assert len(set(loops)) == 1


def test_asynchronous_hooks_have_a_loop_even_if_no_handler_needs_one(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    done: list[object] = []

    @on_worker_start
    async def start() -> None:
        worker_state.loop = asyncio.get_running_loop()

    @on_worker_stop
    async def stop() -> None:
        done.append(asyncio.get_running_loop() is worker_state.loop)

    consumer = plain(place, name, lambda: done.append(worker_state.loop.is_running()))
    with working(publisher, consumer):
        send(publisher, name)
        wait_until(lambda: done)
    assert done == [True, True]


def test_each_worker_has_its_own_state_which_its_handlers_and_their_threads_see(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    numbers = iter(range(10))
    seen: dict[str, list[int]] = {}

    @on_worker_start
    async def start() -> None:
        worker_state.number = next(numbers)

    def note(queue: str) -> Callable[[], None]:
        return lambda: seen.setdefault(queue, []).append(worker_state.number)

    def note_elsewhere() -> None:
        with ThreadPoolExecutor(1) as pool:  # its thread has no context of the message
            pool.submit(note("elsewhere")).result()

    with working(publisher, asynchronous(place, f"{name}-1", note("one"))) as one:
        wait_until(lambda: one.is_consuming)
        with working(publisher, plain(place, f"{name}-2", note("two"))) as two:
            wait_until(lambda: two.is_consuming)
            send(publisher, f"{name}-1", f"{name}-2")
            wait_until(lambda: len(seen) == 2)
    with working(publisher, plain(place, f"{name}-3", note_elsewhere)):
        send(publisher, f"{name}-3")
        wait_until(lambda: len(seen) == 3)
    assert seen == {"one": [0], "two": [1], "elsewhere": [2]}
    with pytest.raises(AttributeError, match="no attribute 'number'; set it in a function with"):
        _ = worker_state.number


def test_a_test_sets_what_handlers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "http", "a client", raising=False)
    assert worker_state.http == "a client"
    assert repr(worker_state) == "<worker_state: http>"
    monkeypatch.undo()
    with pytest.raises(AttributeError, match="no attribute 'http'"):
        del worker_state.http


def fail_plainly() -> None:
    raise UsageError("no licence")


async def fail() -> None:
    await asyncio.sleep(0)
    raise ValueError("no licence")


async def leave() -> None:
    await asyncio.sleep(0)
    raise SystemExit("no licence")


async def cancel_itself() -> None:
    raise asyncio.CancelledError("no licence")


def forget_async() -> Any:
    return fail()


@pytest.mark.parametrize("kind", [plain, asynchronous])
@pytest.mark.parametrize("hook", [fail_plainly, fail, leave, cancel_itself])
def test_a_worker_whose_start_fails_ends_before_it_consumes(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    hook: Callable[[], Any],
    kind: Callable[[SQLitePlace, str, Callable[[], Any]], type[Consumer]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = []
    on_worker_stop(lambda: done.append("stop"))
    on_worker_start(hook)
    on_worker_start(lambda: done.append("start"))
    consumer = kind(place, name, lambda: done.append("message"))
    send(publisher, name)
    worker = Worker([consumer], publisher=publisher)
    worker.start()
    with pytest.raises(HookFailed, match=f"{hook.__name__}.*has failed") as raised:
        worker.wait(10)
    assert raised.value.__cause__ is not None
    assert not worker.is_consuming
    began = time.monotonic()
    worker.stop(10)
    worker.stop(10)
    assert time.monotonic() - began < 2
    assert done == ["stop"]
    assert f"{hook.__name__}(), an @on_worker_start function, has failed" in caplog.text
    assert "Traceback" in caplog.text


def test_a_worker_that_cannot_begin_after_its_hooks_says_why(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_worker_start(lambda: None)
    worker = Worker([plain(place, name, lambda: None)], publisher=publisher)

    def start(*_: object) -> None:
        raise UsageError("not in this process")

    monkeypatch.setattr(worker._subscription, "start", start)
    worker.start()
    with pytest.raises(UsageError, match="not in this process"):
        worker.wait(10)
    worker.stop(1)


def test_a_plain_function_that_returns_a_coroutine_is_a_clear_error(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    on_worker_start(forget_async)
    worker = Worker([plain(place, name, print)], publisher=publisher)
    worker.start()
    with pytest.raises(HookFailed, match="make it async def"):
        worker.wait(10)
    worker.stop(10)


def test_a_stop_hook_that_fails_is_logged_and_the_others_run(
    place: SQLitePlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    done = []
    on_worker_stop(lambda: done.append("last"))
    on_worker_stop(fail)
    on_worker_stop(fail_plainly)
    with working(publisher, plain(place, name, print)):
        pass
    assert done == ["last"]
    assert caplog.text.count("@on_worker_stop function, has failed") == 2


def test_a_stop_hook_has_what_is_left_of_the_shutdown_timeout(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hook_runner, "_LEAST", 0.1)
    cancelled = []
    hangs = threading.Event()

    @on_worker_stop
    def hang_plainly() -> None:
        hangs.wait(20)

    @on_worker_stop
    async def hang() -> None:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append("hang")
            raise

    worker = Worker([plain(place, name, print)], publisher=publisher)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    began = time.monotonic()
    assert worker.stop(0.3)
    assert time.monotonic() - began < 2
    hangs.set()
    wait_until(lambda: cancelled)
    assert caplog.text.count("\nTimeoutError: ") == 2


def test_a_stop_during_the_start_begins_no_further_hook_and_never_consumes(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    log = []
    goes_on = threading.Event()

    @on_worker_start
    def wait() -> None:
        log.append("wait")
        goes_on.wait(20)

    on_worker_start(lambda: log.append("never"))
    on_worker_stop(lambda: log.append("stop"))
    consumer = plain(place, name, lambda: log.append("message"))
    send(publisher, name)
    worker = Worker([consumer], publisher=publisher)
    worker.start()
    wait_until(lambda: log)
    threading.Timer(0.2, goes_on.set).start()
    assert worker.stop(10)
    assert log == ["wait", "stop"]
    assert place.count(name) == 1


def test_a_worker_that_is_retired_during_its_start_becomes_idle(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    log = []
    goes_on = threading.Event()

    @on_worker_start
    def wait() -> None:
        log.append("wait")
        goes_on.wait(20)

    worker = Worker([plain(place, name, print)], publisher=publisher)
    worker.start()
    wait_until(lambda: log)
    worker.retire()
    assert not worker.is_idle
    goes_on.set()
    wait_until(lambda: worker.is_idle)
    assert not worker.is_consuming
    assert worker.stop(10)


def test_stop_hooks_run_beside_a_handler_that_does_not_end(
    place: SQLitePlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = []
    ends = threading.Event()

    def hang() -> None:
        log.append("message")
        ends.wait(20)

    on_worker_stop(lambda: log.append("stop"))
    consumer = plain(place, name, hang)
    send(publisher, name)
    worker = Worker([consumer], publisher=publisher, threads=1)
    worker.start()
    wait_until(lambda: log)
    assert not worker.stop(0.2)
    assert log == ["message", "stop"]
    ends.set()
    wait_until(lambda: not any(each.name == "outbox-worker-1" for each in threading.enumerate()))


def generator() -> Iterator[None]:
    yield


class AClass: ...


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        (generator, "has a yield; put what follows it into a function with @on_worker_stop"),
        (AClass, "needs a function without arguments"),
        (17, "needs a function without arguments, not 17"),
        (lambda worker: None, "must take no arguments"),
    ],
)
def test_what_is_not_a_function_without_arguments_is_refused(hook: Any, error: str) -> None:
    for decorate in (on_worker_start, on_worker_stop):
        with pytest.raises(UsageError, match=error):
            decorate(hook)


COMMAND = """
import os, sys
from outbox.consumers import consumer, on_worker_start, on_worker_stop, worker_state


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


@on_worker_start
def start():
    if os.path.exists("broken"):
        sys.exit("no licence")
    worker_state.pid = os.getpid()
    note("start", "-", os.getpid())


@on_worker_start
async def start_async():
    worker_state.asynchronous = True


@on_worker_stop
async def stop():
    note("stop", "-", worker_state.pid)


@consumer("{name}")
def work(event):
    assert worker_state.asynchronous and worker_state.pid == os.getpid()
    note("done", event.id, os.getpid())
"""


@pytest.fixture
def command(tmp_path: Path, place: Place, name: str) -> Iterator[Command]:
    command = Command(tmp_path, place, name)
    command.write(COMMAND.format(name=name))
    yield command
    command.close()


@pytest.mark.one_python
def test_each_process_of_isolated_handlers_runs_its_own_hooks(command: Command) -> None:
    command.start("--isolate", "process", "-t", "1")
    command.publish("something")
    command.wait_done(1)
    assert command.stop() == exit_codes.SUCCESS, command.text()
    [(_, subprocess)] = command.did()
    started = [pid for _, pid in command.did("start")]
    assert started == [command.process.pid, subprocess]
    assert sorted(pid for _, pid in command.did("stop")) == sorted(started)


@pytest.mark.one_python
def test_a_command_whose_start_fails_exits_with_1(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    command.start()
    assert command.process.wait(20) == exit_codes.UNFINISHED, command.text()
    assert "the worker ends before it consumes: start(), an @on_worker_start" in command.text()
    assert '"consuming ' not in command.text()


def test_without_hooks_the_worker_has_no_thread_for_them(
    place: SQLitePlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with working(publisher, plain(place, name, print)):
        names = {thread.name for thread in threading.enumerate()}
        assert "outbox-worker-start" not in names
        assert "outbox-worker-loop" not in names
