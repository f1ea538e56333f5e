"""Where a worker's messages wait without a thread or task."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any, cast

import pytest

from outbox.consumers.message.steps import Closing, Pause
from outbox.consumers.worker.life import Life
from outbox.consumers.worker.pen import Pen
from outbox.messages.delivery import Delivery


class Begun:
    """A message, as far as the pen looks at it."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery


class Yard:
    """A pen with a clock that is set by hand, and what it has resumed."""

    def __init__(self, *, places: int = 8) -> None:
        self.now = 1000.0
        self.resumed: list[Life | Delivery] = []
        self.resting = {"a": 0, "b": 0}
        self.pen = Pen(self.resumed.append, self.resting, places=places, clock=lambda: self.now)

    def delivery(self, queue: str = "a") -> Delivery:
        return Delivery(queue, 1, 1, False, "", queue, b"")

    def life(self, queue: str = "a") -> Life:
        return Life(cast("Any", Begun(self.delivery(queue))), cast("Any", iter(())), Context())

    def close(self, queue: str = "a", seconds: float = 0.5) -> Life:
        """Let a message close its queue."""
        life = self.life(queue)
        self.pen.park(life, closing(seconds))
        return life

    def after(self, seconds: float) -> list[Life | Delivery]:
        """Return what is resumed after that time, which the pen itself has asked for."""
        until = self.now + seconds
        self.resumed.clear()
        while self.now < until:
            self.now = min(until, self.now + max(0.01, self.pen.look()))
        self.pen.look()
        return list(self.resumed)


def closing(seconds: float = 0.5, until: Callable[[], bool] | None = None) -> Pause:
    return Pause(seconds, until, Closing.AT_ONCE)


@pytest.fixture
def yard() -> Yard:
    return Yard()


def test_a_message_waits_for_its_time_and_then_for_its_condition(yard: Yard) -> None:
    fine: list[None] = []
    life = yard.life()
    yard.pen.park(life, Pause(2.0, lambda: bool(fine)))
    assert not yard.pen.closed
    assert yard.resting["a"] == 1
    fine.append(None)
    assert yard.after(1.9) == []
    fine.clear()
    assert yard.after(10) == []
    fine.append(None)
    assert yard.after(0.5) == [life]
    assert yard.resting["a"] == 0


def test_nothing_begins_in_a_closed_queue_until_its_prober_passes(yard: Yard) -> None:
    prober = yard.close()
    waiting = [yard.delivery() for _ in range(3)]
    assert all(map(yard.pen.holds_back, waiting))
    assert not yard.pen.holds_back(yard.delivery("b"))
    assert yard.resting == {"a": 4, "b": 0}
    assert yard.after(0.5) == [prober]
    assert yard.pen.holds_back(late := yard.delivery())
    yard.pen.passed(prober.message)
    assert yard.resumed == [prober, *waiting, late]
    assert yard.resting == {"a": 0, "b": 0}
    assert not yard.pen.closed


def test_a_closed_queue_is_probed_by_one_message_at_growing_intervals(yard: Yard) -> None:
    prober = yard.close()
    others = [yard.life() for _ in range(3)]
    for other in others:  # they ran when the queue was closed, and have failed likewise
        yard.pen.park(other, closing())
    pauses, last = [], yard.now
    for _ in range(4):
        while not yard.after(0.1):
            pass
        assert yard.resumed == [prober]
        pauses.append(round(yard.now - last, 1))
        last = yard.now
        yard.pen.park(prober, closing())
    assert pauses == [0.5, 0.5, 1.0, 2.0]
    assert yard.after(4.0) == [prober]
    yard.pen.passed(prober.message)
    assert yard.resumed == [prober, *others]


def test_a_message_whose_database_alone_is_away_does_not_close_its_queue_for_good(
    yard: Yard,
) -> None:
    wrong = yard.close(seconds=10.0)
    good = yard.delivery()
    assert yard.pen.holds_back(good)
    assert yard.after(10.0) == [wrong]
    yard.pen.park(wrong, closing(10.0))
    assert yard.after(10.0) == [good]
    assert not yard.pen.holds_back(good)
    begun = Begun(good)
    yard.pen.began(good, cast("Any", begun))
    yard.pen.passed(cast("Any", begun))
    assert not yard.pen.closed
    yard.pen.park(wrong, closing(10.0))
    assert not yard.pen.closed
    assert yard.after(10.0) == [wrong]


def test_messages_of_a_single_thread_keep_their_order() -> None:
    yard = Yard(places=1)
    first = yard.close(seconds=30.0)
    second = yard.delivery()
    assert yard.pen.holds_back(second)
    for _ in range(5):
        assert yard.after(60.0) == [first]
        yard.pen.park(first, closing(30.0))
    yard.after(60.0)
    yard.pen.passed(first.message)
    assert yard.resumed == [first, second]


def test_a_queue_opens_if_its_next_prober_never_begins(yard: Yard) -> None:
    first = yard.close(seconds=10.0)
    stale, good = yard.delivery(), yard.delivery()
    assert yard.pen.holds_back(stale)
    assert yard.pen.holds_back(good)
    yard.after(10.0)
    yard.pen.park(first, closing(10.0))
    assert yard.after(10.0) == [stale]
    yard.pen.began(stale, None)
    assert yard.resumed == [stale, first, good]
    assert not yard.pen.closed


def test_a_prober_that_waits_for_something_else_opens_its_queue(yard: Yard) -> None:
    prober = yard.close()
    waiting = yard.delivery()
    assert yard.pen.holds_back(waiting)
    assert yard.after(0.5) == [prober]
    yard.pen.park(prober, Pause(5.0))
    assert yard.resumed == [prober, waiting]
    assert yard.resting["a"] == 1


@pytest.mark.parametrize("is_prober", [True, False])
def test_a_stale_message_can_be_woken(yard: Yard, is_prober: bool) -> None:
    prober = yard.close()
    other = yard.life()
    yard.pen.park(other, closing())
    woken = prober if is_prober else other
    yard.pen.wake(woken.message)
    assert yard.resumed == [woken]
    assert yard.resting["a"] == 1
    yard.pen.wake(woken.message)
    assert yard.resumed == [woken]


def test_what_waits_unbegun_can_be_given_up_once(yard: Yard) -> None:
    prober = yard.close()
    waiting = yard.delivery()
    assert not yard.pen.give_up(waiting)
    yard.pen.holds_back(waiting)
    assert yard.pen.waiting() == [waiting]
    assert yard.pen.give_up(waiting)
    assert not yard.pen.give_up(waiting)
    yard.pen.passed(prober.message)
    assert yard.resumed == []
    assert yard.resting["a"] == 1


def test_a_held_message_has_its_turn_before_the_broker_takes_it_back() -> None:
    yard = Yard(places=1)
    prober = yard.close(seconds=30.0)
    other = yard.life()
    yard.pen.park(other, closing())
    for _ in range(20):
        if other in yard.after(60.0):
            break
        yard.pen.park(prober, closing(30.0))
    assert other in yard.resumed
    assert 600 <= yard.now - 1000 < 900


def test_an_emptied_pen_returns_the_messages_that_were_begun(yard: Yard) -> None:
    prober, timed, held = yard.close(), yard.life("b"), yard.life()
    yard.pen.park(timed, Pause(5.0))
    yard.pen.park(held, closing())
    yard.pen.holds_back(yard.delivery())
    assert len(yard.pen) == 3
    assert set(yard.pen.empty()) == {prober, timed, held}
    assert yard.after(60.0) == []


def test_a_queue_may_close_only_when_as_many_of_its_messages_wait_as_there_are_places() -> None:
    yard = Yard(places=3)
    fine: list[None] = []
    pause = Pause(0.5, lambda: bool(fine), Closing.WHEN_MANY)
    lives = [yard.life() for _ in range(3)]
    for life in lives[:2]:
        yard.pen.park(life, pause)
    yard.pen.park(yard.life("b"), pause)
    assert not yard.pen.closed
    yard.pen.park(lives[2], pause)
    waiting = yard.delivery()
    assert yard.pen.holds_back(waiting)
    fine.append(None)
    assert set(yard.after(1.0)) >= set(lives)
    yard.pen.passed(lives[2].message)
    assert yard.resumed[-1] is waiting
