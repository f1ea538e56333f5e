"""A module with fifty recurring tasks, none of which is due soon."""

from __future__ import annotations

import types

from outbox.tasks import task

__all__: list[str] = []


def daily() -> None:
    """Do nothing."""


for _number in range(50):
    _function = types.FunctionType(daily.__code__, globals(), f"daily_{_number}")
    _function.__qualname__ = _function.__name__
    globals()[_function.__name__] = task(every=86_400)(_function)
