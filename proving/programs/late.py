"""Events that threads and tasks enqueue at about the moment when their unit of work ends."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time

from outbox import OutboxError
from proving.history import Journal
from proving.programs.unit import Unit, does

__all__ = ["in_late_task", "in_late_thread"]

_WAIT = 0.006  # seconds at most before the event
_SHARE = 0.3  # of the units
_tasks: set[asyncio.Task[None]] = set()  # the loop itself doesn't keep them


def in_late_thread(history: Journal, unit: Unit, chance: random.Random, *, succeeds: bool) -> None:
    """Let a thread enqueue one more event of the present unit of work, in some units.

    Args:
        history: the journal of this process.
        unit: the unit that is open here.
        chance: the source of randomness.
        succeeds: whether the unit will succeed.
    """
    if not _wants(chance):
        return
    wait = chance.random() * _WAIT
    late = _late(history, unit)

    def outlive() -> None:
        time.sleep(wait)
        _enqueue(late, succeeds)

    threading.Thread(target=contextvars.copy_context().run, args=(outlive,)).start()


def in_late_task(history: Journal, unit: Unit, chance: random.Random, *, succeeds: bool) -> None:
    """Let a task enqueue one more event of the present unit of work, in some units."""
    if not _wants(chance):
        return
    wait = chance.random() * _WAIT
    late = _late(history, unit)

    async def outlive() -> None:
        await asyncio.sleep(wait)
        _enqueue(late, succeeds)

    task = asyncio.get_running_loop().create_task(outlive())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _wants(chance: random.Random) -> bool:
    return does("late") and chance.random() < _SHARE


def _late(history: Journal, unit: Unit) -> Unit:
    name = f"{unit.name.partition('/')[2]}/late"
    return Unit(history, name, random.Random(name))


def _enqueue(late: Unit, succeeds: bool) -> None:
    """Enqueue the event: what is accepted shares the fate of its unit, and nothing else comes."""
    [draft] = late.draft(1)
    try:
        draft.enqueue()
    except OutboxError:
        late.roll_back()
    else:
        (late.commit if succeeds else late.roll_back)()
