"""Decides which tick is next: late ones are made up for a minute, what is older was missed."""

from __future__ import annotations

import datetime

from outbox.recurring.schedules import Schedule

__all__ = ["GRACE", "next_tick"]

GRACE = datetime.timedelta(seconds=60)
"""How late a tick may be: the time in which another worker takes over, or a service restarts."""

_AHEAD = datetime.timedelta(hours=1)
_WINDOWS = tuple(
    datetime.timedelta(**span)
    for span in ({"minutes": 1}, {"hours": 1}, {"days": 1}, {"days": 32}, {"days": 367})
)


def next_tick(
    schedule: Schedule, planned: datetime.datetime, now: datetime.datetime, *, catch_up: bool
) -> datetime.datetime:
    """Return the time of the next tick, which is due if it isn't after ``now``.

    Args:
        schedule: the schedule.
        planned: the time that follows the last tick.
        now: the present time.
        catch_up: whether one tick is made up for all that were missed.
    """
    if planned > now + _AHEAD and planned > schedule.next_after(now + _AHEAD):
        # A worker's clock was wrong: by its time the task would not run for years.
        return schedule.next_after(now)
    if planned >= now - GRACE:
        return planned
    recent = schedule.next_after(now - GRACE)
    if recent <= now or not catch_up:
        return recent
    return _last_until(schedule, planned, now)


def _last_until(
    schedule: Schedule, planned: datetime.datetime, now: datetime.datetime
) -> datetime.datetime:
    """Return the last time that isn't after ``now``, nor before ``planned``, which is one."""
    last = planned
    # The shortest span with a time in it: so only few have to be counted, however many there were.
    for window in _WINDOWS:
        first = schedule.next_after(now - window)
        if first <= now:
            last = max(planned, first)
            break
    while (following := schedule.next_after(last)) <= now:
        last = following
    return last
