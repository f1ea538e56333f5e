"""Tasks of Django's own."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from django.tasks import TaskContext, task

from tests.django.shop.models import Order, noted

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = ["count", "doze", "fail", "log", "now", "returns", "send", "wait"]


@task
def send(address: str, amount: Decimal | None = None, *, options: Any = None) -> str:
    noted.append((address, amount, options))
    return f"sent to {address}"


@task(queue_name="mails")
def log(*args: Any, **kwargs: Any) -> None:
    noted.append((args, kwargs))


@task(takes_context=True)
def count(context: TaskContext, step: int) -> int:
    noted.append((context.attempt, context.task_result.id, step))
    attempt: int = context.attempt
    return attempt + step


@task
def fail(text: str) -> None:
    Order.objects.create(number=1)
    raise LookupError(text)


@task
def returns() -> object:
    return object()


@task
def doze(seconds: float) -> None:
    time.sleep(seconds)
    noted.append("awake")


@task(takes_context=True)
async def wait(context: TaskContext, seconds: float, fails: bool = False) -> dict[int, str]:
    await asyncio.sleep(seconds)
    noted.append(context.task_result.id)
    if fails:
        raise LookupError("no time")
    return {1: "slept"}


@task(backend="now")
def now(text: str) -> None:
    noted.append(text)
