"""Bugs in workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from outbox import PublishReport, ids
from outbox.consumers.message import follow_ons, message
from outbox.consumers.message.follow_ons import MessageCollector
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import Pause
from outbox.consumers.outcome import ACK, Dead, ProcessTimeout
from outbox.consumers.retry import RetryPolicy
from outbox.consumers.worker import task_engine
from outbox.messages.headers import ATTEMPT
from outbox.sql import inbox
from proving.bugs.bug import Bug

__all__ = ["BUGS"]


def _changed_copy(change: Callable[[Any], Any]) -> None:
    module: Any = message
    original = module.retry_copy
    module.retry_copy = lambda *arguments: change(original(*arguments))


def _ack_before_publish() -> None:
    original = Message.attempt

    def attempt(self: Any) -> Any:
        self._services.subscription.ack(self.delivery)
        return (yield from original(self))

    Message.attempt = attempt  # type: ignore[method-assign]


def _random_follow_on_ids() -> None:
    module: Any = follow_ons
    module.follow_on_id = lambda *parts: ids.new_id()


def _no_dead_letters() -> None:
    original = Message.settle

    def settle(self: Any, outcome: Any) -> Any:
        return (yield from original(self, ACK if isinstance(outcome, Dead) else outcome))

    Message.settle = settle  # type: ignore[method-assign]


def _noted_before_the_effect() -> None:
    def join(self: Any) -> None:
        self.note()

    inbox._Entry.join = join  # type: ignore[method-assign]


def _noted_after_the_effect() -> None:
    inbox._Entry.join = lambda self: None  # type: ignore[method-assign]


def _copy_not_confirmed() -> None:
    def send_on(self: Any, copy: Any, outcome: Any) -> Any:
        self._services.subscription.ack(self.delivery)
        self._services.publisher.submit([copy], keep=False)
        yield Pause(0)
        return outcome

    Message._send_on = send_on  # type: ignore[method-assign]


def _last_not_confirmed() -> None:
    def hand_over(self: Any) -> Any:
        self.submit()
        return SimpleNamespace(reported=PublishReport())

    MessageCollector.hand_over = hand_over  # type: ignore[method-assign]


def _attempt_header_lost() -> None:
    def lose(copy: Any) -> Any:
        headers = {name: value for name, value in copy.headers.items() if name != ATTEMPT}
        return dataclasses.replace(copy, headers=headers)

    _changed_copy(lose)


def _delay_lost() -> None:
    _changed_copy(lambda copy: dataclasses.replace(copy, deliver_at=None))


def _one_attempt_too_many() -> None:
    original = RetryPolicy.delay_after

    def delay_after(self: Any, error: Any, attempts: int) -> Any:
        return original(self, error, attempts - 1)

    RetryPolicy.delay_after = delay_after  # type: ignore[method-assign]


def _late_is_done() -> None:
    def give_up(self: Any, error: Any) -> Any:
        self.abandon()
        self._attempt.close()
        return (yield from self.settle(ACK))

    Message.give_up = give_up  # type: ignore[method-assign]


def _cancelled_is_done() -> None:
    module: Any = task_engine
    original = module.cancelled_in_time

    async def in_time(value: Any, seconds: float) -> Any:
        try:
            return await original(value, seconds)
        except ProcessTimeout:
            return None

    module.cancelled_in_time = in_time


_WORKING = ("script", "worker")


BUGS: Sequence[Bug] = (
    Bug(
        "ack-before-publish",
        "lost",
        ["kill holding worker"],
        ["script", "worker"],
        _ack_before_publish,
    ),
    Bug(
        "random-follow-on-ids",
        "new id",
        ["cut at ack"],
        ["script", "worker"],
        _random_follow_on_ids,
    ),
    Bug("no-dead-letters", "lost", [], ["script", "worker"], _no_dead_letters),
    Bug("noted-before-the-effect", "lost", [], (*_WORKING, "database"), _noted_before_the_effect),
    Bug(
        "noted-after-the-effect",
        "done twice",
        ["cut database at commit", "kill worker"],
        (*_WORKING, "database"),
        _noted_after_the_effect,
    ),
    Bug(
        "copy-not-confirmed",
        "lost",
        ["cut at publish", "kill holding worker"],
        _WORKING,
        _copy_not_confirmed,
    ),
    Bug(
        "last-not-confirmed",
        "lost",
        ["cut at publish", "kill holding worker"],
        _WORKING,
        _last_not_confirmed,
    ),
    Bug(
        "attempt-header-lost",
        "wrong number of attempts",
        [],
        _WORKING,
        _attempt_header_lost,
    ),
    Bug("delay-lost", "too early", [], _WORKING, _delay_lost),
    Bug("one-attempt-too-many", "wrong number of attempts", [], _WORKING, _one_attempt_too_many),
    Bug("late-is-done", "lost", [], _WORKING, _late_is_done),
    Bug("cancelled-is-done", "lost", [], _WORKING, _cancelled_is_done),
)
