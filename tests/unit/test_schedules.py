"""The times of recurring tasks, and which of them is next."""

from __future__ import annotations

import datetime
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import MissingExtra, UsageError
from outbox.recurring.due import GRACE, is_far_ahead, next_tick
from outbox.recurring.schedules import CronSchedule, EverySchedule, Schedule, schedule_of

UTC = datetime.UTC
BERLIN = "Europe/Berlin"
NOON = datetime.datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


def runs(expression: str, zone: str, start: str, end: str) -> list[str]:
    """The times between two instants, as the clock on the wall shows them, with its offset."""
    schedule = CronSchedule(expression, zone)
    moment, last = map(datetime.datetime.fromisoformat, (start, end))
    shown = []
    while (moment := schedule.next_after(moment)) <= last:
        assert moment.tzinfo is UTC
        shown.append(moment.astimezone(schedule.zone).strftime("%d %H:%M%z")[:-2])
    return shown


# In Berlin the clock went from 02:00 to 03:00 on 29 March 2026, and from 03:00 to 02:00 on
# 25 October.
SPRING = ("2026-03-28T12:00:00+00:00", "2026-03-30T04:00:00+00:00")
AUTUMN = ("2026-10-24T12:00:00+00:00", "2026-10-26T04:00:00+00:00")


@pytest.mark.parametrize(
    ("expression", "in_spring", "in_autumn"),
    [
        ("30 2 * * *", ["29 03:00+02", "30 02:30+02"], ["25 02:30+02", "26 02:30+01"]),
        (
            "*/30 2 * * *",
            ["29 03:00+02", "30 02:00+02", "30 02:30+02"],
            ["25 02:00+02", "25 02:30+02", "26 02:00+01", "26 02:30+01"],
        ),
        ("0 3 * * *", ["29 03:00+02", "30 03:00+02"], ["25 03:00+01", "26 03:00+01"]),
        ("59 1 * * *", ["29 01:59+01", "30 01:59+02"], ["25 01:59+02", "26 01:59+01"]),
        (
            "0 2,3 * * *",
            ["29 03:00+02", "30 02:00+02", "30 03:00+02"],
            ["25 02:00+02", "25 03:00+01", "26 02:00+01", "26 03:00+01"],
        ),
        (
            "30 1-3 29,25 * *",
            ["29 01:30+01", "29 03:00+02", "29 03:30+02"],
            ["25 01:30+02", "25 02:30+02", "25 03:30+01"],
        ),
    ],
)
def test_a_fixed_time_runs_once_on_the_night_of_the_clock_change(
    expression: str, in_spring: list[str], in_autumn: list[str]
) -> None:
    assert runs(expression, BERLIN, *SPRING) == in_spring
    assert runs(expression, BERLIN, *AUTUMN) == in_autumn


def test_the_minutes_of_a_fixed_hour_run_once_each() -> None:
    assert runs("* 2 * * *", BERLIN, SPRING[0], "2026-03-29T12:00:00+00:00") == ["29 03:00+02"]
    in_autumn = runs("* 2 * * *", BERLIN, AUTUMN[0], "2026-10-25T12:00:00+00:00")
    assert in_autumn == [f"25 02:{minute:02}+02" for minute in range(60)]


def test_every_hour_follows_elapsed_time() -> None:
    spring = runs("30 * * * *", BERLIN, "2026-03-29T00:00:00+00:00", "2026-03-29T03:00:00+00:00")
    assert spring == ["29 01:30+01", "29 03:30+02", "29 04:30+02"]
    autumn = runs("30 * * * *", BERLIN, "2026-10-24T23:00:00+00:00", "2026-10-25T02:00:00+00:00")
    assert autumn == ["25 01:30+02", "25 02:30+02", "25 02:30+01"]
    quarters = runs("*/15 */1 * * *", BERLIN, *AUTUMN)
    assert len(quarters) == 40 * 4


@given(
    st.sampled_from(["30 2 * * *", "*/7 2 * * *", "*/7 * * * *", "0 0 * * *", "5 1-3 * * *"]),
    st.sampled_from([BERLIN, "America/Sao_Paulo", "Australia/Lord_Howe", "Africa/Cairo", "UTC"]),
    st.datetimes(
        datetime.datetime(2010, 1, 1), datetime.datetime(2030, 1, 1), timezones=st.just(UTC)
    ),
)
def test_the_times_rise_and_none_is_left_out(
    expression: str, zone: str, moment: datetime.datetime
) -> None:
    schedule = CronSchedule(expression, zone)
    first = schedule.next_after(moment)
    second = schedule.next_after(first)
    assert moment < first < second
    between = first + (second - first) / 2
    assert schedule.next_after(between) == second


def test_an_interval_counts_from_the_epoch_so_that_a_restart_shifts_nothing() -> None:
    schedule = EverySchedule(seconds(90))
    first = schedule.next_after(NOON)
    assert first.timestamp() % 90 == 0
    assert schedule.next_after(NOON + seconds(17)) == first
    assert schedule.next_after(first) == first + seconds(90)
    assert schedule.next_after(first - seconds(0.000001)) == first


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("@hourly", "2026-06-01T13:00"),
        ("@daily", "2026-06-02T00:00"),
        ("@midnight", "2026-06-02T00:00"),
        ("@weekly", "2026-06-07T00:00"),
        ("@monthly", "2026-07-01T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        ("@annually", "2027-01-01T00:00"),
        (" 0  9 * * MON ", "2026-06-08T09:00"),
    ],
)
def test_names_stand_for_expressions(name: str, first: str) -> None:
    schedule = schedule_of(None, name, None, "x")
    assert schedule is not None
    assert schedule.next_after(NOON).isoformat()[:16] == first


def test_the_text_says_what_the_times_are() -> None:
    def text(every: Any = None, cron: Any = None, timezone: Any = None) -> str:
        schedule = schedule_of(every, cron, timezone, "x")
        assert schedule is not None
        return schedule.text

    assert text(every=90) == text(every=seconds(90)) == "every 90 s"
    assert text(every=1.5) == "every 1.5 s"
    assert text(cron="@daily") == text(cron="0 0  * * *") == "0 0 * * * UTC"
    assert text(cron="*/5 2 * * mon", timezone=BERLIN) == "*/5 2 * * MON Europe/Berlin"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"every": 0.5}, "every is 0.5, not 1 second to"),
        ({"every": 0}, "every is 0, not"),
        ({"every": True}, "every is True"),
        ({"every": "60"}, "every is '60'"),
        ({"every": float("nan")}, "every is nan"),
        ({"every": float("inf")}, "every is inf"),
        ({"every": seconds(-60)}, "every is datetime.timedelta"),
        ({"every": 60, "cron": "@daily"}, "every or cron, not both"),
        ({"every": 60, "timezone": BERLIN}, "timezone is of cron"),
        ({"timezone": BERLIN}, "timezone is of cron"),
        ({"cron": 5}, "cron is 5, not a text"),
        ({"cron": "* * * *"}, "five fields"),
        ({"cron": "0 * * * * *"}, "five fields"),
        ({"cron": "@reboot"}, "five fields"),
        ({"cron": "61 * * * *"}, "Bad minute"),
        ({"cron": "0 0 30 2 *"}, "Bad day-of-month"),
        ({"cron": "0 0 29 2 MON#5", "timezone": "Nowhere/Land"}, "no time zone 'Nowhere/Land'"),
        ({"cron": "@daily", "timezone": "../../etc/passwd"}, "no time zone"),
        ({"cron": "@daily", "timezone": "Europe"}, "no time zone"),
        ({"cron": "@daily", "timezone": UTC}, "timezone is datetime"),
    ],
)
def test_what_is_wrong_is_refused(arguments: dict[str, Any], problem: str) -> None:
    every, cron, timezone = (arguments.get(name) for name in ("every", "cron", "timezone"))
    with pytest.raises(UsageError, match="the task x: ") as caught:
        schedule_of(every, cron, timezone, "the task x")
    assert problem in str(caught.value)


def test_cron_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(MissingExtra, match=r"outbox-events\[tasks\]"):
        schedule_of(None, "@daily", None, "x")
    assert schedule_of(60, None, None, "x") is not None


MINUTELY = EverySchedule(seconds(60))
DAILY: Schedule = CronSchedule("0 2 * * *", "UTC")


def test_a_tick_that_is_to_come_or_only_late_is_next() -> None:
    for planned in (NOON + seconds(60), NOON, NOON - GRACE):
        assert next_tick(MINUTELY, planned, NOON, catch_up=False) == planned


def test_ticks_that_were_missed_are_left_out() -> None:
    late = NOON + seconds(30)
    missed = NOON - seconds(3600)
    assert next_tick(MINUTELY, missed, late, catch_up=False) == NOON  # within the grace
    assert next_tick(DAILY, NOON - datetime.timedelta(days=3), NOON, catch_up=False) == (
        datetime.datetime(2026, 6, 2, 2, tzinfo=UTC)
    )


def test_catching_up_makes_one_tick_of_all_with_the_time_of_the_last() -> None:
    planned = datetime.datetime(2026, 1, 1, 2, tzinfo=UTC)
    last = datetime.datetime(2026, 6, 1, 2, tzinfo=UTC)
    assert next_tick(DAILY, planned, NOON, catch_up=True) == last
    assert next_tick(DAILY, last, NOON, catch_up=True) == last
    yearly = CronSchedule("@yearly", "UTC")
    planned = datetime.datetime(2020, 1, 1, tzinfo=UTC)
    assert next_tick(yearly, planned, NOON, catch_up=True).year == 2026


@given(
    st.sampled_from(
        [MINUTELY, EverySchedule(seconds(7)), DAILY, CronSchedule("*/5 1-3 * * 1", BERLIN)]
    ),
    st.integers(1, 500_000),
    st.booleans(),
)
def test_the_next_tick_is_one_of_the_schedule(
    schedule: Schedule, before: int, catch_up: bool
) -> None:
    planned = schedule.next_after(NOON - seconds(before))
    tick = next_tick(schedule, planned, NOON, catch_up=catch_up)
    assert tick >= planned
    assert schedule.next_after(tick - seconds(0.000001)) == tick
    if tick < NOON - GRACE:
        assert catch_up
        assert schedule.next_after(tick) > NOON
    if tick > NOON and tick != planned:
        assert not catch_up


def test_a_time_that_a_wrong_clock_has_planned_is_noticed_and_kept() -> None:
    planned = datetime.datetime(2036, 1, 1, 2, tzinfo=UTC)
    assert is_far_ahead(MINUTELY, planned, NOON)
    assert next_tick(MINUTELY, planned, NOON, catch_up=False) == planned
    assert not is_far_ahead(MINUTELY, NOON + seconds(3000), NOON)
    assert not is_far_ahead(DAILY, DAILY.next_after(NOON), NOON)
    assert is_far_ahead(DAILY, DAILY.next_after(NOON) + datetime.timedelta(days=1), NOON)
