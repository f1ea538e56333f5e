"""Which exception decides about a message, however it was raised."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

import outbox.consumers
from outbox import ConnectionLost, Publisher, PublishFailed, PublishReport
from outbox.consumers import (
    Consumer,
    ReceivedEvent,
    Reject,
    Requeue,
    Retry,
    RetryPolicy,
    consumer,
)
from outbox.consumers.message.databases import is_unavailable
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import Again, Dead, Hold, Outcome, Return
from outbox.consumers.raised import leaves
from outbox.messages.delivery import as_delivered
from outbox.testing import CollectedEvents
from tests.places import events_for

FILE = Path(__file__).name
ENGINE = Path(outbox.consumers.__file__).parent


@pytest.fixture
def locked(tmp_path: Path) -> BaseException:
    """The error of a database that another connection has locked."""
    path = tmp_path / "shop.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError) as raised:
                other.execute("CREATE TABLE t (a)")
    return raised.value


def outcome_of(
    collected_events: CollectedEvents, error: BaseException, retry: RetryPolicy | None = None
) -> Outcome:
    """Return the outcome of a message whose handler raises ``error``."""

    @consumer("q", retry=retry)
    def raises(event: ReceivedEvent) -> None:
        raise error

    return collected_events.perform(raises, {}, raise_errors=False).outcome


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("unhandled errors in a TaskGroup", errors)


def unavailable() -> PublishFailed:
    """Return what ``publish()`` raises in a handler while the broker is unavailable."""
    error = PublishFailed(PublishReport(published=(), error=ConnectionLost("gone")))
    error.is_of_message = True
    return error


ALWAYS = RetryPolicy(max_attempts=2, delay=7)


def test_outcomes_are_found_in_groups_however_deep(
    collected_events: CollectedEvents, locked: Exception
) -> None:
    def outcome(error: Exception) -> Outcome:
        return outcome_of(collected_events, group(group(error)))

    rejected = outcome(Reject("no such order"))
    assert isinstance(rejected, Dead)
    assert rejected.reason == "no such order"
    retried = outcome(Retry(delay=30))
    assert isinstance(retried, Again)
    assert retried.delay == 30
    assert outcome(Requeue()) == Return()
    for error in (locked, unavailable()):
        held = outcome(error)
        assert isinstance(held, Hold)
        assert held.error is error
    failed = outcome(ValueError("wrong"))
    assert isinstance(failed, Dead)
    assert failed.reason == "ValueError: wrong"


@pytest.mark.parametrize("turn", [list, reversed])
def test_of_a_group_the_worst_member_decides(
    collected_events: CollectedEvents, locked: Exception, turn: Callable[[Any], Any]
) -> None:
    def outcome(*errors: Exception, retry: RetryPolicy | None = ALWAYS) -> Outcome:
        return outcome_of(collected_events, group(*turn(errors)), retry)

    # A message that can never be handled isn't tried again, whatever else went wrong.
    everything = outcome(Reject("never"), ValueError(), Retry(delay=1), locked, Requeue())
    assert isinstance(everything, Dead)
    assert everything.reason == "never"
    # Holding and requeueing have no bound: a failure beside them counts.
    for other in (locked, unavailable(), Requeue()):
        again = outcome(ValueError(), other)
        assert isinstance(again, Again)
        assert again.delay == 7
        dead = outcome(KeyError("key"), other, retry=None)
        assert isinstance(dead, Dead)
        assert dead.reason == "KeyError: 'key'"
        assert isinstance(outcome(other, Retry(), retry=None), Again)
    assert isinstance(outcome(locked, Requeue()), Hold)
    # A failure that is not retried beats one that is; otherwise the longest delay counts.
    picky = RetryPolicy(on=(OSError,), give_up_on=(FileNotFoundError,), delay=7)
    for final in (ValueError("x"), FileNotFoundError("x")):
        dead = outcome(OSError(), Retry(delay=1), final, retry=picky)
        assert isinstance(dead, Dead)
        assert dead.reason == f"{type(final).__name__}: x"
    longest = outcome(Retry(delay=1), OSError(), Retry(delay=50), retry=picky)
    assert isinstance(longest, Again)
    assert longest.delay == 50
    # An unavailable database isn't a failure: that the policy doesn't name its error is no matter.
    assert isinstance(outcome(OSError(), locked, Requeue(), retry=picky), Again)


def test_a_policy_looks_into_groups() -> None:
    policy = RetryPolicy(on=(OSError,), give_up_on=(FileNotFoundError,), delay=3)
    assert policy.delay_after(group(ConnectionError(), group(OSError())), 1) == 3
    assert policy.delay_after(group(ConnectionError(), ValueError()), 1) is None
    assert policy.delay_after(group(ConnectionError(), group(FileNotFoundError())), 1) is None
    assert policy.delay_after(group(ConnectionError(), Retry(delay=9)), 1) == 9
    assert RetryPolicy(delay=3).delay_after(group(KeyError()), 1) == 3


class Unfinished(ExceptionGroup[Exception]):
    """A group that the application raises itself."""


def test_a_group_whose_class_a_policy_names_counts_as_a_whole(
    collected_events: CollectedEvents,
) -> None:
    error = Unfinished("order 17", [KeyError(), ValueError()])
    retried = outcome_of(collected_events, error, RetryPolicy(on=(Unfinished,), delay=3))
    assert isinstance(retried, Again)
    assert retried.delay == 3
    given_up = outcome_of(collected_events, error, RetryPolicy(give_up_on=(Unfinished,)))
    assert isinstance(given_up, Dead)
    assert given_up.reason.startswith("Unfinished: order 17")
    assert isinstance(outcome_of(collected_events, error, RetryPolicy(delay=3)), Again)


def test_the_dead_letter_of_a_group_names_the_member_and_shows_the_whole_group(
    collected_events: CollectedEvents,
) -> None:
    errors = group(OSError("busy"), KeyError("order"))
    outcome_of(collected_events, errors, RetryPolicy(on=(OSError,)))
    headers = collected_events.assert_published("q.dead").headers
    assert headers["outbox-dead-reason"] == "KeyError: 'order'"
    assert headers["outbox-dead-error"] == "KeyError"
    assert "OSError: busy" in headers["outbox-dead-traceback"]
    assert "ExceptionGroup: unhandled errors" in headers["outbox-dead-traceback"]


def test_what_an_exception_was_raised_from_decides_only_about_availability(
    collected_events: CollectedEvents, locked: Exception
) -> None:
    class OrderFailed(Exception):
        pass

    def outcome(cause: BaseException) -> Outcome:
        error = OrderFailed("17")
        error.__cause__ = cause
        return outcome_of(collected_events, error)

    # Libraries and services wrap what a database or the broker raises ...
    for cause in (locked, unavailable(), group(locked, group(locked))):
        assert isinstance(outcome(cause), Hold), cause
    # ... but whoever raises another exception from a Reject means that one.
    for cause in (Reject("no"), Requeue(), Retry(), group(locked, ValueError())):
        dead = outcome(cause)
        assert isinstance(dead, Dead)
        assert dead.reason.endswith("OrderFailed: 17")


def test_an_unavailable_database_is_seen_in_a_cause_that_is_a_group(locked: Exception) -> None:
    error = RuntimeError("cannot save")
    error.__cause__ = group(locked)
    assert is_unavailable(error)
    error.__cause__ = group(locked, KeyError())
    assert not is_unavailable(error)
    error.__cause__ = error
    assert not is_unavailable(error)


def test_stop_iteration_is_itself(collected_events: CollectedEvents) -> None:
    policy = RetryPolicy(on=(StopIteration, StopAsyncIteration), delay=7)

    class Plain(Consumer):
        queue = "q"
        retry: ClassVar[RetryPolicy | None] = policy

        def process(self, event: ReceivedEvent) -> None:
            next(iter(()))

    class Coroutine(Consumer):
        queue = "q"
        retry: ClassVar[RetryPolicy | None] = policy

        async def process(self, event: ReceivedEvent) -> None:
            next(iter(()))

    class Grouped(Consumer):
        queue = "q"
        retry: ClassVar[RetryPolicy | None] = policy

        async def process(self, event: ReceivedEvent) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.fetch())

        async def fetch(self) -> None:
            raise StopAsyncIteration

    for kind in (Plain, Coroutine, Grouped):
        outcome = collected_events.perform(kind, {}, raise_errors=False).outcome
        assert isinstance(outcome, Again), kind
        assert outcome.delay == 7
        assert isinstance(leaves(outcome.error)[0], StopIteration | StopAsyncIteration)
    own = RuntimeError("my generator raised StopIteration")  # not Python's: it has no such cause
    assert leaves(own) == [own]


def test_a_group_is_taken_apart_however_deep_it_is() -> None:
    error: Exception = KeyError("innermost")
    for _ in range(5_000):
        error = group(error)
    assert [repr(leaf) for leaf in leaves(error)] == ["KeyError('innermost')"]


def test_a_cancelled_task_in_a_group_decides_nothing(collected_events: CollectedEvents) -> None:
    cancelled = BaseExceptionGroup("tasks", [asyncio.CancelledError(), Requeue()])
    assert outcome_of(collected_events, cancelled) == Return()
    alone = outcome_of(collected_events, BaseExceptionGroup("tasks", [asyncio.CancelledError()]))
    assert isinstance(alone, Dead)
    assert "CancelledError" in alone.reason


def test_bare_base_exceptions_in_a_group_are_failures(collected_events: CollectedEvents) -> None:
    interrupted = BaseExceptionGroup("tasks", [KeyboardInterrupt(), Requeue()])
    outcome = outcome_of(collected_events, interrupted, RetryPolicy(delay=7))
    assert isinstance(outcome, Again)
    exits = BaseExceptionGroup("tasks", [SystemExit(2)])
    dead = outcome_of(collected_events, exits)
    assert isinstance(dead, Dead)
    assert dead.reason == "SystemExit: 2"


def test_tracebacks_begin_at_the_applications_code(collected_events: CollectedEvents) -> None:
    class Prices(Consumer):
        queue = "prices"
        seen: ClassVar[list[BaseException]] = []

        def process(self, event: ReceivedEvent) -> None:
            try:
                self.fetch()
            except KeyError as error:
                raise ValueError("no price") from error

        def fetch(self) -> None:
            raise KeyError("price")

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            self.seen.append(error)

    collected_events.perform(Prices, {}, raise_errors=False)
    traceback = collected_events.assert_published("prices.dead").headers["outbox-dead-traceback"]
    files = [Path(line.split('"')[1]) for line in traceback.splitlines() if "  File " in line]
    assert [file.name for file in files].count(FILE) == 3
    assert not [file for file in files if file.is_relative_to(ENGINE)]
    [error] = Prices.seen
    entry = error.__traceback__
    while entry is not None:
        assert Path(entry.tb_frame.f_code.co_filename).name == FILE
        entry = entry.tb_next


def test_a_coroutine_that_a_plain_consumer_returns_is_a_failure_with_a_remedy(
    collected_events: CollectedEvents, caplog: pytest.LogCaptureFixture
) -> None:
    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments)

    class Behind(Consumer):
        queue = "behind"

        @plain
        async def process(self, event: ReceivedEvent) -> None:
            pass

    outcome = collected_events.perform(Behind, {}, raise_errors=False).outcome
    assert isinstance(outcome, Dead)
    assert outcome.reason.startswith("TypeError: process() returned 'coroutine', which nothing")
    assert "`async def`" in outcome.reason

    class Callbacks(Consumer):
        queue = "callbacks"

        def process(self, event: ReceivedEvent) -> None:
            pass

        @plain
        async def on_success(self, event: ReceivedEvent) -> None:
            pass

    assert collected_events.perform(Callbacks, {}).acked
    assert "which nothing awaits" in caplog.text


def test_each_attempt_and_each_callback_gets_the_event_as_it_was_sent(
    collected_events: CollectedEvents,
) -> None:
    seen = []

    def take(event: ReceivedEvent) -> None:
        headers = cast("dict[str, Any]", event.headers)
        seen.append((event.payload.pop("order"), headers.pop("tenant")["name"]))
        event.payload["lines"].append("changed")
        assert event.payload["lines"] == ["a", "changed"]

    class Orders(Consumer):
        queue = "orders"
        retry: ClassVar[RetryPolicy | None] = RetryPolicy(max_attempts=2, delay=1)

        def process(self, event: ReceivedEvent) -> None:
            take(event)
            raise OSError("printer")

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            take(event)

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            take(event)

    payload = {"order": 17, "lines": ["a"]}
    headers = {"tenant": {"name": "acme"}}
    collected_events.perform(Orders, payload, headers=headers, raise_errors=False)
    collected_events.deliver_all(Orders, raise_errors=False)
    assert seen == [(17, "acme")] * 5
    letter = collected_events.assert_published("orders.dead")
    assert letter.payload == payload
    assert letter.headers["tenant"] == {"name": "acme"}


def test_a_coroutine_that_blocks_the_loop_beyond_its_timeout_has_timed_out(
    collected_events: CollectedEvents,
) -> None:
    class Blocks(Consumer):
        queue = "blocks"
        timeout = 0.05
        ends: ClassVar[list[str]] = []

        async def process(self, event: ReceivedEvent) -> None:
            time.sleep(0.1)  # noqa: ASYNC251
            if event.payload == "fails":
                raise KeyError("late")

        def on_timeout(self, event: ReceivedEvent) -> None:
            self.ends.append(event.payload)

    for how in ("returns", "fails"):
        outcome = collected_events.perform(Blocks, how, raise_errors=False).outcome
        assert isinstance(outcome, Dead)
        assert outcome.reason == "ProcessTimeout: it took more than 0.05 s"
    assert Blocks.ends == ["returns", "fails"]


def test_in_a_test_the_exit_of_a_handlers_task_is_a_failed_attempt_too(
    collected_events: CollectedEvents,
) -> None:
    class Imports(Consumer):
        queue = "imports"

        async def process(self, event: ReceivedEvent) -> None:
            if event.payload == "group":
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.parse())
            else:
                await asyncio.gather(self.parse())

        async def parse(self) -> None:
            await asyncio.sleep(0)
            sys.exit("wrong arguments")

    for payload in ("group", "gather"):
        outcome = collected_events.perform(Imports, payload, raise_errors=False).outcome
        assert isinstance(outcome, Dead)
        assert outcome.reason == "SystemExit: wrong arguments"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_a_bare_base_exception_does_not_end_a_subprocess(error: BaseException) -> None:
    @consumer("q")
    def raises(event: ReceivedEvent) -> None:
        raise error

    with Publisher("memory://") as publisher:
        [event] = events_for(publisher, ["q"])
        engine = InlineEngine(publisher)
        message = Message(raises, as_delivered(event, "q", 1), engine)
        outcome = contextvars.Context().run(engine.conclude, message)
    assert isinstance(outcome, Dead)
    assert outcome.reason == f"HandlerExit: the handler raised {type(error).__name__}"
