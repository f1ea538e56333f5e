"""Decides which tick is next: late ones are made up for a minute, what is older was missed."""

from __future__ import annotations

import datetime

from outbox.recurring.schedules import Schedule

__all__ = ["GRACE", "is_far_ahead", "next_tick"]

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
    if planned >= now - GRACE:
        return planned
    recent = schedule.next_after(now - GRACE)
    if recent <= now or not catch_up:
        return recent
    return _last_until(schedule, planned, now)


def is_far_ahead(schedule: Schedule, planned: datetime.datetime, now: datetime.datetime) -> bool:
    """Return whether times would be left out that are to come: some clock is or was wrong.

    Which one can't be known, so nothing is done about it: counting from now, a clock that is behind
    would call for times that another worker has called for.
    """
    return planned > now + _AHEAD and planned > schedule.next_after(now + _AHEAD)


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
