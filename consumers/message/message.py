"""The life of a message, from its delivery to its end. No I/O of its own; shared by every engine.

It is written as generators of *steps*: what is to be done next. An engine does it, waiting or
awaiting, and sends the result back. So there is one life, and it knows nothing of threads, tasks or
processes.

decode, look into the inbox, filters and ``process``, follow-on events, callbacks, settle.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Sequence
from typing import Any

from outbox import (
    BrokerError,
    Event,
    EventCollector,
    PublishFailed,
    PublishReport,
    UnpublishedEvents,
)
from outbox.backlog.notifier import ids
from outbox.consumers.current import set_current_message
from outbox.consumers.definition import Consumer
from outbox.consumers.message import databases, message_log
from outbox.consumers.message.copies import dead_letter, retry_copy
from outbox.consumers.message.databases import is_away
from outbox.consumers.message.deduplication import InboxEntry
from outbox.consumers.message.follow_ons import MessageCollector, _CallbackCollector
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Blocking, Call, Confirm, Pause, Steps
from outbox.consumers.outcome import (
    ACK,
    DUPLICATE,
    Ack,
    Again,
    Dead,
    Failed,
    Hold,
    Outcome,
    ProcessTimeout,
    Reject,
    Requeue,
    Return,
    Unconfirmed,
)
from outbox.consumers.received_event import ReceivedEvent, Undecodable, decode
from outbox.consumers.retry import Retry, RetryPolicy
from outbox.ids import new_id
from outbox.messages.delivery import Delivery
from outbox.unit_of_work import scope

__all__ = ["Message"]

logger = logging.getLogger("outbox.consumer")


_PAUSE = 0.5  # seconds between two looks whether the broker takes events again
_LONGEST_PAUSE = 30.0  # seconds, while a database is away
_FOR_RETRY = RetryPolicy()


class Message:
    """One message in the hands of a worker.

    Attributes:
        consumer: that processes it.
        delivery: as it came.
        event: decoded; None until then.
        is_given_up: whether somebody else ends it in the place of its attempt.
    """

    def __init__(self, consumer: Consumer, delivery: Delivery, services: Services) -> None:
        """Nothing is done yet. A message without an id gets one, for as long as it is here."""
        delivery.message_id = delivery.message_id or new_id()
        self.consumer = consumer
        self.delivery = delivery
        self.event: ReceivedEvent | None = None
        self._services = services
        self._collector: MessageCollector | None = None
        self._entry: InboxEntry | None = None
        self.is_given_up = False
        self._began = 0.0
        self._pause = _PAUSE

    def live(self) -> Steps[Outcome | Unconfirmed | None]:
        """Process the message and settle it.

        Returns:
            What became of it; ``Unconfirmed`` if ``confirmed()`` is to go on with it; None if it is
            left: another worker gets it.
        """
        self._began = message_log.started(self.delivery)
        result = yield from self.attempt()
        return (yield from self._follow(result))

    def confirmed(self, report: PublishReport) -> Steps[Outcome | Unconfirmed | None]:
        """Go on with a message that was ``Unconfirmed``, now that its chunk is reported.

        Returns:
            See :meth:`live`.
        """
        try:
            report.raise_for_failure()
        except PublishFailed as error:
            return (yield from self._follow(_of_exception(error)))
        return (yield from self._follow(ACK))

    def give_up(self, error: BaseException) -> Steps[Outcome | None]:
        """End the message in the place of an attempt that goes on and cannot be stopped.

        That attempt publishes nothing from now on, commits nothing that the inbox would note, and
        must not settle.
        """
        self.abandon()
        if self.event is not None:
            set_current_message(self.event)
        is_done = self._entry is not None and self._entry.give_up()
        result = Failed(error, is_done)
        if self._collector is not None:
            self._collector.end()
        if self._is_anothers(result):
            return None
        outcome = yield from self.conclude(result)
        return (yield from self.settle(outcome))

    def abandon(self) -> None:
        """Leave the message to whoever gives it up. Thread-safe."""
        self.is_given_up = True
        if self._entry is not None:
            self._entry.give_up()

    def attempt(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message once; never raises an ``Exception``."""
        try:
            event = self.event = self.event or decode(self.delivery)
        except Undecodable as error:
            return Dead(f"undecodable: {error}", error)
        set_current_message(event)
        collector = self._collector = MessageCollector(
            self._services.publisher, event, auto_publish=self.consumer.auto_publish
        )
        outcome: Outcome | Failed | Unconfirmed
        token = collector.enter()
        try:
            outcome = yield from self._handle(event)
            if isinstance(outcome, Ack) and not outcome.duplicate:
                outcome = (yield from self._finish(collector)) or outcome
        except (Exception, SystemExit) as error:  # a handler's sys.exit() is no worker's end
            outcome = failed = _of_exception(error)
            if self._entry is not None:
                outcome = yield from self._of_done(self._entry, failed, error)
        finally:
            if self._entry is not None:
                self._entry.leave()  # what callbacks commit is not the handler's
            left = collector.end()
            scope.leave(token)
        if left and not isinstance(outcome, Ack):
            logger.debug("dropped with %r: %s", event.id, ids(left))
        return outcome

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Decide what follows from an attempt, and tell the consumer."""
        consumer, event = self.consumer, self.event
        outcome = self._decide(result) if isinstance(result, Failed) else result
        if isinstance(result, Dead) and event is not None:  # at once, but perhaps not at first
            outcome = dataclasses.replace(
                result, attempts=event.attempt, first_failure=event.first_failure
            )
        told = consumer.callbacks
        if event is None or not told:  # undecodable: there is nothing that it could be told
            return outcome
        if isinstance(result, Failed):
            if isinstance(result.error, ProcessTimeout) and "on_timeout" in told:
                yield from self._tell(event, consumer.on_timeout, event)
            if "on_failure" in told:
                yield from self._tell(event, consumer.on_failure, event, result.error)
        if isinstance(outcome, Dead) and "on_dead" in told:
            yield from self._tell(event, consumer.on_dead, event, outcome.reason)
        if outcome is not DUPLICATE and isinstance(outcome, Ack) and "on_success" in told:
            yield from self._tell(event, consumer.on_success, event)
        return outcome

    def settle(self, outcome: Outcome) -> Steps[Outcome | None]:
        """Do with the delivery what ``outcome`` says: the one place that settles messages."""
        subscription, delivery = self._services.subscription, self.delivery
        copy: Event | None = None
        if isinstance(outcome, Again):
            copy = retry_copy(delivery, outcome)
            if copy is None:
                reason = "its headers cannot be sent again with a retry's"
                outcome = Dead(reason, outcome.error, outcome.attempts)
        if isinstance(outcome, Dead):
            copy = dead_letter(delivery, outcome)
        message_log.ended(delivery, outcome, self._began)
        match outcome:
            case Ack():
                subscription.ack(delivery)
            case Return(delay=delay):
                subscription.requeue(delivery, delay)
            case Hold():
                raise AssertionError("a held message is processed again, not settled")
        return outcome if copy is None else (yield from self._send_on(copy, outcome))

    def _follow(
        self, result: Outcome | Failed | Unconfirmed
    ) -> Steps[Outcome | Unconfirmed | None]:
        """Do what follows from an attempt; where that is another attempt, from that one, too."""
        while not isinstance(result, Unconfirmed):
            if self.is_given_up or self._is_anothers(result):
                return None
            outcome = yield from self.conclude(result)
            if not isinstance(outcome, Hold):
                return (yield from self.settle(outcome))
            logger.warning("holding message %r: %s", self.delivery.message_id, outcome.error)
            seconds = _PAUSE if outcome.is_brokers else self._pause
            if not (yield from self._until_ready(seconds, outcome)):
                return None
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            result = yield from self.attempt()
        return result

    def _is_anothers(self, result: Outcome | Failed) -> bool:
        """Return whether it comes again anyway: then a copy of it would be one too many."""
        if not self._is_left(result):
            return False
        logger.info("message %r is no longer ours: it comes again", self.delivery.message_id)
        return True

    def _is_left(self, result: Outcome | Failed) -> bool:
        """Return whether somebody else gets the message, and does with it what is to be done."""
        if isinstance(result, Ack) or (isinstance(result, Failed | Dead) and result.is_done):
            return False
        return self._services.subscription.is_stale(self.delivery)

    def _handle(self, event: ReceivedEvent) -> Steps[Outcome]:
        """Process the message, with fresh connections, which are left again where it is done."""
        refreshers = databases.refreshers(is_async=self.consumer.is_async)
        yield from self._refresh(refreshers)
        try:
            outcome = yield from self._process(event)
        except (Exception, SystemExit):
            yield from self._refresh(refreshers)
            raise
        yield from self._refresh(refreshers)
        return outcome

    def _refresh(self, refreshers: Sequence[Callable[[], Any]]) -> Steps[None]:
        for refresh in refreshers:
            try:
                yield Call(refresh)
            except Exception:  # of a connection that is broken already
                logger.debug("a connection could not be closed", exc_info=True)

    def _process(self, event: ReceivedEvent) -> Steps[Outcome]:
        consumer, services = self.consumer, self._services
        if consumer.deduplicate and services.inbox is not None:
            entry = self._entry = services.inbox.entry(consumer, event)
            if (yield Blocking(entry.is_done)):
                return DUPLICATE
            if not consumer.auto_publish:  # else its events come after the handler's commit
                entry.join()
        if consumer.filters:
            result = yield from self._around(consumer.filters.around, event)
        else:
            result = yield Call(consumer.process, (event,), consumer.time_limit)
        outcome = ACK if result is None else result
        if not isinstance(outcome, Ack | Dead | Return):
            raise TypeError(
                f"process() returned {result!r}; return None, ACK, REJECT or REQUEUE, "
                "and publish follow-on events with publish()"
            )
        return outcome

    def _finish(self, collector: MessageCollector) -> Steps[Unconfirmed | None]:
        """Publish what the message has enqueued, and note that it is done.

        Returns:
            ``Unconfirmed`` if nothing but the confirms is missing.
        """
        entry = self._entry
        if len(collector):
            if not self.consumer.auto_publish:
                raise UnpublishedEvents(tuple(one.id for one in collector.events))
            is_last = entry is None and "on_success" not in self.consumer.callbacks
            chunk = collector.hand_over()
            if is_last and chunk.reported is None and self._services.overlaps:
                return Unconfirmed(chunk)
            report: PublishReport = yield Confirm(chunk)
            report.raise_for_failure()
        if entry is not None:
            yield Blocking(entry.note)
        return None

    def _of_done(
        self, entry: InboxEntry, outcome: Outcome | Failed, error: BaseException
    ) -> Steps[Outcome | Failed]:
        """Return what became of a message that failed, but is perhaps done all the same."""
        if entry.committed:
            if isinstance(outcome, Dead):
                return dataclasses.replace(outcome, is_done=True)
            return Failed(error, is_done=True)
        if isinstance(outcome, Failed):
            try:
                if (yield Blocking(entry.is_done)):
                    return DUPLICATE  # another one was faster, and what this one did was taken back
            except Exception:  # it has failed, then
                logger.debug("the inbox could not be asked", exc_info=True)
        return outcome

    def _around(self, names: Sequence[str], event: ReceivedEvent) -> Steps[Any]:
        if not names:
            return (yield from self._before_and_after(event))
        manager = getattr(self.consumer, names[0])(event)
        is_async = hasattr(manager, "__aenter__")
        end = manager.__aexit__ if is_async else manager.__exit__
        yield Call(manager.__aenter__ if is_async else manager.__enter__)
        try:
            result = yield from self._around(names[1:], event)
        except GeneratorExit:
            raise
        except BaseException as error:
            if not (yield Call(end, (type(error), error, error.__traceback__))):
                raise
            return None
        yield Call(end, (None, None, None))
        return result

    def _before_and_after(self, event: ReceivedEvent) -> Steps[Any]:
        consumer, filters = self.consumer, self.consumer.filters
        for name in filters.before:
            result = yield Call(getattr(consumer, name), (event,))
            if result is not None:
                return result
        result = yield Call(consumer.process, (event,), consumer.time_limit)
        if result is None or isinstance(result, Ack):
            for name in filters.after:
                yield Call(getattr(consumer, name), (event,))
        return result

    def _decide(self, failed: Failed) -> Again | Dead:
        event, error = self.event, failed.error
        attempts = 1 if event is None else event.attempt
        first = (event and event.first_failure) or datetime.datetime.now(datetime.UTC)
        reason = f"{type(error).__qualname__}: {_text(error)}"
        if failed.is_done:
            # Somebody has to see to what is missing.
            reason = f"failed after its transaction had been committed: {reason}"
            return Dead(reason, error, attempts, first, is_done=True)
        policy = self.consumer.retry
        if policy is None and isinstance(error, Retry):
            policy = _FOR_RETRY
        if policy is not None:
            try:
                delay = policy.delay_after(error, attempts)
            except Exception as wrong:  # in a delay of the user's own
                logger.exception("the retry policy of %r failed", self.consumer)
                error.add_note(f"and then the retry policy failed: {wrong!r}")
                delay = None
            if delay is not None:
                return Again(delay, error, attempts, first)
        return Dead(reason, error, attempts, first)

    def _tell(self, event: ReceivedEvent, call: Callable[..., Any], *arguments: Any) -> Steps[None]:
        """Call back; what that enqueues is published and kept like a request's."""
        collector = _CallbackCollector(self._services.publisher, event, auto_publish=True)
        with EventCollector.use(collector):
            try:
                yield Call(call, arguments)
                if collector.events:
                    yield Confirm(collector.hand_over())
            except (Exception, SystemExit):
                logger.exception("%s of %r failed", call.__name__, self.consumer)
            finally:
                collector.end()

    def _send_on(self, copy: Event, outcome: Outcome) -> Steps[Outcome | None]:
        """Publish what takes the message's place, and ack it when that is confirmed."""
        services = self._services
        while True:
            chunk = services.publisher.submit_chunk([copy], keep=False)
            report: PublishReport = yield Confirm(chunk)
            if report.ok:
                services.subscription.ack(self.delivery)
                return outcome
            logger.error("%r is not published yet: %s", copy, report)
            if report.error is None:
                services.subscription.declare_again()  # somebody deleted the queue
            if not (yield from self._until_ready(_PAUSE, outcome)):
                if isinstance(outcome, Dead) and outcome.is_done:
                    logger.error("%r of a message that is done is lost: %s", copy, outcome.reason)
                return None

    def _until_ready(self, seconds: float, outcome: Outcome) -> Steps[bool]:
        """Wait so long, and for the broker; return False if the message is no longer ours."""
        services = self._services
        yield Pause(seconds)
        while not services.is_stopping and not self._is_left(outcome):
            if services.publisher.connected:
                return True
            yield Pause(_PAUSE)
        return False


def _of_exception(error: BaseException) -> Outcome | Failed:
    match error:
        case Reject():
            return Dead(error.reason, error)
        case Requeue():
            return Return()
        case PublishFailed() if error.report.error is None:
            return Dead(f"a follow-on was rejected: {_text(error)}", error)
        case UnpublishedEvents():
            return Dead(f"{type(error).__qualname__}: {_text(error)}", error)
        case BrokerError():
            return Hold(error)
        case Exception() if is_away(error):
            return Hold(error)
        case _:
            return Failed(error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as why:  # the application's own exception, which need not be sound
        return f"(its text cannot be told: {type(why).__qualname__})"
