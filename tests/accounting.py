"""A module of tasks whose results are kept."""

from __future__ import annotations

import datetime
import decimal
import threading
from typing import Any

from sqlalchemy.orm import Session

from outbox.consumers import Reject, RetryPolicy
from outbox.tasks import current_task, task
from tests.databases import Effect

__all__ = [
    "add",
    "add_async",
    "began",
    "big",
    "book",
    "book_once",
    "book_together",
    "both",
    "fails",
    "forgets",
    "hold",
    "may_end",
    "months",
    "nothing",
    "odd",
    "refuses",
    "runs",
    "secret",
    "slow",
    "twice",
]

runs: list[Any] = []
"""What the tasks have noted."""
began, may_end = threading.Event(), threading.Event()
"""Set by ``hold`` when it begins, and waited for before it ends."""

both = threading.Barrier(2)
"""Passed by two attempts of ``book_together`` at once."""


@task
def add(a: int, b: int) -> int:
    runs.append(("add", a, b))
    return a + b


@task
async def add_async(a: int, b: int) -> int:
    return a + b


@task
def nothing() -> None:
    runs.append("nothing")


@task
def months(year: int) -> dict[datetime.date, decimal.Decimal]:
    return {datetime.date(year, 1, 1): decimal.Decimal("1.50")}


@task
def fails(text: str) -> None:
    held = " ".join(("held", "in", "a", "variable"))
    raise ValueError(f"{text}{held[:0]}")


@task(hide_errors=True)
def secret(text: str) -> None:
    raise ValueError(text)


@task
def refuses() -> None:
    raise Reject("not wanted")


@task
def odd() -> object:
    runs.append("odd")
    return object()


@task
def big() -> str:
    return "x" * (1 << 20)


@task(keep_result=False)
def forgets() -> int:
    return 1


@task(retry=RetryPolicy(max_attempts=2, delay=2))
def twice() -> int:
    run = current_task()
    assert run is not None
    runs.append(("twice", run.attempt))
    if run.attempt == 1:
        raise LookupError("once more")
    return run.attempt


@task
def hold() -> str:
    runs.append("held")
    began.set()
    may_end.wait(20)
    return "held"


@task(timeout=0.3)
def slow() -> str:
    began.set()
    may_end.wait(20)
    return "too late"


@task
def book(text: str, value: Any = 1, *, session: Session | None = None) -> Any:
    assert session is not None
    session.add(Effect(of=text))
    if value == "object":
        return object()
    return value


@task(deduplicate=True)
def book_once(text: str) -> str:
    runs.append(text)
    return text


@task(deduplicate=True)
def book_together(of: str, session: Session | None = None) -> str:
    assert session is not None
    both.wait(10)
    session.add(Effect(of=of))
    return of
