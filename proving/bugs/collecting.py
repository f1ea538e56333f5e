"""Bugs in units of work, in middleware, and at the end of a process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from outbox import EventCollector, Publisher
from outbox.backlog.chunk import Chunk
from outbox.middleware import request_collector
from outbox.system import process
from outbox.unit_of_work.auto_publishing import AutoPublishingEventCollector
from outbox.unit_of_work.unit_of_work import Buffer
from proving.bugs.bug import Bug

__all__ = ["BUGS"]


def _publish_before_commit() -> None:
    original = EventCollector.enqueue_event

    def enqueue_event(self: Any, payload: Any, target: Any, **options: Any) -> Any:
        event = original(self, payload, target, **options)
        self.publisher.submit([event])
        return event

    EventCollector.enqueue_event = enqueue_event  # type: ignore[method-assign]


def _exceptions_publish() -> None:
    def fail(self: Any, error: Any) -> None:
        if self._succeed():
            self.submit()
            self._end()

    AutoPublishingEventCollector._fail = fail  # type: ignore[method-assign]


def _error_responses_publish() -> None:
    def discard(self: Any, why: Any) -> None:
        if self._buffer.events:
            self._hand_over(self._buffer, self.publisher)

    request_collector.RequestCollector.discard = discard  # type: ignore[method-assign]


def _late_thrown_away() -> None:
    original = Buffer.append

    def append(self: Any, *arguments: Any) -> None:
        closed, self.closed = self.closed, False
        try:
            original(self, *arguments)
        finally:
            self.closed = closed

    Buffer.append = append  # type: ignore[method-assign, assignment]


def _submits_under_a_lock() -> None:
    prepare, hand_in, lock = Publisher.prepare, Publisher.hand_in, threading.Lock()

    def prepare_alone(self: Any, *arguments: Any, **options: Any) -> Any:
        lock.acquire()
        chunk = prepare(self, *arguments, **options)
        lock.release()
        return chunk

    def hand_in_alone(self: Any, *arguments: Any) -> None:
        lock.acquire()
        hand_in(self, *arguments)
        lock.release()

    Publisher.prepare = prepare_alone  # type: ignore[method-assign]
    Publisher.hand_in = hand_in_alone  # type: ignore[method-assign, assignment]


def _put_back_although_submitted() -> None:
    Chunk.revoke = lambda self: True  # type: ignore[method-assign]


def _configure_forgets() -> None:
    def retire(self: Any, successor: Any) -> None:
        self.close(0)

    Publisher.retire = retire  # type: ignore[method-assign]


def _no_drain_at_exit() -> None:
    original = Publisher.close

    def close(self: Any, timeout: float | None = None) -> Any:
        return original(self, 0)

    Publisher.close = close  # type: ignore[method-assign]


def _children_not_drained() -> None:
    process.run_exit_hooks_of = lambda child, package: None


BUGS: Sequence[Bug] = (
    Bug("publish-before-commit", "phantom", [], ["script"], _publish_before_commit),
    Bug("exceptions-publish", "phantom", [], ["script"], _exceptions_publish),
    Bug("error-responses-publish", "phantom", [], ["wsgi", "asgi"], _error_responses_publish),
    Bug(
        "late-thrown-away",
        "lost",
        [],
        ["script", "wsgi", "asgi"],
        _late_thrown_away,
        habits=["late"],
    ),
    Bug(
        "submits-under-a-lock",
        "did not end",
        [],
        ["script"],
        _submits_under_a_lock,
        habits=["interrupt"],
    ),
    Bug(
        "put-back-although-submitted",
        "delivered twice",
        [],
        ["script"],
        _put_back_although_submitted,
        habits=["interrupt"],
        tries=3,
    ),
    Bug("configure-forgets", "lost", ["refuse"], ["script"], _configure_forgets, habits=["rotate"]),
    Bug("no-drain-at-exit", "lost", ["refuse", "terminate script"], ["script"], _no_drain_at_exit),
    Bug("children-not-drained", "lost", ["refuse"], ["prefork"], _children_not_drained),
)
