"""Bugs on the way from the publisher to the broker."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from outbox import EventCollector, ids
from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Entry, Fate
from outbox.transports.rabbitmq.channel_faults import ChannelFaults, Verdict
from outbox.transports.rabbitmq.transport import RabbitMQTransport
from proving.bugs.bug import Bug

__all__ = ["BUGS"]


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


def _new_ids_on_retry() -> None:
    original = Backlog.down

    def down(self: Any, entries: Any, error: Any) -> Any:
        for entry in entries:
            fresh = ids.new_id()
            entry.frames = entry.frames.replace(entry.event.id.encode(), fresh.encode())
            entry.event = dataclasses.replace(entry.event, id=fresh)
        return original(self, entries, error)

    Backlog.down = down  # type: ignore[method-assign]


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


def _nack_is_ack() -> None:
    def on_nacked(self: Any, entries: Any, *_numbers: Any) -> None:
        self._finish_confirmed(entries)

    transport: Any = RabbitMQTransport
    transport._on_nacked = on_nacked


def _returned_is_published() -> None:
    def handle_unroutable(self: Any, unroutable: Any) -> None:
        self._finish_confirmed([entry for entry, _reason in unroutable])

    RabbitMQTransport._handle_unroutable = handle_unroutable  # type: ignore[method-assign]


def _refusals_reject() -> None:
    original = ChannelFaults.judge

    def judge(self: Any, entries: Any, code: int, text: str) -> Any:
        if code != 403:
            return original(self, entries, code, text)
        return Verdict(again=entries[1:], rejected=entries[:1])

    ChannelFaults.judge = judge  # type: ignore[method-assign]


def _one_fate_for_all() -> None:
    original = RabbitMQTransport._handle_unroutable

    def handle_unroutable(self: Any, unroutable: Any) -> None:
        together = [(entry, reason) for each, reason in unroutable for entry in each.chunk.entries]
        original(self, list(dict.fromkeys(together)))

    RabbitMQTransport._handle_unroutable = handle_unroutable  # type: ignore[method-assign]


def _unroutable_waited_for() -> None:
    original = RabbitMQTransport._handle_unroutable

    def handle_unroutable(self: Any, unroutable: Any) -> None:
        time.sleep(8)  # "the exchange may be about to be declared"
        original(self, unroutable)

    RabbitMQTransport._handle_unroutable = handle_unroutable  # type: ignore[method-assign]


BUGS: Sequence[Bug] = (
    Bug("one-buffer", "lost", ["refuse"], ["script"], _one_buffer),
    Bug("no-confirms", "lost", ["cut at publish"], ["script"], _no_confirms),
    Bug(
        "new-ids-on-retry",
        "new id",
        ["cut at confirm", "cut at publish"],
        ["script"],
        _new_ids_on_retry,
    ),
    Bug("kept-forgotten", "lost", ["cut at publish"], ["script"], _kept_forgotten),
    Bug("retries-reversed", "out of order", ["cut at publish"], ["script"], _retries_reversed),
    Bug("nack-is-ack", "lost", ["full queue"], ["script"], _nack_is_ack),
    Bug("returned-is-published", "lost", ["unbind"], ["script"], _returned_is_published),
    Bug("refusals-reject", "lost", ["no permission"], ["script"], _refusals_reject),
    Bug(
        "unroutable-waited-for",
        "too late",
        [],
        ["script"],
        _unroutable_waited_for,
        habits=["misaddressed"],
    ),
    Bug(
        "one-fate-for-all",
        "misplaced",
        [],
        ["script"],
        _one_fate_for_all,
        habits=["misaddressed"],
    ),
)
