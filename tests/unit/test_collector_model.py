"""Units of work against a model: collectors, savepoints, blocks, tasks, an outage."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outbox import (
    CollectorClosed,
    CollectorFull,
    Event,
    EventCollector,
    PublishFailed,
    auto_publishing,
    clear_events,
    configuration,
    configure,
    enqueue_event,
    publish,
    publish_async,
)
from outbox.testing import CollectedEvents, recorded
from outbox.unit_of_work.unit_of_work import Scope

MAX_EVENTS = 8

T = TypeVar("T")
Names = list[int]


class Boom(Exception):
    pass


# ------------------------------------------------------------------------------ the model


@dataclass(eq=False)
class Buffer:
    """Where the events of a unit, a savepoint or a block wait, by their numbers."""

    kind: Literal["collector", "block", "savepoint", "joined block"]
    parent: Buffer | None = None
    follow_ons: bool = False
    events: Names = field(default_factory=list)
    children: list[Buffer] = field(default_factory=list)
    open: bool = True

    @property
    def root(self) -> Buffer:
        return self if self.parent is None else self.parent.root

    @property
    def nearest_open(self) -> Buffer | None:
        return self if self.open or self.parent is None else self.parent.nearest_open

    @property
    def will_be_published(self) -> bool:
        """Whether something that publishes is open here or above."""
        if self.open and self.kind != "savepoint":
            return True
        return self.parent is not None and self.parent.will_be_published

    @property
    def total(self) -> int:
        return len(self.events) + sum(child.total for child in self.children)

    def child(self, kind: Literal["savepoint", "joined block"]) -> Buffer:
        self.children.append(Buffer(kind, self, self.follow_ons))
        return self.children[-1]

    def take(self) -> Names:
        events, self.events = self.events, []
        return events


@dataclass
class World:
    """The fates of all events that have left their buffers."""

    broker_is_there: bool = True
    published: Names = field(default_factory=list)
    kept: Names = field(default_factory=list)
    cleared: Names = field(default_factory=list)
    withdrawn: Names = field(default_factory=list)

    def enqueue(self, name: int, buffer: Buffer) -> type[Exception] | None:
        if not buffer.open or not buffer.will_be_published:
            return CollectorClosed
        if buffer.root.total >= MAX_EVENTS:
            return CollectorFull
        buffer.events.append(name)
        return None

    def publish(self, buffer: Buffer) -> type[Exception] | None:
        events = buffer.take()
        if self.broker_is_there:
            self.published += events
        elif buffer.follow_ons:
            self.withdrawn += events
            return PublishFailed if events else None
        else:
            self.kept += events
        return None

    def clear(self, buffer: Buffer) -> None:
        self.cleared += buffer.take()

    def end(self, buffer: Buffer, success: bool) -> type[Exception] | None:
        """End a savepoint or a block."""
        buffer.open = False
        above = buffer.parent
        while above is not None and not above.open:
            above = above.parent
        if not success:
            self.clear(buffer)
        elif above is not None:
            above.events += buffer.take()
        elif buffer.kind == "savepoint":
            refused = CollectorClosed if buffer.events else None
            self.clear(buffer)
            return refused
        else:
            return self.publish(buffer)
        return None

    def broker_returns(self) -> None:
        self.broker_is_there = True
        self.published += self.kept
        self.kept = []


# ------------------------------------------------------------------- side by side with the real


@dataclass
class Place:
    """A block, savepoint or collector that a task is in, and the one that was around it."""

    buffer: Buffer
    own: bool
    leave: Callable[[BaseException | None], object]
    outer: Place | None = None


@dataclass
class Task:
    """One of several contexts side by side, as asyncio makes them for tasks."""

    context: contextvars.Context
    places: list[Place]

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return self.context.run(function, *arguments)

    @property
    def buffer(self) -> Buffer | None:
        return self.places[-1].buffer if self.places else None

    @property
    def around(self) -> Place | None:
        """The place around what begins next: one that has ended is forgotten then."""
        place = self.places[-1] if self.places else None
        while place is not None and not place.buffer.open:
            place = place.outer
        return place

    def innermost_of(self, root: Buffer) -> Buffer:
        """Return the innermost buffer of a unit that the task is in, or the unit's own."""
        place = self.places[-1] if self.places else None
        while place is not None and place.buffer.root is not root:
            place = place.outer
        return root if place is None else place.buffer


def now(coroutine: Any) -> Any:
    """Return what ``coroutine`` returns, which never has to wait here."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def entered(manager: AbstractContextManager[Any]) -> Callable[[BaseException | None], object]:
    manager.__enter__()

    def leave(error: BaseException | None) -> None:
        manager.__exit__(type(error) if error else None, error, None)

    return leave


def entered_async(block: Any) -> Callable[[BaseException | None], object]:
    now(block.__aenter__())

    def leave(error: BaseException | None) -> None:
        now(block.__aexit__(type(error) if error else None, error, None))

    return leave


def what_is_raised(function: Callable[[], object]) -> BaseException | None:
    try:
        function()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return error
    return None


def is_as_expected(error: BaseException | None, expected: type[Exception] | None) -> bool:
    return expected is None if error is None else type(error) is expected


def names(events: tuple[Any, ...]) -> Names:
    return [event.payload for event in events]


class Units(RuleBasedStateMachine):
    """The same is done to the model and to outbox, in several tasks, and then compared."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(quiet())
        self.collected: CollectedEvents = self.stack.enter_context(recorded("the model"))
        self.outage = contextlib.ExitStack()
        self.world = World()
        self.tasks = [Task(contextvars.Context(), [])]
        self.gone: list[Task] = []
        self.collectors: list[tuple[EventCollector, Buffer]] = []
        self.count = 0

    def teardown(self) -> None:
        # Whatever is left open would end when it is collected as garbage: in another example.
        self.outage.close()
        for task in (*self.tasks, *self.gone):
            for place in reversed(task.places):
                if place.own:
                    error = what_is_raised(partial(task.run, place.leave, None))
                    assert error is None or isinstance(error, CollectorClosed)
        self.stack.close()

    tasks_ = st.integers(0, 2)
    errors = st.sampled_from([Boom(), KeyboardInterrupt(), SystemExit(0)])

    def task(self, number: int) -> Task:
        return self.tasks[number % len(self.tasks)]

    def innermost(self, task: Task) -> Buffer:
        """Return where ``task`` is; if it is in no unit, create one for it."""
        if task.buffer is None:
            task.places.append(Place(Buffer("collector"), own=False, leave=lambda _: None))
        found = task.buffer
        assert found is not None
        return found

    def begin(self, task: Task, buffer: Buffer, leave: Callable[..., object]) -> None:
        """Have ``task`` be in ``buffer``, and something in it: what is empty proves little."""
        task.places.append(Place(buffer, own=True, leave=leave, outer=task.around))
        self.enqueue_in(task)

    @rule()
    def enqueue_everywhere(self) -> None:
        for task in self.tasks:
            self.enqueue_in(task)

    def enqueue_in(self, task: Task) -> None:
        self.count += 1
        expected = self.world.enqueue(self.count, self.innermost(task))
        error = what_is_raised(lambda: task.run(enqueue_event, self.count, "x"))
        assert is_as_expected(error, expected), error

    @rule(number=tasks_, is_async=st.booleans())
    def publish(self, number: int, is_async: bool) -> None:
        task = self.task(number)
        expected = self.world.publish(self.innermost(task))
        call = (lambda: now(publish_async())) if is_async else publish
        error = what_is_raised(lambda: task.run(call))
        assert is_as_expected(error, expected), error

    @rule(number=tasks_)
    def clear(self, number: int) -> None:
        task = self.task(number)
        self.world.clear(self.innermost(task))
        task.run(clear_events)

    @rule(number=tasks_)
    def begin_savepoint(self, number: int) -> None:
        task = self.task(number)
        buffer = self.innermost(task).child("savepoint")
        leave = task.run(lambda: entered(EventCollector.current().savepoint()))
        self.begin(task, buffer, leave)

    @rule(number=tasks_, is_async=st.booleans(), independent=st.booleans())
    def begin_block(self, number: int, is_async: bool, independent: bool) -> None:
        task = self.task(number)
        around = task.buffer
        if around is None or not around.root.open:
            buffer = Buffer("block")
        elif independent or around.root.kind != "block":
            buffer = Buffer("block", follow_ons=around.follow_ons)
        else:
            joined = around.nearest_open
            assert joined is not None
            buffer = joined.child("joined block")
        block = auto_publishing(independent=independent)
        leave = task.run(entered_async if is_async else entered, block)
        assert block.joined == (buffer.kind == "joined block")
        self.begin(task, buffer, leave)

    @rule(number=tasks_, follow_ons=st.booleans())
    def begin_collector(self, number: int, follow_ons: bool) -> None:
        task = self.task(number)
        collector = EventCollector(make_id=any_id if follow_ons else None)
        buffer = Buffer("collector", follow_ons=follow_ons)
        leave = task.run(entered, EventCollector.use(collector))
        self.begin(task, buffer, leave)
        self.collectors.append((collector, buffer))

    @precondition(lambda self: bool(self.collectors))
    @rule(number=tasks_, which=st.integers(0, 5))
    def publish_a_collector_from_anywhere(self, number: int, which: int) -> None:
        task = self.task(number)
        collector, root = self.collectors[which % len(self.collectors)]
        expected = self.world.publish(task.innermost_of(root))
        error = what_is_raised(lambda: task.run(collector.publish))
        assert is_as_expected(error, expected), error

    def leavable(self) -> list[Task]:
        return [task for task in self.tasks if task.places and task.places[-1].own]

    @precondition(lambda self: bool(self.leavable()))
    @rule(number=tasks_)
    def end_well(self, number: int) -> None:
        self.end(number, None)

    @precondition(lambda self: bool(self.leavable()))
    @rule(number=tasks_, error=errors)
    def end_with(self, number: int, error: BaseException) -> None:
        self.end(number, error)

    def end(self, number: int, error: BaseException | None) -> None:
        leavable = self.leavable()
        task = leavable[number % len(leavable)]
        place = task.places.pop()
        expected: type[Exception] | None = None
        if place.buffer.kind != "collector":
            expected = self.world.end(place.buffer, error is None)
        raised = what_is_raised(lambda: task.run(place.leave, error))
        # What contextlib has made raises again what its block has raised.
        assert (error is not None and raised is error) or is_as_expected(raised, expected), raised

    @precondition(lambda self: len(self.tasks) < 3 and bool(self.leavable()))
    @rule(number=tasks_, first=st.sampled_from(["nothing", "savepoint", "block"]))
    def spawn(self, number: int, first: str) -> None:
        """Have a task begin in the middle of another's unit, which it may outlive."""
        leavable = self.leavable()
        task = leavable[number % len(leavable)]
        inherited = [Place(one.buffer, False, one.leave, one.outer) for one in task.places]
        self.tasks.append(Task(task.context.copy(), inherited))
        if first == "savepoint":
            self.begin_savepoint(len(self.tasks) - 1)
        elif first == "block":
            self.begin_block(len(self.tasks) - 1, is_async=True, independent=False)

    @precondition(lambda self: len(self.tasks) == 3)
    @rule(number=st.integers(1, 2))
    def begin_anew(self, number: int) -> None:
        """Have a task replaced by one of an empty context, such as a bare thread's."""
        self.gone.append(self.tasks.pop(number))
        self.tasks.append(Task(contextvars.Context(), []))

    @rule()
    def broker_leaves_or_returns(self) -> None:
        if self.world.broker_is_there:
            self.world.broker_is_there = False
            self.outage.enter_context(self.collected.broker_down())
        else:
            self.world.broker_returns()
            self.outage.close()

    @property
    def all_there_are(self) -> tuple[Event, ...]:
        found = self.collected
        return (*found.pending, *found.published, *found.kept, *found.cleared)

    @invariant()
    def every_event_is_where_the_model_has_it(self) -> None:
        assert names(self.collected.published) == self.world.published
        assert names(self.collected.kept) == self.world.kept
        assert names(self.collected.cleared) == self.world.cleared
        ids = {event.id for event in self.all_there_are}
        assert len(ids) == len(self.all_there_are)
        for task in self.tasks:
            if task.buffer is not None:
                found = task.run(lambda: EventCollector.current().events)
                assert names(found) == task.buffer.events


TestUnits = Units.TestCase
TestUnits.settings = settings(max_examples=2 * settings().max_examples)


def any_id(exchange: str, target: str, key: str | None, body: bytes) -> str:
    return str(uuid.uuid4())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Have a publisher of few events, and nothing said of what the tests do on purpose."""
    Scope.resume(None)
    loggers = [logging.getLogger(f"outbox.{name}") for name in ("collector", "publisher")]
    configure("memory://", max_events=MAX_EVENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of events outside of any unit
        for one in loggers:
            one.disabled = True
        try:
            yield
        finally:
            for one in loggers:
                one.disabled = False
            found = configuration.configured_publisher()
            assert found is not None
            found.close(0)
            configuration._publisher = None


# ------------------------------------------------------------------------ tasks of an event loop

Step = Any
"""An action, or the name of a block, whether it fails, and its steps; or steps side by side."""

actions = st.sampled_from(["enqueue", "enqueue", "wait", "publish", "clear"])
programs = st.recursive(
    st.lists(actions, max_size=4),
    lambda inner: st.lists(
        actions
        | st.tuples(st.sampled_from(["savepoint", "block", "independent"]), st.booleans(), inner)
        | st.tuples(st.just("gather"), st.just(False), st.lists(inner, min_size=2, max_size=3)),
        max_size=5,
    ),
    max_leaves=12,
)


class Run:
    """Runs a program in tasks, which find their unit by the context, and the model by hand."""

    def __init__(self) -> None:
        self.world = World()
        self.count = 0

    async def steps(self, steps: list[Step], buffer: Buffer) -> None:
        for step in steps:
            match step:
                case "enqueue":
                    self.count += 1
                    expected = self.world.enqueue(self.count, buffer)
                    error = what_is_raised(partial(enqueue_event, self.count, "x"))
                    assert is_as_expected(error, expected), error
                case "wait":
                    await asyncio.sleep(0)
                case "publish":
                    self.world.publish(buffer)
                    await publish_async()
                case "clear":
                    self.world.clear(buffer)
                    clear_events()
                case ("gather", _, [*together]):
                    await asyncio.gather(*(self.steps(one, buffer) for one in together))
                case (str() as kind, bool() as fails, [*inside]):
                    await self.block(kind, fails, inside, buffer)
            assert names(EventCollector.current().events) == buffer.events

    async def block(self, kind: str, fails: bool, inside: list[Step], buffer: Buffer) -> None:
        if kind == "savepoint":
            own = buffer.child("savepoint")
        elif kind == "block":
            own = buffer.child("joined block")
        else:
            own = Buffer("block")
        try:
            if kind == "savepoint":
                with EventCollector.current().savepoint():
                    await self.inside(own, fails, inside)
            elif kind == "block":
                async with auto_publishing():
                    await self.inside(own, fails, inside)
            else:
                async with auto_publishing(independent=True):
                    await self.inside(own, fails, inside)
        except Boom:
            assert fails

    async def inside(self, own: Buffer, fails: bool, inside: list[Step]) -> None:
        await self.steps(inside, own)
        self.world.end(own, not fails)
        if fails:
            raise Boom


@given(programs)
def test_concurrent_tasks_publish_what_the_model_does(program: list[Step]) -> None:
    async def main() -> None:
        outer = Buffer("block")
        async with auto_publishing():
            await run.steps(program, outer)
            run.world.end(outer, success=True)

    run = Run()
    with quiet(), recorded("the model") as collected:
        asyncio.run(main())
        assert names(collected.published) == run.world.published
        assert names(collected.cleared) == run.world.cleared
        assert collected.pending == ()
