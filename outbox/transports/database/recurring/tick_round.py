"""One look at the recurring tasks of a worker, in one transaction.

All workers compete for each tick: the one whose update finds the row as it was read writes the
event in the same transaction. So no worker leads, and none is waited for.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from outbox.messages.rows import values_of
from outbox.recurring.due import next_tick
from outbox.recurring.recurring_task import RecurringTask
from outbox.storage import tick_statements as ticks
from outbox.storage.store import Store
from outbox.storage.tick_statements import TickRow

__all__ = ["LOOK_EVERY", "TickRound", "leave"]

LOOK_EVERY = 10.0
"""Seconds between two looks, which note that the worker is there, if nothing is due before."""

_SEEN_EVERY = datetime.timedelta(seconds=LOOK_EVERY)
_GONE_AFTER = 3 * _SEEN_EVERY
"""The time without a sign of workers with another schedule, after which they have left."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class TickRound:
    """A look, and what came of it.

    Attributes:
        pause: the seconds until the next look.
        has_published: whether a call was published.
        to_log: lines for the log, to be written when the transaction has ended.
    """

    def __init__(self, store: Store, tasks: Sequence[RecurringTask]) -> None:
        """Look at ``tasks``, whose events ``store`` takes."""
        self._store = store
        self._tasks = tasks
        self.pause = LOOK_EVERY
        self.has_published = False
        self.to_log: list[tuple[int, str, tuple[Any, ...]]] = []

    def run(self, connection: Connection) -> None:
        """Do what is due by the database's clock, in the transaction of ``connection``."""
        now = ticks.clock(connection)
        queues = {task.queue for task in self._tasks}
        rows = {queue: ticks.rows(connection, queue) for queue in sorted(queues)}
        for task in self._tasks:
            row = rows[task.queue].get(task.name)
            next_at: datetime.datetime | None
            if row is None:
                next_at = self._add(connection, task, now)
            elif row.schedule != task.schedule.text:
                next_at = self._take(connection, task, row, now)
            else:
                next_at = self._look(connection, task, row, now)
            if next_at is not None:
                self.pause = min(self.pause, max(0.0, (next_at - now).total_seconds()))

    def _add(
        self, connection: Connection, task: RecurringTask, now: datetime.datetime
    ) -> datetime.datetime:
        next_at = task.schedule.next_after(now)
        try:
            with connection.begin_nested():
                ticks.add(connection, task.queue, task.name, task.schedule.text, next_at, now)
        except IntegrityError:  # another worker has, at the same time
            return now
        return next_at

    def _take(
        self, connection: Connection, task: RecurringTask, row: TickRow, now: datetime.datetime
    ) -> datetime.datetime | None:
        """Have the task's schedule count, unless workers with another one are there."""
        if now - row.seen_at < _GONE_AFTER:
            return None
        next_at = task.schedule.next_after(now)
        if ticks.advance(connection, task.queue, row, task.schedule.text, next_at, now):
            self._log(
                logging.INFO,
                "the recurring task %r has another schedule now: %s in place of %s; its next time "
                "is %s",
                task.name,
                task.schedule.text,
                row.schedule[:300],
                next_at.isoformat(),
            )
        return next_at

    def _look(
        self, connection: Connection, task: RecurringTask, row: TickRow, now: datetime.datetime
    ) -> datetime.datetime:
        schedule = task.schedule
        tick = next_tick(schedule, row.next_at, now, catch_up=task.catch_up)
        if tick != row.next_at:
            self._log(
                logging.WARNING,
                "the recurring task %r goes on with the time %s: no worker ran at %s",
                task.name,
                tick.isoformat(),
                row.next_at.isoformat(),
            )
        if tick > now:
            if tick != row.next_at:
                ticks.advance(connection, task.queue, row, schedule.text, tick, now)
            elif now - row.seen_at >= _SEEN_EVERY:
                ticks.see(connection, task.queue, row, now)
            return tick
        following = schedule.next_after(tick)
        skips = task.skips and self._runs(connection, task, row.last_at)
        done = None if skips else tick
        if not ticks.advance(connection, task.queue, row, schedule.text, following, now, tick=done):
            return now  # another worker has; look again
        if skips:
            self._log(
                logging.INFO,
                "the recurring task %r is not called for %s: its last call has not ended",
                task.name,
                tick.isoformat(),
            )
        else:
            event = task.event(tick)
            row_of_event = values_of(event, queue=task.queue, rank=event.priority or 0)
            self._store.put_rows([row_of_event], connection=connection)
            self.has_published = True
            self._log(logging.DEBUG, "called the recurring task %r, event %s", task.name, event.id)
        return following

    def _runs(
        self, connection: Connection, task: RecurringTask, last_at: datetime.datetime | None
    ) -> bool:
        if last_at is None:
            return False
        return ticks.has_event(connection, task.queue, task.event(last_at).id)

    def _log(self, level: int, message: str, *arguments: Any) -> None:
        self.to_log.append((level, message, arguments))


def leave(connection: Connection, tasks: Sequence[RecurringTask]) -> None:
    """Note that a worker leaves: unless others with its schedules are there, others may count."""
    for task in tasks:
        row = ticks.rows(connection, task.queue).get(task.name)
        if row is not None and row.schedule == task.schedule.text:
            ticks.see(connection, task.queue, row, _EPOCH)
