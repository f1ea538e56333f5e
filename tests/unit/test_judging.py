"""Judging a process: its silence, that of its parts, its CPU time, and its deaths."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from outbox.service.health.cpu import CPUWatch, cpu_seconds
from outbox.service.health.judge import LONGEST_STEP, Judge
from outbox.service.health.policy import CPULimit, RestartBound
from outbox.service.health.pulse import Pulse
from outbox.service.slot import Slot


def steps(judge: Judge, seconds: float) -> None:
    for _ in range(round(seconds)):
        judge.step(1.0)


def test_a_process_is_stuck_when_its_reports_stay_away() -> None:
    judge = Judge(30.0)
    steps(judge, 30)
    assert judge.verdict() == ""
    judge.hear({"io": 0.0})
    steps(judge, 30)
    assert judge.verdict() == ""
    judge.step(1.0)
    assert judge.verdict() == "none of its threads has run for 31 s"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("io", "the thread of its consumer's connection has not answered for 31 s"),
        ("loop", "its event loop has been blocked for 31 s"),
        (
            "handlers",
            "as many handlers as it may run have exceeded their timeout, and none has ended "
            "for 31 s",
        ),
    ],
)
def test_a_process_is_stuck_when_a_part_of_it_is_silent(part: str, words: str) -> None:
    judge = Judge(30.0)
    judge.hear({"other": 0.0, part: 30.0})
    assert judge.verdict() == ""
    judge.step(1.0)
    assert judge.verdict() == words
    judge.hear({part: 0.0})
    assert judge.verdict() == ""


def test_a_pause_of_the_parent_counts_for_a_moment_only() -> None:
    judge = Judge(30.0)
    judge.step(3600.0)
    assert judge.verdict() == ""
    steps(judge, 30 - LONGEST_STEP)
    assert judge.verdict() == ""
    judge.step(1.0)
    assert judge.verdict()


def test_nothing_is_stuck_without_a_limit_and_rubbish_is_no_pulse() -> None:
    judge = Judge(0.0)
    judge.hear({"io": 1e9})
    steps(judge, 1000)
    assert judge.verdict() == ""
    judge = Judge(30.0)
    for rubbish in (None, 7, {"io": "x"}, {"io": None}):
        judge.hear(rubbish)
        assert judge.verdict() == ""


def test_a_pulse_counts_from_the_first_question_without_an_answer() -> None:
    asked: list[Callable[[], None]] = []

    def ask(answer: Callable[[], None]) -> bool:
        asked.append(answer)
        return True

    pulse = Pulse(ask)
    assert pulse.step(1.0) == 0.0
    assert [pulse.step(1.0) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert pulse.step(3600.0) == 3.0 + LONGEST_STEP
    assert len(asked) == 1
    asked[0]()
    assert pulse.step(1.0) == 0.0
    asked[0]()  # once more: it answers no other question
    assert pulse.step(1.0) == 1.0
    assert len(asked) == 2


def test_a_thread_that_cannot_be_asked_has_no_pulse() -> None:
    pulse = Pulse(lambda answer: False)
    assert pulse.step(1.0) is None
    assert pulse.step(1.0) is None


def test_a_cpu_limit_needs_a_row_of_intervals() -> None:
    used = iter([0.0, 6.0, 12.0, 13.0, 19.0, 25.0, 31.0])
    watch = CPUWatch(CPULimit(50, 3), 0, lambda pid: next(used))
    now, found = 0.0, []
    for _ in range(7):
        assert watch.look(now) == watch.look(now + 9.9)  # no interval is over
        found.append((watch.percent, watch.look(now)))
        now += 10.0
    assert [percent for percent, _ in found] == [None, 60, 60, 10, 60, 60, 60]
    assert [exceeded for _, exceeded in found] == [False] * 6 + [True]


def test_the_cpu_time_of_a_process_is_read() -> None:
    before = cpu_seconds(os.getpid())
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass
    after = cpu_seconds(os.getpid())
    assert before is not None
    assert after is not None
    assert 0.2 <= after - before < 30
    assert cpu_seconds(2**30) is None


def test_a_slot_is_given_up_after_enough_deaths_in_enough_time() -> None:
    slot = Slot(1)
    bound = RestartBound(3, 120.0)
    assert [slot.never_ready(now, bound) for now in (0, 1, 2, 119)] == [False] * 4
    assert slot.never_ready(120, bound)
    assert not Slot(1).never_ready(0, None)
    slot.became_ready()
    assert [slot.never_ready(now, bound) for now in range(0, 1000, 100)] == [False] * 10
    slot.code_replaced()
    assert [slot.never_ready(now, bound) for now in (0, 100, 200)] == [False, False, True]


def test_three_stuck_processes_in_a_row_are_remembered_until_one_lives() -> None:
    slot = Slot(1)
    for _ in range(2):
        slot.was_stuck(31.0)
        assert not slot.is_beyond_mending
    slot.was_stuck(31.0)
    assert slot.is_beyond_mending
    slot.was_stuck(3600.0)
    assert not slot.is_beyond_mending
