"""Steps with what a framework needs around them."""

from __future__ import annotations

from typing import Any, TypeVar

from outbox.consumers.message.steps import Call, Steps
from outbox.surroundings import Surroundings

__all__ = ["surrounded", "taken"]

T = TypeVar("T")


def surrounded(surroundings: Surroundings, steps: Steps[T]) -> Steps[T]:
    """Take ``steps`` inside a new context manager, entered and left where the handler runs.

    It can't swallow an exception, but it may raise one after steps that have succeeded.
    """
    manager = surroundings()
    yield Call(manager.__enter__)
    try:
        result = yield from steps
    except GeneratorExit:  # the steps were closed: no further one can be taken
        raise
    except BaseException as error:
        yield Call(manager.__exit__, (type(error), error, error.__traceback__))
        raise
    yield Call(manager.__exit__, (None, None, None))
    return result


def taken(step: Call) -> Steps[Any]:
    """Return a single step as steps."""
    return (yield step)
