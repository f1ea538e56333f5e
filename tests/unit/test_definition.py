"""Consumers that are refused, or warned of, where they are defined."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import pytest

from outbox import Publisher, UsageError
from outbox.consumers import Consumer, ReceivedEvent, Worker, consumer
from outbox.testing import CollectedEvents


async def handle(prefix: str, event: ReceivedEvent) -> None:
    seen.append(f"{prefix}{event.payload}")


seen: list[str] = []


class Handler:
    async def __call__(self, event: ReceivedEvent) -> None:
        seen.append(f"object {event.payload}")


def test_partials_and_callable_objects_are_consumers(collected_events: CollectedEvents) -> None:
    seen.clear()
    partial = consumer("partial")(functools.partial(functools.partial(handle), "partial "))
    called = consumer("called")(Handler())
    plain = consumer("plain")(functools.partial(lambda event, n: seen.append(n), n="plain"))

    class Partial(Consumer):
        queue = "method"
        process = functools.partialmethod(handle_method, "method ")

    for each in (partial, called, Partial):
        assert each.is_async, each
    assert not plain.is_async
    assert repr(partial) == "<consumer handle of 'partial'>"
    for each in (partial, called, plain, Partial):
        assert collected_events.perform(each, 1).acked
    assert seen == ["partial 1", "object 1", "plain", "method 1"]


async def handle_method(self: Consumer, prefix: str, event: ReceivedEvent) -> None:
    await handle(prefix, event)


def generator(event: ReceivedEvent) -> Iterator[None]:
    yield


async def asynchronous_generator(event: ReceivedEvent) -> AsyncIterator[None]:
    yield


def plain(event: ReceivedEvent) -> None:
    pass


def a_class(**attributes: Any) -> Callable[[], object]:
    return lambda: type("Work", (Consumer,), attributes)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: consumer(plain), r"plain: @consumer needs the name of a queue: @consumer\('name'"),  # type: ignore[arg-type]
        (lambda: consumer("")(plain), "plain names no queue"),
        (lambda: consumer("q")(Handler), "Handler is a class: derive it from Consumer"),  # type: ignore[arg-type]
        (lambda: consumer("q")(17), "@consumer needs a function, not 17"),  # type: ignore[arg-type]
        (lambda: consumer("q")(generator), r"process\(\) has a yield"),
        (lambda: consumer("q")(asynchronous_generator), r"process\(\) has a yield"),
        (a_class(queue="q", process=generator), r"Work: process\(\) has a yield"),
        (a_class(queue="q", topic="order.*"), "topic is not an attribute of consumers; set topics"),
        (a_class(queue="q", auto_publish="no"), "auto_publish is 'no', not a bool"),
        (a_class(queue="q", is_async=True), "is_async can't be set"),
        (a_class(queue="q", filters=["x"]), "filters can't be set"),
    ],
)
def test_what_would_be_wrong_for_every_message_is_refused(
    make: Callable[[], object], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        make()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("timeouts", 30, "timeout"),
        ("Queue", "jobs", "queue"),
        ("max_prioritys", 3, "max_priority"),
        ("on_sucess", lambda self, event: None, "on_success"),
    ],
)
def test_a_misspelled_attribute_is_warned_of_at_the_class(
    name: str, value: object, meant: str
) -> None:
    with pytest.warns(UserWarning, match=f"{name} is not an attribute.*{meant}\\?") as caught:

        class Work(Consumer):
            vars()[name] = value

    assert caught[0].filename == __file__


def test_attributes_of_the_applications_are_its_own_business() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Work(Consumer):
            queue = "work"
            queue_name = "x"
            template: ClassVar[str] = "y"
            retries_left: ClassVar[int] = 3

            def processed(self) -> None:
                pass

            def on_error(self) -> None:
                pass


class Sized(Consumer):
    queue = "sized"

    def __init__(self, size: int) -> None:
        self.size = size

    def process(self, event: ReceivedEvent) -> None:
        pass


class SetsTopics(Consumer):
    queue = "sets"

    def __init__(self) -> None:
        self.topics = "order.*"  # type: ignore[misc]

    def process(self, event: ReceivedEvent) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Sized, "Sized takes arguments: make an instance"),
        ("jobs", "'jobs' is not a consumer"),
        (Handler, "Handler'> is not a consumer"),
        (SetsTopics, "topics are 'order.*', not a list"),
    ],
)
def test_a_worker_refuses_what_is_not_a_consumer_yet(given: Any, expected: str) -> None:
    with Publisher("memory://") as publisher, pytest.raises(UsageError) as raised:
        Worker([given], publisher=publisher)
    assert expected in str(raised.value)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction")
def test_a_function_that_is_marked_as_a_coroutine_function_is_one() -> None:
    import inspect

    marked = inspect.markcoroutinefunction(plain)  # type: ignore[attr-defined]
    assert consumer("q")(marked).is_async
