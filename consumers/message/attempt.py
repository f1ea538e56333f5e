"""One attempt at a message: inbox, filters and ``process``, follow-on events."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from outbox import BrokerError, PublishFailed, UnpublishedEvents
from outbox.backlog.notifier import ids
from outbox.consumers.definition import Consumer
from outbox.consumers.message.databases import is_away, refreshers
from outbox.consumers.message.deduplication import InboxEntry
from outbox.consumers.message.follow_ons import MessageCollector
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Blocking, Call, Confirm, Steps
from outbox.consumers.outcome import (
    ACK,
    DUPLICATE,
    Ack,
    Dead,
    Failed,
    Hold,
    Outcome,
    Reject,
    Requeue,
    Return,
    Unconfirmed,
)
from outbox.consumers.received_event import ReceivedEvent
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["Attempt", "result_of", "text_of"]

logger = logging.getLogger("outbox.consumer")


class Attempt:
    """One attempt at a message, with its own collector and its own view of the inbox."""

    __slots__ = ("_collector", "_consumer", "_entry", "_event", "_services")

    def __init__(self, consumer: Consumer, event: ReceivedEvent, services: Services) -> None:
        """Nothing is done yet."""
        self._consumer = consumer
        self._event = event
        self._services = services
        self._collector = MessageCollector(
            services.publisher, event, auto_publish=consumer.auto_publish
        )
        self._entry: InboxEntry | None = None

    def run(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message; never raises an ``Exception``."""
        outcome: Outcome | Failed | Unconfirmed
        token = self._collector.enter()
        try:
            outcome = yield from self._handle()
            if isinstance(outcome, Ack) and not outcome.duplicate:
                outcome = yield from self._finish(outcome)
        except (Exception, SystemExit) as error:  # a handler's sys.exit() is no worker's end
            outcome = yield from self._fail(error)
        finally:
            if self._entry is not None:
                self._entry.leave()  # what callbacks commit is not the handler's
            left = self._collector.end()
            Scope.leave(token)
        if left and not isinstance(outcome, Ack):
            logger.debug("dropped with %r: %s", self._event.id, ids(left))
        return outcome

    def revoke(self) -> bool:
        """Have the inbox note nothing from now on; return whether it is too late. Thread-safe."""
        return self._entry is not None and self._entry.give_up()

    def close(self) -> None:
        """Publish nothing from now on. Thread-safe."""
        self._collector.end()

    def _handle(self) -> Steps[Outcome]:
        """Process the message, with fresh connections, which are left again where it is done."""
        calls = refreshers(is_async=self._consumer.is_async)
        yield from self._refresh(calls)
        try:
            outcome = yield from self._process()
        except (Exception, SystemExit):
            yield from self._refresh(calls)
            raise
        yield from self._refresh(calls)
        return outcome

    def _refresh(self, calls: Sequence[Callable[[], Any]]) -> Steps[None]:
        for refresh in calls:
            try:
                yield Call(refresh)
            except Exception:  # of a connection that is broken already
                logger.debug("a connection could not be closed", exc_info=True)

    def _process(self) -> Steps[Outcome]:
        consumer, event, services = self._consumer, self._event, self._services
        if consumer.deduplicate and services.inbox is not None:
            entry = self._entry = services.inbox.entry(consumer, event)
            if (yield Blocking(entry.is_done)):
                return DUPLICATE
            if not consumer.auto_publish:  # else its events come after the handler's commit
                entry.join()
        filters = consumer.filters
        if filters.before or filters.after or filters.around:
            result = yield from self._around(filters.around)
        else:
            result = yield Call(consumer.process, (event,), consumer.time_limit)
        outcome = ACK if result is None else result
        if not isinstance(outcome, Ack | Dead | Return):
            raise TypeError(
                f"process() returned {result!r}; return None, ACK, REJECT or REQUEUE, "
                "and publish follow-on events with publish()"
            )
        return outcome

    def _finish(self, done: Ack) -> Steps[Ack | Unconfirmed]:
        """Publish what the message has enqueued, and note that it is done."""
        collector, entry = self._collector, self._entry
        if collector.has_events:
            if not self._consumer.auto_publish:
                raise UnpublishedEvents(tuple(event.id for event in collector.events))
            is_last = entry is None and "on_success" not in self._consumer.callbacks
            chunk = collector.hand_over()
            report = chunk.reported
            if report is None:
                if is_last and self._services.overlaps:
                    return Unconfirmed(chunk)
                report = yield Confirm(chunk)
            report.raise_for_failure()
        if entry is not None:
            yield Blocking(entry.note)
        return done

    def _fail(self, error: BaseException) -> Steps[Outcome | Failed]:
        """Return the result of an attempt that failed; the message may be done all the same."""
        result, entry = result_of(error), self._entry
        if entry is None:
            return result
        if entry.committed:
            if isinstance(result, Dead):
                return dataclasses.replace(result, is_done=True)
            return Failed(error, is_done=True)
        if isinstance(result, Failed):
            try:
                if (yield Blocking(entry.is_done)):
                    return DUPLICATE  # another one was faster, and what this one did was taken back
            except Exception:  # it has failed, then
                logger.debug("the inbox could not be asked", exc_info=True)
        return result

    def _around(self, names: Sequence[str]) -> Steps[Any]:
        if not names:
            return (yield from self._before_and_after())
        manager = getattr(self._consumer, names[0])(self._event)
        is_async = hasattr(manager, "__aenter__")
        end = manager.__aexit__ if is_async else manager.__exit__
        yield Call(manager.__aenter__ if is_async else manager.__enter__)
        try:
            result = yield from self._around(names[1:])
        except GeneratorExit:
            raise
        except BaseException as error:
            if not (yield Call(end, (type(error), error, error.__traceback__))):
                raise
            return None
        yield Call(end, (None, None, None))
        return result

    def _before_and_after(self) -> Steps[Any]:
        consumer, event, filters = self._consumer, self._event, self._consumer.filters
        for name in filters.before:
            result = yield Call(getattr(consumer, name), (event,))
            if result is not None:
                return result
        result = yield Call(consumer.process, (event,), consumer.time_limit)
        if result is None or isinstance(result, Ack):
            for name in filters.after:
                yield Call(getattr(consumer, name), (event,))
        return result


def result_of(error: BaseException) -> Outcome | Failed:
    """Return what an exception makes of an attempt."""
    match error:
        case Reject():
            return Dead(error.reason, error)
        case Requeue():
            return Return()
        case PublishFailed() if error.report.error is None:
            return Dead(f"a follow-on was rejected: {text_of(error)}", error)
        case UnpublishedEvents():
            return Dead(f"{type(error).__qualname__}: {text_of(error)}", error)
        case BrokerError():
            return Hold(error)
        case Exception() if is_away(error):
            return Hold(error)
        case _:
            return Failed(error)


def text_of(error: BaseException) -> str:
    """Return the text of ``error``, which may be unsound: it is the application's own."""
    try:
        return str(error)
    except Exception as why:
        return f"(its text cannot be told: {type(why).__qualname__})"
