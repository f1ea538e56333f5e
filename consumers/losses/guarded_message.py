"""Messages that begin through the gate, and are noted while they run.

An attempt and the callbacks after it are application code, which may kill the process. What comes
before and after, such as settling and waiting, is not, and holds up no other message.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from hashlib import blake2b
from typing import TypeAlias

from outbox.consumers.current import set_current_message
from outbox.consumers.definition import Consumer
from outbox.consumers.isolation.process_pool import IsolatedMessage, ProcessPool
from outbox.consumers.losses.begin_gate import BeginGate, Suspect
from outbox.consumers.losses.begun_table import BegunTable, Loss, key_of
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Pause, Steps
from outbox.consumers.outcome import Dead, Failed, Outcome, Return, Unconfirmed
from outbox.messages.delivery import Delivery
from outbox.messages.received_event import Undecodable, decode

__all__ = ["Guard", "GuardedIsolatedMessage", "GuardedMessage", "message_maker"]

logger = logging.getLogger("outbox.consumer")

_MOST_LOSSES = 3
"""Losses of its own after which a message is dead-lettered."""
_MANY_RETURNS = 5
"""Returns after which a message is a suspect although no table names it: its process had no parent,
or ran on another machine."""
_REMEMBERED = 1000
"""The number of messages of which it is remembered that their returns were no losses."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.1
"""Seconds between two looks at the gate."""

_Begun: TypeAlias = "tuple[int, Suspect | None]"
"""A message that runs: its place in the table, or -1, and the suspect if it runs alone."""


class Guard:
    """The gate of a worker, and the table of begun messages if its parent has made one.

    Thread-safe.

    Attributes:
        gate: the gate.
        has_table: whether losses are noted.
    """

    def __init__(self, table: BegunTable | None) -> None:
        """Guard a worker; without a table only the broker's count makes a message a suspect."""
        self._table = table
        self.has_table = table is not None
        self.gate = BeginGate()
        self._harmless: dict[bytes, int] = {}

    def key_of(self, delivery: Delivery) -> bytes:
        """Return the key of a message, which is empty if nothing will be looked up with it."""
        if self._table is None and not delivery.redelivered:
            return b""
        # Without an id the body names it, so that its losses can be counted.
        message_id = delivery.message_id or blake2b(delivery.body, digest_size=16).hexdigest()
        return key_of(delivery.queue, message_id)

    def begin(self, key: bytes, *, is_noted: bool = True) -> _Begun | None:
        """Return what :meth:`end` takes, or None if the message may not begin yet.

        Args:
            key: the key of the message.
            is_noted: whether to note it in the table.
        """
        if not self.gate.begin():
            return None
        table = self._table
        return -1 if table is None or not is_noted else table.begin(key), None

    def begin_alone(self, key: bytes, suspect: Suspect, loss: Loss) -> _Begun | None:
        """Return what :meth:`end` takes, or None if the suspect's turn hasn't come."""
        if not self.gate.begin_alone(suspect):
            return None
        table = self._table
        return -1 if table is None else table.begin(key, loss.times), suspect

    def end(self, key: bytes, begun: _Begun, delivery: Delivery) -> None:
        """Note that a message has ended."""
        place, suspect = begun
        if self._table is not None:
            self._table.end(place)
            if suspect is not None and suspect.losses < _MOST_LOSSES:
                self._table.forget(key)  # of a dead one only when it is lost anew: it isn't settled
        if delivery.redelivered and delivery.returned >= _MANY_RETURNS - 1:
            self._remember(key, delivery.returned)
        if suspect is None:
            self.gate.end()
        else:
            self.gate.end_alone(suspect)

    def loss_of(self, key: bytes, returned: int) -> Loss | None:
        """Return what makes a message that was returned a suspect, else None.

        Without a table, it is not known how many of its returns were losses: 0 for sure.
        """
        loss = None if self._table is None else self._table.loss_of(key)
        if loss is None and returned - self._harmless.get(key, 0) >= _MANY_RETURNS:
            loss = Loss(0, None)
        return loss

    def _remember(self, key: bytes, returned: int) -> None:
        """Remember that the returns so far, and the one that may follow now, were no losses."""
        while len(self._harmless) >= _REMEMBERED:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread's
                del self._harmless[next(iter(self._harmless))]
        self._harmless[key] = returned + 1


class GuardedMessage(Message):
    """A message that begins when the gate lets it, alone if it was lost with its process.

    Attributes:
        guard: the guard of the worker; set before the message lives, like the next one.
        key: the key of the message, made before it was given an id if it had none.
        is_noted: whether it is noted in the table, and looked up there.
    """

    is_noted = True
    guard: Guard
    key: bytes

    # Here, not in an initializer: a message's life is short.
    _is_looked_up = False
    _loss: Loss | None = None
    _begun: list[_Begun] | None = None  # the thread that takes it out ends it: a successor's

    def attempt(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message once, when it may begin."""
        guard, delivery = self.guard, self.delivery
        if delivery.redelivered and self.is_noted and not self._is_looked_up:
            self._is_looked_up = True
            self._loss = guard.loss_of(self.key, delivery.returned)
        if self._loss is None:
            begun = guard.begin(self.key, is_noted=self.is_noted)
            if begun is not None:
                self._begun = [begun]
                return super().attempt()
        return self._attempt_later()

    def _attempt_later(self) -> Steps[Outcome | Failed | Unconfirmed]:
        ended = yield from self._begin_later()
        return (yield from super().attempt()) if ended is None else ended

    def _begin_later(self) -> Steps[Outcome | None]:
        """Wait until the message may begin; return an outcome if it ends without an attempt."""
        delivery, services, guard = self.delivery, self._services, self.guard
        loss, suspect = self._loss, None
        if loss is not None:
            is_harmless = not loss.times and delivery.returned < _MANY_RETURNS
            suspect = guard.gate.suspect(
                loss.times,
                is_harmless=is_harmless,
                shares=guard.has_table and not is_harmless and not loss.times,
            )
            if not is_harmless:
                logger.warning(
                    "message %r of %r was %s; it begins alone",
                    delivery.message_id,
                    delivery.queue,
                    _describe(loss, delivery.returned),
                )
        begun: _Begun | None = None
        pause = _FIRST_PAUSE
        try:
            while begun is None:
                if services.is_stopping or services.subscription.is_stale(delivery):
                    return Return(0.0)
                yield Pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                if loss is None or suspect is None:
                    begun = guard.begin(self.key, is_noted=self.is_noted)
                else:
                    begun = guard.begin_alone(self.key, suspect, loss)
        finally:
            if suspect is not None and begun is None:
                guard.gate.leave(suspect)
        self._begun = [begun]
        return None if loss is None or loss.times < _MOST_LOSSES else self._dead_of(loss)

    def _dead_of(self, loss: Loss) -> Dead:
        """Return the outcome of a message that was lost too often."""
        delivery = self.delivery
        if loss.times == _MOST_LOSSES:  # once more, and a callback has killed the process
            with contextlib.suppress(Undecodable):
                self.event = decode(delivery)
                set_current_message(self.event)
        # By now the parent has noted how the last process ended.
        latest = self.guard.loss_of(self.key, 0) or loss
        reason = _describe(latest, delivery.returned)
        return Dead(reason, None, delivery.attempt, delivery.first_failure)

    def _over(self) -> None:
        # A late handler goes on, but no longer holds up other messages. If it kills the process,
        # that is a loss of those that run then.
        if self._begun:
            try:
                begun = self._begun.pop()
            except IndexError:  # another thread was faster
                return
            self.guard.end(self.key, begun, self.delivery)


class GuardedIsolatedMessage(GuardedMessage, IsolatedMessage):
    """A message whose attempts run in a subprocess, which it can kill without a loss to others."""

    is_noted = False


def message_maker(
    guard: Guard, isolation: ProcessPool | None
) -> Callable[[Consumer, Delivery, Services], Message]:
    """Return what makes the message of a consumer, a delivery and its engine's services."""

    def make(consumer: Consumer, delivery: Delivery, services: Services) -> Message:
        key = guard.key_of(delivery)
        message: GuardedMessage
        if isolation is None or consumer._for(delivery).is_async:
            message = GuardedMessage(consumer, delivery, services)
        else:
            message = GuardedIsolatedMessage(consumer, delivery, services, isolation)
        message.guard, message.key = guard, key
        return message

    return make


def _describe(loss: Loss, returned: int) -> str:
    """Say what happened to a message, to follow "it was"."""
    if not loss.times:
        return (
            f"returned {returned} times"
            if returned >= _MANY_RETURNS
            else "finished, but not acked before its process died"
        )
    times = "once" if loss.times == 1 else f"{loss.times} times"
    if loss.code is None:
        return f"lost with its process {times}"
    status = f"signal {-loss.code}" if loss.code < 0 else f"exit code {loss.code}"
    return f"lost with its process {times} (the last one ended with {status})"
