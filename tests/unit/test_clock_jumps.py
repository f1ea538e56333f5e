"""A jump of the machine's clock is noticed; gradual adjustments and setting it back are not."""

from __future__ import annotations

import pytest

from outbox.transports.database.clock_jumps import ClockJumps


@pytest.mark.parametrize(
    ("clock", "steady", "jump"),
    [
        (10.0, 10.0, 0.0),
        (70.0, 10.0, 60.0),
        (10.5, 10.0, 0.0),
        (3600.0 + 1.8 / 2, 3600.0, 0.0),
        (-50.0, 10.0, 0.0),
    ],
    ids=["none", "forward or suspended", "within the tolerance", "adjusted gradually", "back"],
)
def test_a_jump_is_what_the_clock_gains_on_the_steady_one(
    clock: float, steady: float, jump: float
) -> None:
    times = {"clock": 1000.0, "steady": 5.0}
    jumps = ClockJumps(lambda: times["clock"], lambda: times["steady"])
    assert jumps.look() == 0.0
    times["clock"] += clock
    times["steady"] += steady
    assert jumps.look() == pytest.approx(jump)
    times["clock"] += 1.0
    times["steady"] += 1.0
    assert jumps.look() == 0.0


def test_the_way_back_from_a_clock_that_was_set_back_is_a_jump_too() -> None:
    times = {"clock": 1000.0}
    jumps = ClockJumps(lambda: times["clock"], lambda: 0.0)
    times["clock"] = 0.0
    assert jumps.look() == 0.0
    times["clock"] = 1000.0
    assert jumps.look() == 1000.0
