"""Schedules: the times of a recurring task, as aware datetimes in UTC.

Times are compared in UTC: Python compares two datetimes of one zone by their wall clocks, which
show some times twice on the night on which the clock goes back.
"""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any, Protocol

from outbox.errors import MissingExtra, UsageError

__all__ = ["CronSchedule", "EverySchedule", "Schedule", "schedule_of"]

_UTC = datetime.UTC
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=_UTC)
_LEAST = datetime.timedelta(seconds=1)
_MOST = datetime.timedelta(days=3660)

_NAMED = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


class Schedule(Protocol):
    """The times at which a task runs.

    Attributes:
        text: what distinguishes it from other schedules; of one version of outbox to the next the
            same.
        zone: the time zone in which its times are shown.
    """

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def zone(self) -> datetime.tzinfo: ...  # noqa: D102

    def next_after(self, moment: datetime.datetime) -> datetime.datetime:
        """Return the first time after ``moment``, both aware; the result is in UTC."""
        ...


class EverySchedule:
    """Multiples of an interval since the Unix epoch, so that all workers agree. Immutable."""

    zone = _UTC

    def __init__(self, interval: datetime.timedelta) -> None:
        """Take an interval of at least a second."""
        self._interval = interval
        self.text = f"every {interval.total_seconds():.6f}".rstrip("0").rstrip(".") + " s"

    def next_after(self, moment: datetime.datetime) -> datetime.datetime:
        """Return the first time after ``moment``."""
        return _EPOCH + ((moment - _EPOCH) // self._interval + 1) * self._interval


class CronSchedule:
    """The times of a cron expression in a time zone. Immutable.

    As in Debian's cron, a fixed time that the clock leaves out is replaced by the first moment
    after, and one that comes twice counts the first time. An hour of ``*`` or ``*/n`` follows
    elapsed time.
    """

    def __init__(self, expression: str, zone_name: str) -> None:
        """Parse a cron expression of five fields, or a name such as ``@daily``.

        Raises:
            ValueError: it isn't one, or never comes; the text says why.
            MissingExtra: cronsim is not installed.
        """
        try:
            from cronsim import CronSim, CronSimError
        except ImportError as missing:
            raise MissingExtra(
                "cron= needs cronsim: pip install 'outbox-events[tasks]'; every= needs nothing"
            ) from missing
        self.zone = _zone(zone_name)
        fields = _NAMED.get(expression.strip().lower(), expression).split()
        if len(fields) != 5:
            raise ValueError(
                "it has not five fields (minute, hour, day of month, month, day of week)"
            )
        self.text = f"{' '.join(fields).upper()} {zone_name}"
        minute, hour = fields[:2]
        if minute.startswith("*") and not hour.startswith("*"):
            # cronsim takes the minutes of fixed hours for elapsed time as well if they are "*".
            fields[0] = f"0-59{minute[1:]}"
        self._expression = " ".join(fields)
        self._iterate = CronSim
        try:
            self.next_after(datetime.datetime.now(_UTC))
        except CronSimError as error:
            raise ValueError(str(error)) from None
        except StopIteration:
            raise ValueError("there is no such day within 50 years") from None

    def next_after(self, moment: datetime.datetime) -> datetime.datetime:
        """Return the first time after ``moment``."""
        # Around a change of the clock several fixed times may be one moment, or lie before.
        times = self._iterate(self._expression, moment.astimezone(self.zone))
        while (found := next(times).astimezone(_UTC)) <= moment:
            pass
        return found


def schedule_of(every: Any, cron: Any, timezone: Any, what: str) -> Schedule | None:
    """Return the schedule that a task asks for, or None if it is not a recurring one.

    Args:
        every: seconds, or a timedelta; or None.
        cron: a cron expression; or None.
        timezone: the name of the expression's time zone; None for UTC.
        what: the task, with which messages begin.

    Raises:
        UsageError: an argument is invalid.
        MissingExtra: cronsim is not installed.
    """
    if every is not None and cron is not None:
        raise UsageError(f"{what}: give every or cron, not both")
    if timezone is not None and cron is None:
        raise UsageError(f"{what}: timezone is of cron; every counts from the epoch in UTC")
    if every is not None:
        return EverySchedule(_interval(every, what))
    if cron is None:
        return None
    if not isinstance(cron, str):
        raise UsageError(f"{what}: cron is {cron!r:.60}, not a text such as '30 2 * * *'")
    if timezone is not None and not isinstance(timezone, str):
        raise UsageError(f"{what}: timezone is {timezone!r:.60}, not a name like 'Europe/Berlin'")
    try:
        return CronSchedule(cron, "UTC" if timezone is None else timezone)
    except zoneinfo.ZoneInfoNotFoundError:
        raise UsageError(
            f"{what}: there is no time zone {timezone!r:.60}; names are those of the IANA, such as "
            "'Europe/Berlin' (where the system has none: pip install tzdata)"
        ) from None
    except ValueError as error:
        raise UsageError(f"{what}: cron {cron!r:.60} is invalid: {error}") from None


def _interval(every: Any, what: str) -> datetime.timedelta:
    interval = every
    if isinstance(every, int | float) and not isinstance(every, bool):
        try:
            interval = datetime.timedelta(seconds=every)
        except (OverflowError, ValueError):
            interval = None
    if not isinstance(interval, datetime.timedelta) or not _LEAST <= interval <= _MOST:
        raise UsageError(
            f"{what}: every is {every!r:.60}, not 1 second to {_MOST.days} days, as seconds or a "
            "timedelta"
        )
    return interval


def _zone(name: str) -> datetime.tzinfo:
    """Return the time zone of a name.

    Raises:
        zoneinfo.ZoneInfoNotFoundError: there is none.
    """
    if name == "UTC":
        return _UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError):  # "../x", "Europe": a path, a folder
        raise zoneinfo.ZoneInfoNotFoundError(name) from None
