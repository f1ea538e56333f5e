"""A module with a task that runs each call only once."""

from __future__ import annotations

from outbox.tasks import task

__all__ = ["count", "counted"]

counted: list[int] = []


@task(deduplicate=True)
def count(number: int) -> None:
    counted.append(number)
