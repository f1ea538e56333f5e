"""Deliberate bugs that the checker must catch.

Each changes the library in a way that could pass a review. It is planted at run time in the
programs under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from outbox import EventCollector, Publisher, PublishReport, ids
from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Entry, Fate
from outbox.configuration import default_publisher
from outbox.consumers.message import follow_ons, message
from outbox.consumers.message.follow_ons import MessageCollector
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import Pause
from outbox.consumers.outcome import ACK, Dead, ProcessTimeout
from outbox.consumers.retry import RetryPolicy
from outbox.consumers.worker import task_engine
from outbox.messages.headers import ATTEMPT
from outbox.middleware import request_collector
from outbox.sql import Store, inbox, row_fates, transaction, waves
from outbox.storage import rows, store
from outbox.transports.rabbitmq.transport import RabbitMQTransport
from outbox.unit_of_work.auto_publishing import AutoPublishingEventCollector

__all__ = ["BUGS", "Bug", "plant"]


_DURABLE = ("durable", "relay", "relay2")


@dataclass(frozen=True, slots=True)
class Bug:
    """A bug, and what exposes it.

    Attributes:
        name: the name on the command line.
        found_as: the kind of finding that must result, a key of :attr:`Verdict.findings`.
        faults: the faults that provoke it.
        kinds: the kinds of programs that it is planted in.
        plant: a function that changes the library.
    """

    name: str
    found_as: str
    faults: Sequence[str]
    kinds: Sequence[str]
    plant: Callable[[], None]


def plant(name: str) -> None:
    """Plant the bug called ``name`` in this process; an empty name plants none."""
    if name:
        next(bug for bug in BUGS if bug.name == name).plant()


def _ack_before_publish() -> None:
    original = Message.attempt

    def attempt(self: Any) -> Any:
        self._services.subscription.ack(self.delivery)
        return (yield from original(self))

    Message.attempt = attempt  # type: ignore[method-assign]


def _one_buffer() -> None:
    original = EventCollector._drop

    def drop(self: Any, events: Any) -> Any:
        transport: Any = self.publisher._transport()
        backlog = transport.backlog
        waiting = [*backlog._elsewhere, *backlog._queue]
        backlog.give_fate([entry for entry in waiting if entry.kept], Fate.WITHDRAWN)
        return original(self, events)

    EventCollector._drop = drop  # type: ignore[method-assign]


def _no_confirms() -> None:
    original = RabbitMQTransport._pump

    def pump(self: Any) -> None:
        original(self)
        self._finish_confirmed(list(self._confirms._outstanding.values()))

    RabbitMQTransport._pump = pump  # type: ignore[method-assign]


def _publish_before_commit() -> None:
    original = EventCollector.enqueue_event

    def enqueue_event(self: Any, payload: Any, target: Any, **options: Any) -> Any:
        event = original(self, payload, target, **options)
        self.publisher.submit([event])
        return event

    EventCollector.enqueue_event = enqueue_event  # type: ignore[method-assign]


def _new_ids_on_retry() -> None:
    original = Backlog.down

    def down(self: Any, entries: Any, error: Any) -> Any:
        for entry in entries:
            fresh = ids.new_id()
            entry.frames = entry.frames.replace(entry.event.id.encode(), fresh.encode())
            entry.event = dataclasses.replace(entry.event, id=fresh)
        return original(self, entries, error)

    Backlog.down = down  # type: ignore[method-assign]


def _exceptions_publish() -> None:
    def fail(self: Any, error: Any) -> None:
        if self._succeed():
            self.submit()
            self._end()

    AutoPublishingEventCollector._fail = fail  # type: ignore[method-assign]


def _kept_forgotten() -> None:
    original = Backlog.down

    def down(self: Any, entries: Any, error: Any) -> Any:
        news = original(self, (), error)
        self.give_fate(entries, Fate.WITHDRAWN)
        return news

    Backlog.down = down  # type: ignore[method-assign]


def _retries_reversed() -> None:
    def requeue(self: Any, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._elsewhere.pop(entry, None)
        self._queue.extendleft(entry for entry in entries if entry.fate is None)

    Backlog.requeue = requeue  # type: ignore[method-assign]


def _no_drain_at_exit() -> None:
    original = Publisher.close

    def close(self: Any, timeout: float | None = None) -> Any:
        return original(self, 0)

    Publisher.close = close  # type: ignore[method-assign]


def _random_follow_on_ids() -> None:
    module: Any = follow_ons
    module.follow_on_id = lambda *parts: ids.new_id()


def _nack_is_ack() -> None:
    def on_nacked(self: Any, entries: Any, *_numbers: Any) -> None:
        self._finish_confirmed(entries)

    transport: Any = RabbitMQTransport
    transport._on_nacked = on_nacked


def _returned_is_published() -> None:
    def handle_unroutable(self: Any, unroutable: Any) -> None:
        self._finish_confirmed([entry for entry, _reason in unroutable])

    RabbitMQTransport._handle_unroutable = handle_unroutable  # type: ignore[method-assign]


def _error_responses_publish() -> None:
    def discard(self: Any, why: Any) -> None:
        self.submit_quietly()

    request_collector.RequestCollector.discard = discard  # type: ignore[method-assign]


def _no_dead_letters() -> None:
    original = Message.settle

    def settle(self: Any, outcome: Any) -> Any:
        return (yield from original(self, ACK if isinstance(outcome, Dead) else outcome))

    Message.settle = settle  # type: ignore[method-assign]


def _claim_deletes() -> None:
    original = Store.claim

    def claim(self: Any, *arguments: Any, **options: Any) -> Any:
        rows = original(self, *arguments, **options)
        self.complete(rows)
        return rows

    Store.claim = claim  # type: ignore[method-assign]


def _stored_elsewhere() -> None:
    def store(session: Any, stored: Any, publisher: Any) -> None:
        Store(session.get_bind()).put([stored])

    transaction._store_in_session = store


def _released_is_committed() -> None:
    original = transaction._store_in_session

    def store(session: Any, stored: Any, publisher: Any) -> None:
        original(session, stored, publisher)
        session.info.setdefault("stored", []).append(stored)

    @event.listens_for(Session, "after_commit")
    def publish(session: Any) -> None:
        default_publisher().submit(session.info.pop("stored", ()))

    transaction._store_in_session = store


def _new_ids_when_read() -> None:
    original = rows.event_of

    def event_of(row: Any) -> Any:
        return dataclasses.replace(original(row), id=ids.new_id())

    module: Any = store
    module.event_of = event_of


def _order_ignored() -> None:
    original = Store.claim

    def claim(self: Any, *arguments: Any, **options: Any) -> Any:
        claimed = original(self, *arguments, **{**options, "ordered": False})
        return [*claimed[1::2], *claimed[::2]]

    Store.claim = claim  # type: ignore[method-assign]


def _left_is_done() -> None:
    original = row_fates.sort_out

    def sort_out(claimed: Any, report: Any) -> Any:
        fates = original(claimed, report)
        fates.done += fates.unconfirmed
        fates.unconfirmed = []
        return fates

    module: Any = waves
    module.sort_out = sort_out


def _noted_before_the_effect() -> None:
    def join(self: Any) -> None:
        self.note()

    inbox._Entry.join = join  # type: ignore[method-assign]


def _noted_after_the_effect() -> None:
    inbox._Entry.join = lambda self: None  # type: ignore[method-assign]


def _last_not_confirmed() -> None:
    def hand_over(self: Any) -> Any:
        self.submit()
        return SimpleNamespace(reported=PublishReport())

    MessageCollector.hand_over = hand_over  # type: ignore[method-assign]


def _copy_not_confirmed() -> None:
    def send_on(self: Any, copy: Any, outcome: Any) -> Any:
        self._services.subscription.ack(self.delivery)
        self._services.publisher.submit([copy], keep=False)
        yield Pause(0)
        return outcome

    Message._send_on = send_on  # type: ignore[method-assign]


def _changed_copy(change: Callable[[Any], Any]) -> None:
    module: Any = message
    original = module.retry_copy
    module.retry_copy = lambda *arguments: change(original(*arguments))


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
    Bug("one-buffer", "lost", ["refuse"], ["script"], _one_buffer),
    Bug("no-confirms", "lost", ["cut at publish"], ["script"], _no_confirms),
    Bug("publish-before-commit", "phantom", [], ["script"], _publish_before_commit),
    Bug(
        "new-ids-on-retry",
        "new id",
        ["cut at confirm", "cut at publish"],
        ["script"],
        _new_ids_on_retry,
    ),
    Bug("exceptions-publish", "phantom", [], ["script"], _exceptions_publish),
    Bug("kept-forgotten", "lost", ["cut at publish"], ["script"], _kept_forgotten),
    Bug("retries-reversed", "out of order", ["cut at publish"], ["script"], _retries_reversed),
    Bug("no-drain-at-exit", "lost", ["refuse", "terminate script"], ["script"], _no_drain_at_exit),
    Bug(
        "random-follow-on-ids",
        "new id",
        ["cut at ack"],
        ["script", "worker"],
        _random_follow_on_ids,
    ),
    Bug("nack-is-ack", "lost", ["full queue"], ["script"], _nack_is_ack),
    Bug("returned-is-published", "lost", ["unbind"], ["script"], _returned_is_published),
    Bug("error-responses-publish", "phantom", [], ["wsgi", "asgi"], _error_responses_publish),
    Bug("claim-deletes", "lost", ["cut at publish", "refuse"], _DURABLE, _claim_deletes),
    Bug("stored-elsewhere", "phantom", [], _DURABLE, _stored_elsewhere),
    Bug("released-is-committed", "phantom", [], _DURABLE, _released_is_committed),
    Bug("new-ids-when-read", "new id", [], _DURABLE, _new_ids_when_read),
    Bug("order-ignored", "out of order", ["kill durable"], _DURABLE, _order_ignored),
    Bug("left-is-done", "lost", ["cut at publish", "refuse"], _DURABLE, _left_is_done),
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
"""All bugs."""
