"""One attempt at a message: inbox, filters and ``process``, follow-on events."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from outbox import PublishFailed, UnpublishedEvents
from outbox.backlog.notifier import ids
from outbox.consumers.definition import Consumer
from outbox.consumers.message.databases import (
    could_only_read,
    is_conflict,
    is_unavailable,
    refreshers,
)
from outbox.consumers.message.deduplication import InboxEntry
from outbox.consumers.message.follow_ons import MessageCollector
from outbox.consumers.message.republishing import republished
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Blocking, Call, Confirm, Parked, Steps, Written
from outbox.consumers.message.surrounded import surrounded
from outbox.consumers.outcome import (
    ACK,
    CANCELLED,
    DUPLICATE,
    Ack,
    Dead,
    Failed,
    Hold,
    InboxUnavailable,
    Outcome,
    Reject,
    Requeue,
    ResultsUnavailable,
    Return,
    Unconfirmed,
)
from outbox.consumers.raised import causes, leaves, text_of, unwrapped
from outbox.consumers.retry import RetryPolicy
from outbox.consumers.tasks.task_record import TaskRecord
from outbox.consumers.tracebacks import strip_engine
from outbox.messages.delivery import Delivery
from outbox.messages.received_event import ReceivedEvent
from outbox.report import Withdrawn
from outbox.results.result_row import CANCELLED as REFUSED_AS_CANCELLED
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["FAILURES", "Attempt", "begin", "decided", "refuse_awaitable", "result_of"]

logger = logging.getLogger("outbox.consumer")

FAILURES = (Exception, SystemExit, BaseExceptionGroup)
"""What ends an attempt, not the worker: ``sys.exit()`` in a handler, too."""


class Attempt:
    """One attempt at a message, with a collector and an inbox entry for itself.

    A late attempt goes on beside the one that replaces it. As they share neither, it can be shut
    out with ``revoke()`` and ``close()``.

    If something is kept of it, its message has made the ``record``. Without ``deduplicate`` it has
    also begun it.
    """

    __slots__ = ("_collector", "_consumer", "_delivery", "_entry", "_event", "_record", "_services")

    def __init__(
        self,
        consumer: Consumer,
        delivery: Delivery,
        event: ReceivedEvent,
        services: Services,
        record: TaskRecord | None,
    ) -> None:
        """Create the attempt, without running it yet."""
        self._consumer = consumer
        self._delivery = delivery
        self._event = event
        self._services = services
        self._collector = MessageCollector(
            services.publisher, event, auto_publish=consumer.auto_publish
        )
        self._entry: InboxEntry | None = None
        self._record = record

    def run(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message; never raises an ``Exception``."""
        outcome: Outcome | Failed | Unconfirmed
        token = self._collector.enter()
        try:
            outcome = yield from self._handle()
            if isinstance(outcome, Ack) and not (outcome.duplicate or outcome.cancelled):
                self._collector.refuse()
                if self._collector.has_events or self._entry is not None:
                    outcome = yield from self._finish(outcome)
        except FAILURES as error:
            outcome = yield from self._fail(error)
        finally:
            if self._entry is not None:
                self._entry.leave()  # a transaction of a callback must not note the message
            dropped = self._collector.end()
            Scope.leave(token)
        if dropped and not isinstance(outcome, Ack):
            logger.debug("dropped the follow-on events of %r: %s", self._event.id, ids(dropped))
        return outcome

    def revoke(self) -> bool:
        """Stop the inbox from noting the message; return whether it is too late. Thread-safe."""
        return self._entry is not None and self._entry.give_up()

    def close(self) -> None:
        """Drop the collected events, and refuse further ones. Thread-safe."""
        self._collector.end()

    def _handle(self) -> Steps[Outcome]:
        """Process the message in its surroundings, if there are any."""
        surroundings = self._services.surroundings
        if surroundings is None:
            return (yield from self._refreshed())
        return (yield from surrounded(surroundings, self._refreshed()))

    def _refreshed(self) -> Steps[Outcome]:
        """Process the message with fresh database connections, and clean them up afterwards."""
        calls = refreshers(is_async=self._consumer.is_async)
        if not calls:
            return (yield from self._process())
        yield from self._refresh(calls)
        try:
            outcome = yield from self._process()
        except FAILURES:
            yield from self._refresh(calls)
            raise
        yield from self._refresh(calls)
        return outcome

    def _refresh(self, calls: Sequence[Callable[[], Any]]) -> Steps[None]:
        for refresh in calls:
            try:
                yield Call(refresh)
            except Exception:  # the connection is broken already
                logger.debug("could not close a database connection", exc_info=True)

    def _process(self) -> Steps[Outcome]:
        consumer, event, services = self._consumer, self._event, self._services
        if consumer.deduplicate and services.inbox is not None:
            entry = self._entry = services.inbox.entry(consumer, event)
            record = self._record
            if (yield from _apart(entry.is_done)):
                if record is not None:
                    yield Blocking(record.complete)
                return DUPLICATE
            if record is not None:
                # Only now: of a duplicate, the row has the result already.
                refused = yield from begin(record, parks=False)
                if refused is not None:
                    return refused
                record.is_unique = True
                entry.accompany(record.note_on)
            # With auto_publish, events are published after the handler's commit: if that noted the
            # message, a crash in between would lose them.
            if not consumer.auto_publish:
                entry.join()
        filters = consumer.filters
        if filters.before or filters.after or filters.around:
            result = yield from self._around(filters.around)
        else:
            result = yield Call(consumer.process, (event,), consumer.time_limit)
        outcome = ACK if result is None else result
        if not isinstance(outcome, Ack | Dead | Return):
            refuse_awaitable(result, "process")
            raise TypeError(
                f"process() returned {result!r}; return None, ACK, REJECT or REQUEUE, "
                "and publish follow-on events with publish()"
            )
        return outcome

    def _finish(self, done: Ack) -> Steps[Ack | Unconfirmed]:
        """Publish the events that ``process`` left, and note that the message is done."""
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
            if not report.ok:
                yield from republished(report, self._delivery, self._services)
        if entry is not None:
            yield from _apart(entry.note)
        return done

    def _fail(self, error: BaseException) -> Steps[Outcome | Failed]:
        """Return the result of a failed attempt; the message may be done all the same."""
        strip_engine(error)
        result, entry = result_of(error), self._entry
        if entry is None:
            return result
        if entry.committed:
            if isinstance(result, Dead):
                return dataclasses.replace(result, is_done=True)
            failures = result.failures if isinstance(result, Failed) else ()
            return Failed(error, is_done=True, failures=failures)
        if isinstance(result, Failed):
            try:
                if (yield Blocking(entry.is_done)):
                    if self._record is not None:
                        yield Blocking(self._record.complete)
                    return DUPLICATE  # another attempt was faster, and this one was rolled back
            except Exception:  # unknown: the attempt counts as failed
                logger.debug("could not query the inbox", exc_info=True)
            if _is_conflict_of(entry, error):
                logger.warning(
                    "could not note message %r of %r in its handler's transaction: %s",
                    self._event.id,
                    self._consumer.queue,
                    text_of(error),
                )
                return Return()
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
        except GeneratorExit:  # the steps were closed: no further one can be taken
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
                refuse_awaitable((yield Call(getattr(consumer, name), (event,))), name)
        return result


def _apart(function: Callable[[], Any]) -> Steps[Any]:
    """Call a function of the inbox's entry that uses a transaction apart from the handler's.

    Raises:
        InboxUnavailable: that transaction isn't possible now, for no fault of the message.
    """
    try:
        return (yield Blocking(function))
    except Exception as error:
        if not (could_only_read(error) or is_conflict(error)):
            raise
        reason = text_of(error).partition("\n")[0]
        raise InboxUnavailable(f"the inbox can't be used now: {reason}") from error


def _is_conflict_of(entry: InboxEntry, error: BaseException) -> bool:
    """Return whether an attempt failed only since others were in the way of the inbox's statement.

    The statement is outbox's, and the transaction the handler's: only all of it can be repeated.
    """
    failure = entry.failure
    if failure is None or not is_conflict(failure):
        return False
    return all(any(cause is failure for cause in causes(leaf)) for leaf in leaves(error))


def begin(record: TaskRecord, *, parks: bool) -> Steps[Ack | Dead | None]:
    """Write that an attempt at a task begins; return an outcome if it may not.

    Args:
        record: the record of the attempt.
        parks: whether the engine goes on with another message meanwhile.

    Raises:
        ResultsUnavailable: that can't be written now.
    """
    write = record.begin()
    if not write.is_over:
        yield (Parked(write, is_last=False) if parks else Written(write))
    if write.error is not None:
        reason = text_of(write.error).partition("\n")[0]
        raise ResultsUnavailable(f"the task can't begin: {reason}") from write.error
    if not (write.refusal or write.rejection):
        record.began()
        return None
    record.is_refused = True
    if write.rejection:
        return Dead(f"its record can't be written: {write.rejection:.300}")
    if write.refusal == REFUSED_AS_CANCELLED:
        return CANCELLED
    return Dead(f"its id is that of another task, {write.refusal!r:.300}")


def refuse_awaitable(result: object, name: str) -> None:
    """Refuse what a plain consumer's method has returned, if it should have been awaited.

    Raises:
        TypeError: it is awaitable; the message names the method and the remedy.
    """
    if result is None or not inspect.isawaitable(result):
        return
    if inspect.iscoroutine(result):
        result.close()  # else Python warns that it was never awaited
    raise TypeError(
        f"{name}() returned {type(result).__qualname__!r}, which nothing awaits: a coroutine "
        "function behind a plain decorator? Make the decorator's wrapper `async def`"
    )


def result_of(error: BaseException) -> Outcome | Failed:
    """Return the result of an attempt that raised ``error``; of a group, the worst result.

    The order, from the worst: dead-lettered at once, failed, held, requeued. Only the first two are
    bounded: if one of the others decided, a failure that causes it could be repeated forever.
    """
    error = unwrapped(error)
    members = leaves(error)
    results = [_result_of(member) for member in members]
    worst = max(results, key=_severity)
    if members[0] is error:
        return worst
    match worst:
        case Dead():
            decisive = worst.error
            return dataclasses.replace(worst, error=error, decisive=decisive)
        case Failed():
            failures = tuple(result.error for result in results if isinstance(result, Failed))
            return Failed(error, failures=failures)
    return worst


def decided(
    policy: RetryPolicy, failed: Failed, attempts: int
) -> tuple[BaseException, float | None]:
    """Return the failure that decides, and the seconds until the next attempt; None to give up.

    Raises:
        Exception: a user-defined delay raised it.
    """
    failures = failed.failures or (failed.error,)
    if policy.names_group(failed.error):
        failures = (failed.error,)
    longest = 0.0
    for failure in failures:
        delay = policy.delay_after(failure, attempts)
        if delay is None:
            return failure, None
        longest = max(longest, delay)
    return failures[0], longest


def _severity(result: Outcome | Failed) -> int:
    return _FROM_BEST.index(type(result))


_FROM_BEST: list[type] = [Return, Hold, Failed, Dead]


def _result_of(error: BaseException) -> Outcome | Failed:
    match error:
        case Reject():
            return Dead(error.reason, error)
        case Requeue():
            return Return()
        case PublishFailed(is_of_message=True) if _has_rejected(error):
            return Dead(f"a follow-on event was rejected: {text_of(error)}", error)
        case UnpublishedEvents():
            return Dead(f"{type(error).__qualname__}: {text_of(error)}", error)
        case ResultsUnavailable() | InboxUnavailable():
            return Hold(error)
        case Exception() if (unavailable := _unavailable(error)) is not None:
            return Hold(unavailable, is_doubtful=could_only_read(unavailable))
        case _:
            return Failed(error)


def _has_rejected(error: PublishFailed) -> bool:
    """Return whether the broker has rejected a follow-on event for good."""
    return any(not isinstance(each, Withdrawn) for each in error.report.rejected)


def _unavailable(error: Exception) -> Exception | None:
    """Return what says that the broker or a database is unavailable: ``error`` or a cause."""
    for cause in causes(error):
        if isinstance(cause, PublishFailed) and cause.is_of_message:
            return None if _has_rejected(cause) else cause
    return error if is_unavailable(error) else None
