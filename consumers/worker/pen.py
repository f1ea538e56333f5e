"""Where messages wait that no thread or task works on.

A message waits here for a time, for its broker, or for what its queue lacks: when a database is
unavailable, the queue of the message that has found this is *closed*. None of its other messages
begins, and one message, the *prober*, is processed again after a growing pause. The queue opens
when that ends without a further pause of this kind. A message may be the only one whose database
is unavailable: so after a while the others take turns as the prober, and if one of them opens the
queue, those that had failed to do so are alone from then on: they wait without closing it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from outbox.consumers.message.message import LONGEST_WAIT, Message
from outbox.consumers.message.republishing import FIRST_PAUSE, LONGEST_PAUSE
from outbox.consumers.message.steps import Closing, Pause
from outbox.consumers.worker.life import Life
from outbox.messages.delivery import Delivery

__all__ = ["Pen"]

_TURNS_FROM = 8.0  # seconds: the pause from which the others take turns
_LOOK = 0.5  # seconds between two checks of a condition

_Waiting: TypeAlias = Life | Delivery


class _ClosedQueue:
    """A closed queue.

    Attributes:
        prober: the message whose processing opens it, or the delivery that will be that message.
        pause: the seconds until the next probe, at least.
        held: the other messages that were begun, with the time since when they wait.
        unbegun: the deliveries that wait, likewise, in order.
    """

    __slots__ = ("held", "pause", "prober", "unbegun")

    def __init__(self, prober: Message) -> None:
        self.prober: Message | Delivery = prober
        self.pause = FIRST_PAUSE
        self.held: deque[tuple[float, Life]] = deque()
        self.unbegun: deque[tuple[float, Delivery]] = deque()

    def take_next(self) -> _Waiting | None:
        """Take out the message whose turn it is; one that wasn't begun knows best."""
        for line in (self.unbegun, self.held):
            if line:
                return line.popleft()[1]
        return None


class Pen:
    """The messages of an engine that wait without a thread or task. Thread-safe.

    Attributes:
        closed: the closed queues, by name. Ask whether there is any before each call about a
            message that runs: there is none nearly always.
        resting: the number of deliveries here, by queue.
    """

    def __init__(
        self,
        resume: Callable[[_Waiting], None],
        resting: dict[str, int],
        *,
        places: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty pen.

        Args:
            resume: puts what has waited into the engine, ahead of what is new.
            resting: where to count, for all queues.
            places: the number of the engine's threads or tasks. With one, messages of a closed
                queue keep their order; with more, they take turns.
            clock: returns the time in seconds.
        """
        self.resting = resting
        self._resume = resume
        self._places = places
        self._clock = clock
        self._lock = threading.Lock()
        self._timed: dict[_Waiting, tuple[float, Callable[[], bool] | None]] = {}
        self.closed: dict[str, _ClosedQueue] = {}

    def __len__(self) -> int:
        """Return the number of begun messages that wait."""
        with self._lock:
            return len(self._lives())

    def park(self, life: Life, pause: Pause) -> None:
        """Let ``life`` wait as ``pause`` says.

        Call it outside the life's context, which another thread may enter at once.
        """
        message = life.message
        opened: list[_Waiting] = []
        with self._lock:
            now = self._clock()
            queue = message.delivery.queue
            self.resting[queue] += 1
            closed = self.closed.get(queue)
            if life.is_alone or not self._closes(queue, pause):
                if closed is not None and closed.prober is message:
                    opened = self._open(queue)
                self._timed[life] = (now + pause.seconds, pause.until)
            elif closed is None:
                self.closed[queue] = _ClosedQueue(message)
                self._timed[life] = (now + pause.seconds, pause.until)
            elif closed.prober is not message:
                closed.held.append((now, life))
            else:
                self._probe_again(closed, life, pause, now)
        self._put(opened)

    def holds_back(self, delivery: Delivery) -> bool:
        """Keep ``delivery`` here if its queue is closed; return whether it is."""
        with self._lock:
            closed = self.closed.get(delivery.queue)
            if closed is None or closed.prober is delivery:
                return False
            self.resting[delivery.queue] += 1
            closed.unbegun.append((self._clock(), delivery))
            return True

    def began(self, delivery: Delivery, message: Message | None) -> None:
        """Note that ``delivery`` has begun as ``message``; None if it never will."""
        opened: list[_Waiting] = []
        with self._lock:
            closed = self.closed.get(delivery.queue)
            if closed is not None and closed.prober is delivery:
                if message is not None:
                    closed.prober = message
                else:
                    opened = self._open(delivery.queue)
        self._put(opened)

    def passed(self, message: Message) -> None:
        """Note that an attempt at ``message`` has ended, whatever its result: not in a pause."""
        opened: list[_Waiting] = []
        with self._lock:
            closed = self.closed.get(message.delivery.queue)
            if closed is not None and closed.prober is message:
                opened = self._open(message.delivery.queue)
        self._put(opened)

    def wake(self, message: Message) -> None:
        """Resume ``message`` now if it waits here: its delivery is stale."""
        found: list[_Waiting] = []
        with self._lock:
            for life in self._lives():
                if life.message is message:
                    self._take_out(life)
                    found.append(life)
        self._put(found)

    def look(self) -> float:
        """Resume what has waited long enough; return the seconds until the next look, at most."""
        with self._lock:
            now = self._clock()
            over = [waiting for waiting, (due, _) in self._timed.items() if due <= now]
            for waiting in list(over):
                until = self._timed[waiting][1]
                if until is not None and not until():
                    over.remove(waiting)
                    self._timed[waiting] = (now + _LOOK, until)
            for closed in self.closed.values():
                while closed.held and closed.held[0][0] <= now - LONGEST_WAIT:
                    over.append(closed.held.popleft()[1])
            for waiting in over:
                self._timed.pop(waiting, None)
                self._rest_no_more(waiting)
            next_due = min((due for due, _ in self._timed.values()), default=now + LONGEST_PAUSE)
        self._put(over)
        return max(0.0, next_due - now)

    def waiting(self) -> list[Delivery]:
        """Return the deliveries that wait for a closed queue, and were not begun."""
        with self._lock:
            return [item for closed in self.closed.values() for _, item in closed.unbegun]

    def give_up(self, delivery: Delivery) -> bool:
        """Take out ``delivery``, one of ``waiting()``; return False if it is no longer here."""
        with self._lock:
            closed = self.closed.get(delivery.queue)
            for entry in () if closed is None else closed.unbegun:
                if entry[1] is delivery and closed is not None:
                    closed.unbegun.remove(entry)
                    self._rest_no_more(delivery)
                    return True
        return False

    def empty(self) -> list[Life]:
        """Take out everything, and return the messages that were begun."""
        with self._lock:
            lives = self._lives()
            self._timed.clear()
            self.closed.clear()
        return lives

    def _lives(self) -> list[Life]:
        timed = [waiting for waiting in self._timed if isinstance(waiting, Life)]
        return timed + [life for closed in self.closed.values() for _, life in closed.held]

    def _closes(self, queue: str, pause: Pause) -> bool:
        if pause.closing is not Closing.WHEN_MANY:
            return pause.closing is Closing.AT_ONCE
        waiting = sum(life.message.delivery.queue == queue for life in self._lives())
        return waiting + 1 >= self._places

    def _probe_again(self, closed: _ClosedQueue, life: Life, pause: Pause, now: float) -> None:
        seconds = max(pause.seconds, closed.pause)
        closed.pause = min(2 * seconds, LONGEST_PAUSE)
        prober: _Waiting = life
        if self._places > 1 and seconds >= _TURNS_FROM:
            other = closed.take_next()
            if other is not None:
                life.has_failed_to_open = True
                closed.held.append((now, life))
                closed.prober = other.message if isinstance(other, Life) else other
                prober = other
        self._timed[prober] = (now + seconds, pause.until)

    def _open(self, queue: str) -> list[_Waiting]:
        closed = self.closed.pop(queue)
        opened: list[_Waiting] = []
        for _, life in closed.held:
            life.is_alone = life.has_failed_to_open
            opened.append(life)
        opened.extend(delivery for _, delivery in closed.unbegun)
        for waiting in opened:
            self._rest_no_more(waiting)
        return opened

    def _take_out(self, life: Life) -> None:
        self._timed.pop(life, None)
        for closed in self.closed.values():
            for entry in closed.held:
                if entry[1] is life:
                    closed.held.remove(entry)
                    break
        self._rest_no_more(life)

    def _rest_no_more(self, waiting: _Waiting) -> None:
        delivery = waiting.message.delivery if isinstance(waiting, Life) else waiting
        self.resting[delivery.queue] -= 1

    def _put(self, waiting: list[_Waiting]) -> None:
        for each in waiting:
            self._resume(each)
