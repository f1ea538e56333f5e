"""Suspects run alone, and hold up the others for a bounded time."""

from __future__ import annotations

import threading
import time

import pytest

from outbox.consumers.losses import begin_gate
from outbox.consumers.losses.begin_gate import BeginGate, Suspect


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> BeginGate:
    return BeginGate(clock)


def begins(gate: BeginGate, clock: Clock, suspect: Suspect) -> bool:
    """Ask as a waiting suspect does: once more after the pause in which all has settled."""
    if gate.begin_alone(suspect):
        return True
    clock.now += begin_gate._SETTLED
    return gate.begin_alone(suspect)


def test_a_suspect_begins_when_nothing_runs_and_nothing_begins_while_it_runs(
    gate: BeginGate, clock: Clock
) -> None:
    assert gate.begin()
    suspect = gate.suspect(1)
    assert not begins(gate, clock, suspect)
    assert not gate.begin()
    gate.end()
    assert begins(gate, clock, suspect)
    assert not gate.begin()
    gate.end_alone(suspect)
    assert gate.begin()


def test_what_has_just_ended_is_acked_before_a_suspect_begins(
    gate: BeginGate, clock: Clock
) -> None:
    assert gate.begin()
    suspect = gate.suspect(1)
    assert not gate.begin_alone(suspect)
    gate.end()
    assert not gate.begin_alone(suspect)
    clock.now += 0.49
    assert not gate.begin_alone(suspect)
    clock.now += 0.02
    assert gate.begin_alone(suspect)


def test_suspects_begin_one_after_the_other_those_with_fewer_losses_first(
    gate: BeginGate, clock: Clock
) -> None:
    worse, better = gate.suspect(2), gate.suspect(1)
    assert not begins(gate, clock, worse)
    assert begins(gate, clock, better)
    assert not begins(gate, clock, worse)
    gate.end_alone(better)
    assert begins(gate, clock, worse)


def test_suspects_of_which_no_loss_is_known_run_side_by_side_for_a_while(
    gate: BeginGate, clock: Clock
) -> None:
    waiting = [gate.suspect(0, shares=True) for _ in range(3)]
    lost = gate.suspect(1)
    first = next(each for each in waiting if begins(gate, clock, each))
    second, late = (each for each in waiting if each is not first)
    assert gate.begin_alone(second)
    assert not gate.begin()
    assert not begins(gate, clock, lost)
    clock.now += begin_gate._JOINED
    assert not gate.begin_alone(late)
    gate.end_alone(first)
    assert not gate.begin()
    gate.end_alone(second)
    assert gate.begin()  # those that were held up have their turn
    gate.end()
    clock.now += begin_gate._BETWEEN
    assert begins(gate, clock, late)
    gate.end_alone(late)
    clock.now += begin_gate._BETWEEN
    assert begins(gate, clock, lost)


def test_between_two_suspects_messages_that_were_held_up_begin(
    gate: BeginGate, clock: Clock
) -> None:
    first, second = gate.suspect(1), gate.suspect(2)
    assert begins(gate, clock, first)
    assert not gate.begin()
    gate.end_alone(first)
    assert not gate.begin_alone(second)
    assert gate.begin()
    gate.end()
    clock.now += 0.2
    assert begins(gate, clock, second)


def test_a_long_handler_does_not_let_a_suspect_hold_up_the_others_for_longer_than_half_a_minute(
    gate: BeginGate, clock: Clock
) -> None:
    assert gate.begin()  # it takes hours
    suspect = gate.suspect(1)
    assert not gate.begin_alone(suspect)
    clock.now += 29
    assert not gate.begin()
    clock.now += 2
    assert not gate.begin_alone(suspect)
    assert gate.begin()
    gate.end()
    clock.now += 59
    assert not gate.begin_alone(suspect)
    assert gate.begin()  # for a minute
    gate.end()
    clock.now += 600
    assert gate.begin_alone(suspect)  # beside it, in the end
    assert not gate.begin()


def test_the_others_open_the_gate_if_a_suspect_does_not(gate: BeginGate, clock: Clock) -> None:
    assert gate.begin()
    assert not gate.begin_alone(gate.suspect(1))
    clock.now += 31
    assert not gate.begin()
    assert gate.begin()


def test_a_suspect_that_runs_for_long_lets_the_others_begin(gate: BeginGate, clock: Clock) -> None:
    suspect = gate.suspect(1)
    assert begins(gate, clock, suspect)
    clock.now += 61
    assert not gate.begin()
    assert gate.begin()
    another = gate.suspect(1)
    assert not begins(gate, clock, another)
    gate.end_alone(suspect)
    gate.end()
    assert not begins(gate, clock, another)
    clock.now += 1
    assert begins(gate, clock, another)


def test_a_suspect_that_leaves_opens_the_gate(gate: BeginGate) -> None:
    suspect = gate.suspect(1)
    assert not gate.begin_alone(suspect)
    assert not gate.begin()
    gate.leave(suspect)
    assert gate.begin()


def test_threads_never_run_beside_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin_gate, "_SETTLED", 0.0)
    monkeypatch.setattr(begin_gate, "_BETWEEN", 0.001)
    gate = BeginGate()
    running: set[str] = set()
    wrong: list[str] = []
    counts = {"ordinary": 0, "suspects": 0}
    end = time.monotonic() + 1

    def ordinary(name: str) -> None:
        while time.monotonic() < end:
            if gate.begin():
                running.add(name)
                if "suspect" in running:
                    wrong.append(name)
                counts["ordinary"] += 1
                running.discard(name)
                gate.end()
            else:
                time.sleep(0.001)

    def suspects() -> None:
        while time.monotonic() < end:
            suspect = gate.suspect(1)
            while not gate.begin_alone(suspect):
                time.sleep(0.0005)
            if running:
                wrong.append("suspect")
            running.add("suspect")
            time.sleep(0)
            running.discard("suspect")
            counts["suspects"] += 1
            gate.end_alone(suspect)

    threads = [threading.Thread(target=ordinary, args=(f"{n}",)) for n in range(4)]
    threads += [threading.Thread(target=suspects) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert min(counts.values()) > 1, counts
