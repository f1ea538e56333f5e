"""The life of a message, from delivery to settlement. Does no I/O; shared by every engine.

It is written as generators of *steps*. An engine takes a step, waiting or awaiting, and sends the
result back. So there is only one life, which knows nothing of threads, tasks or processes.

The order is: decode, check the inbox, run filters and ``process``, publish follow-on events, note
the message in the inbox (unless the handler's transaction has), call back, settle. That a task
begins is written first, and how it has ended just before its message is settled. The ack comes
last, after the confirms of the follow-on events, or of the copy that replaces a failed message: a
crash in between may duplicate a message, but can't lose it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any, TypeGuard

from outbox import (
    BrokerError,
    Event,
    EventCollector,
    Nacked,
    PublishFailed,
    PublishReport,
)
from outbox.consumers.current import set_current_message
from outbox.consumers.definition import Consumer
from outbox.consumers.message import message_log
from outbox.consumers.message.attempt import (
    FAILURES,
    Attempt,
    begin,
    decided,
    refuse_awaitable,
    result_of,
)
from outbox.consumers.message.copies import dead_letter, next_attempt, retry_copy
from outbox.consumers.message.follow_ons import CallbackCollector
from outbox.consumers.message.republishing import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PATIENCE,
    republished,
)
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Call, Closing, Confirm, Parked, Pause, Steps, Written
from outbox.consumers.message.surrounded import surrounded, taken
from outbox.consumers.message.tally import ThreadTally
from outbox.consumers.message.traced import end_processing
from outbox.consumers.outcome import (
    ACK,
    CANCELLED,
    DUPLICATE,
    EXPIRED,
    Ack,
    Again,
    Dead,
    Failed,
    FollowOnsRefused,
    Hold,
    NotYet,
    Outcome,
    ProcessTimeout,
    ResultsUnavailable,
    Return,
    Unconfirmed,
)
from outbox.consumers.raised import text_of
from outbox.consumers.retry import Retry, RetryPolicy
from outbox.consumers.tasks.task_record import TaskRecord, record_of
from outbox.consumers.tracebacks import strip_engine
from outbox.messages.delivery import Delivery
from outbox.messages.expiry import has_expired
from outbox.messages.headers import EXPIRES_AT
from outbox.messages.received_event import ReceivedEvent, Undecodable, decode
from outbox.system import signals
from outbox.telemetry import tracing

__all__ = ["LONGEST_WAIT", "Message", "may_be_excused"]

logger = logging.getLogger("outbox.consumer")

_REFUSED = (10.0, 60.0)
"""Seconds before a handler runs again whose publish() was refused, at first and from then on: its
effects are repeated with it."""
LONGEST_WAIT = 600.0
"""Seconds that a message may wait here: RabbitMQ takes back what isn't acked within 30 minutes."""
_NO_ROOM = 3
"""Refusals of a retry's copy after which the next attempt begins here: the queue may be full for as
long as its worker waits for room in it."""
_SOON = 30.0  # seconds: the longest delay of an attempt that begins here
_LOGGED_EVERY = 600.0  # seconds, for what goes on being refused
_ONLY_AFTER_RETRY = RetryPolicy(on=())  # of a consumer without a policy


class Message:
    """A message that a worker processes.

    Attributes:
        consumer: the consumer that processes it.
        delivery: the delivery, as it arrived.
        event: the decoded event; None until then.
        is_given_up: whether ``give_up()`` ends the message instead of its attempt.
        is_acked: whether all is done, so that an ack is all that the message needs, also if it is
            redelivered.
        processing: the latest attempt, for the tracer; None without one.
        tally: the counters of the thread that runs it now, if its engine has set them.
    """

    # On the class: few messages change them.
    is_given_up = False
    is_acked = False
    processing: tracing.Processing | None = None
    tally: ThreadTally | None = None
    _pause = FIRST_PAUSE
    _waiting_since: float | None = None
    _refused_since: float | None = None
    _doubtful_since: float | None = None
    _goes_on_here = False
    _keeps_results = False
    _record: TaskRecord | None = None

    def __init__(self, consumer: Consumer, delivery: Delivery, services: Services) -> None:
        """Create the message, without processing it yet. Without an id it gets a temporary one."""
        delivery.message_id = delivery.message_id or delivery.id_or_new
        self.consumer = consumer._for(delivery)
        self.delivery = delivery
        self.event: ReceivedEvent | None = None
        self._services = services
        self._attempt: Attempt | None = None
        self._began = 0.0
        if self.consumer._keeps is not None and services.results is not None:
            self._keeps_results = True

    def live(self) -> Steps[Outcome | Unconfirmed | None]:
        """Process the message and settle it.

        Returns:
            The outcome; ``Unconfirmed`` if ``confirmed()`` must follow when the chunk is reported;
            None if the message is left unsettled, to be redelivered.
        """
        self._began = message_log.started(self.delivery)
        try:
            return (yield from self._follow((yield from self.attempt())))
        except BaseException:
            self._over()
            if not self.is_given_up:
                self._let_go()
                if self.processing is not None:
                    end_processing(self.processing, None)
            raise

    def confirmed(self, report: PublishReport) -> Steps[Outcome | Unconfirmed | None]:
        """Continue an ``Unconfirmed`` message, now that its chunk is reported.

        Returns:
            See :meth:`live`.
        """
        try:
            if not report.ok:
                yield from republished(report, self.delivery, self._services)
        except (FollowOnsRefused, PublishFailed) as error:
            return (yield from self._follow(result_of(error)))
        return (yield from self._follow(ACK))

    def give_up(self, error: BaseException) -> Steps[Outcome | None]:
        """End the message instead of its attempt, which goes on and can't be stopped.

        From now on the attempt can publish nothing, can't commit a transaction that would note the
        message in the inbox, and must not settle.
        """
        self._over()
        self.abandon()
        if self.event is not None:
            set_current_message(self.event)
        if self.processing is not None:
            self.processing.enter()  # here, too: this is another context
        attempt = self._attempt
        # If the late attempt's commit won the race, a retry would be skipped as a duplicate.
        result = Failed(error, is_done=attempt is not None and attempt.revoke())
        if attempt is not None:
            attempt.close()
        if self._is_lost(result):
            self._leave()
            return None
        outcome = yield from self.conclude(result)
        if self.processing is not None:
            end_processing(self.processing, outcome)
        return (yield from self.settle(outcome))

    def abandon(self) -> None:
        """Leave the message to :meth:`give_up`. Thread-safe."""
        self.is_given_up = True
        if self._attempt is not None:
            self._attempt.revoke()

    def bury(self, reason: str) -> Steps[Outcome | None]:
        """Dead-letter the message, whatever has become of its attempts."""
        return self.settle(Dead(reason, attempts=self.delivery.attempt))

    def attempt(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message once; never raises an ``Exception``."""
        headers = self.delivery.headers
        if headers and EXPIRES_AT in headers and has_expired(headers):
            # Those of an earlier attempt: no callback is called, and no attempt begins.
            self.event = self.processing = None
            return EXPIRED
        tracer = tracing.seam.tracer
        if tracer is not None:
            settings = self._services.publisher.settings
            self.processing = tracer.processing(self.delivery, settings)
            self.processing.enter()
        refused = None
        if self._keeps_results:
            try:
                refused = yield from self._begin()
            except ResultsUnavailable as error:
                self._attempt = None
                return Hold(error)
        try:
            event = self.event = decode(self.delivery)  # an earlier attempt may have changed it
        except Undecodable as error:
            return Dead(f"undecodable: {error}", error)
        set_current_message(event)
        if refused is not None:
            return refused
        self._attempt = Attempt(self.consumer, self.delivery, event, self._services, self._record)
        return (yield from self._attempt.run())

    def _begin(self) -> Steps[Ack | Dead | None]:
        """Write that an attempt at a task begins; return an outcome if it may not.

        Before anything is made that belongs to the attempt: of quick tasks, many wait here.

        Raises:
            ResultsUnavailable: that can't be written now.
        """
        services, consumer = self._services, self.consumer
        self._record = self._new_record()
        if self._record is None or (consumer.deduplicate and services.inbox is not None):
            return None  # the attempt looks into the inbox before it begins
        parks = services.overlaps and self._record.is_quick
        return (yield from begin(self._record, parks=parks))

    def _new_record(self) -> TaskRecord | None:
        results = self._services.results
        return None if results is None else record_of(self.consumer, self.delivery, results)

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Decide what follows from an attempt, and call the consumer's callbacks."""
        consumer, event = self.consumer, self.event
        outcome = self._decide(result) if isinstance(result, Failed) else result
        if isinstance(result, Dead) and event is not None:  # rejected, maybe after failed attempts
            outcome = dataclasses.replace(
                result, attempts=event.attempt, first_failure=event.first_failure
            )
        callbacks = consumer.callbacks
        if event is None or not callbacks:  # an undecodable message has no event to call them with
            if self._keeps_results:
                yield from self._write_end(outcome)
            return outcome
        if isinstance(result, Failed):
            failures = result.failures or (result.error,)
            timed_out = any(isinstance(failure, ProcessTimeout) for failure in failures)
            if timed_out and "on_timeout" in callbacks:
                yield from self._call_back(event, consumer.on_timeout)
            if "on_failure" in callbacks:
                yield from self._call_back(event, consumer.on_failure, result.error)
        if isinstance(outcome, Dead) and "on_dead" in callbacks:
            yield from self._call_back(event, consumer.on_dead, outcome.reason)
        if (
            isinstance(outcome, Ack)
            and outcome not in (DUPLICATE, CANCELLED)
            and "on_success" in callbacks
        ):
            yield from self._call_back(event, consumer.on_success)
        if self._keeps_results:
            yield from self._write_end(outcome)
        return outcome

    def _write_end(self, outcome: Outcome) -> Steps[None]:
        """Write how a task has ended, before its message is settled."""
        # Without one, it has not begun here, or only in a subprocess that is gone.
        record = self._record or self._new_record()
        write = None if record is None else record.end(outcome)
        if write is not None and not write.is_over:
            is_last = isinstance(outcome, Ack)
            yield (Parked(write, is_last) if self._services.overlaps else Written(write))

    def settle(self, outcome: Outcome) -> Steps[Outcome | None]:
        """Settle the delivery as ``outcome`` says: the one place that settles messages."""
        subscription, delivery = self._services.subscription, self.delivery
        copy: Event | None = None
        in_place = self.consumer.ordered and subscription.keeps_order
        if isinstance(outcome, Again) and not in_place:
            copy = retry_copy(delivery, outcome)
            if copy is None:
                reason = "its headers are too large, or nested too deeply, to send a copy for retry"
                outcome = Dead(reason, outcome.error, outcome.attempts)
        if isinstance(outcome, Dead):
            copy = dead_letter(delivery, outcome)
        message_log.ended(delivery, outcome, self._began)
        tally = self.tally or self._services.tally.of_thread()
        tally.ended(delivery, outcome, self._began)
        match outcome:
            case Ack():
                self._ack()
            case Return(delay=delay):
                subscription.requeue(delivery, delay)
            case Again(delay=delay) if in_place:
                subscription.back_off(delivery, delay, next_attempt(outcome))
            case Hold():
                raise AssertionError("a held message is processed again, not settled")
        return outcome if copy is None else (yield from self._send_on(copy, outcome))

    def _follow(
        self, result: Outcome | Failed | Unconfirmed
    ) -> Steps[Outcome | Unconfirmed | None]:
        """Act on the result of an attempt, and of further attempts while the message is held."""
        while not isinstance(result, Unconfirmed):
            if self.is_given_up or (
                not isinstance(result, Ack) and (self._is_lost(result) or self._is_excused(result))
            ):
                self._over()
                if not self.is_given_up:
                    self._leave()
                return None
            outcome = yield from self.conclude(result)
            self._over()
            if self.processing is not None:
                end_processing(self.processing, outcome)
            if isinstance(outcome, Hold):
                held = yield from self._hold(outcome)
                if held is None:
                    self._leave()
                    return None
                result = held
                continue
            settled = yield from self.settle(outcome)
            if not self._goes_on_here:
                return settled
            self._goes_on_here = False
            result = yield from self.attempt()
        self._over()
        return result

    def _leave(self) -> None:
        """Count a message that is left unsettled, to be redelivered."""
        self._let_go()
        self._services.tally.of_thread().returned(self.delivery, self._began)
        if self.processing is not None:
            end_processing(self.processing, None)

    def _let_go(self) -> None:
        """Note that an attempt at a task runs no longer, whose end isn't written."""
        if self._record is not None:
            self._record.over()

    def _over(self) -> None:
        """Note that no application code runs for the message, until its next attempt if any.

        Called at least once after each attempt and the callbacks that follow it.
        """

    def _hold(self, hold: Hold) -> Steps[Outcome | Failed | Unconfirmed | None]:
        """Wait until the broker or the database may be available, and process the message again.

        Returns:
            The result of the next attempt, or of none: the message has waited for too long; None
            if it must be left.
        """
        if self._services.is_stopping:
            return None
        seconds = self._pause
        now = time.monotonic()
        if hold.is_refusal:
            first, later = _REFUSED
            seconds = first if self._refused_since is None else later
            if self._refused_since is None:
                self._refused_since = now
            if now - self._refused_since >= PATIENCE:
                refused = FollowOnsRefused(text_of(hold.error))
                refused.__cause__ = hold.error
                self._decode_here()
                return Failed(refused)
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not hold.is_doubtful:
            self._doubtful_since = None
        elif self._doubtful_since is None:
            self._doubtful_since = now
        elif now - self._doubtful_since >= PATIENCE:
            self._decode_here()
            return Failed(hold.error)
        logger.warning(
            "holding message %r of %r for %.1f s or longer: %s",
            self.delivery.message_id,
            self.delivery.queue,
            seconds,
            hold.error,
        )
        is_broker = isinstance(hold.error, BrokerError) and not hold.is_refusal
        # Without the broker, messages that publish nothing can still be processed.
        closing = Closing.WHEN_MANY if is_broker else Closing.AT_ONCE
        if not (yield from self._until_ready(seconds, hold, closing)):
            return None
        if self._has_waited_long():
            return Return(0.0)
        return (yield from self.attempt())

    def _decode_here(self) -> None:
        if self.event is None:  # a subprocess has decoded it
            with contextlib.suppress(Undecodable):
                self.event = decode(self.delivery)

    def _is_lost(self, result: Outcome | Failed) -> bool:
        """Return whether the message will be redelivered anyway: a copy would duplicate it."""
        if not self._is_left_to_broker(result):
            return False
        logger.info(
            "lost message %r (channel closed); it will be redelivered", self.delivery.message_id
        )
        return True

    def _is_excused(self, result: Outcome | Failed) -> bool:
        """Return whether an attempt failed while the worker was stopping: it doesn't count."""
        if not may_be_excused(result):
            return False
        # A worker that retires isn't being stopped: this may be the message that made it do so.
        if not signals.stop_received:
            return False
        logger.warning(
            "message %r of %r failed while the worker was stopping; it will be redelivered: %s",
            self.delivery.message_id,
            self.delivery.queue,
            text_of(result.error),
            exc_info=result.error,
        )
        return True

    def _is_left_to_broker(self, result: Outcome | Failed) -> bool:
        """Return whether the message is redelivered, and that delivery does all that is left."""
        # Redelivered, a message that is done may be skipped as a duplicate: its callbacks, log line
        # and dead letter belong to this delivery, stale or not.
        if isinstance(result, Ack) or (isinstance(result, Failed | Dead) and result.is_done):
            return False
        return self._services.subscription.is_stale(self.delivery)

    def _decide(self, failed: Failed) -> Again | Dead:
        event, error = self.event, failed.error
        attempts = 1 if event is None else event.attempt
        now = datetime.datetime.now(datetime.UTC)
        first = (event and event.first_failure) or now
        if isinstance(error, NotYet) and not failed.is_done:
            delay = error.delay_after((now - first).total_seconds())
            if delay is not None:
                return Again(delay, error, attempts - 1, first)
            return Dead(text_of(error), error, attempts, first)
        try:
            decisive, delay = decided(self.consumer.retry or _ONLY_AFTER_RETRY, failed, attempts)
        except Exception as wrong:  # a user-defined delay raised it
            logger.exception(
                "the retry policy of %r failed; dead-lettering the message", self.consumer
            )
            error.add_note(f"and then the retry policy failed: {wrong!r}")
            decisive, delay = error, None
        if delay is not None and not failed.is_done:
            return Again(delay, error, attempts, first)
        reason = f"{type(decisive).__qualname__}: {text_of(decisive)}"
        if failed.is_done:
            # A retry would be skipped as a duplicate: a person must finish what is missing.
            reason = f"failed after its transaction had been committed: {reason}"
        return Dead(reason, error, attempts, first, failed.is_done, decisive)

    def _call_back(
        self, event: ReceivedEvent, call: Callable[..., Any], *arguments: Any
    ) -> Steps[None]:
        """Call a callback, and publish what it enqueues; unconfirmed events are kept."""
        collector = CallbackCollector(self._services.publisher, event, auto_publish=True)
        with EventCollector.use(collector):
            try:
                # As it was sent: the attempt, or another callback, may have changed its payload.
                event = decode(self.delivery)
                set_current_message(event)
                result = yield from self._surrounded(Call(call, (event, *arguments)))
                refuse_awaitable(result, call.__name__)
                collector.refuse()
                if collector.events:
                    yield Confirm(collector.hand_over())
            except FAILURES as error:
                strip_engine(error)
                logger.exception("%s of %r failed", call.__name__, self.consumer)
            finally:
                collector.end()

    def _surrounded(self, step: Call) -> Steps[Any]:
        surroundings = self._services.surroundings
        if surroundings is None:
            return (yield step)
        return (yield from surrounded(surroundings, taken(step)))

    def _send_on(self, copy: Event, outcome: Outcome) -> Steps[Outcome | None]:
        """Publish the copy that replaces the message, and only ack it when that is confirmed."""
        services = self._services
        pause = FIRST_PAUSE
        refusals = 0
        next_line = 0.0
        while True:
            chunk = services.publisher.submit_chunk([copy], keep=False)
            report: PublishReport = yield Confirm(chunk)
            if report.ok:
                self._ack()
                return outcome
            refusals += isinstance(report.error, Nacked)
            if (
                isinstance(outcome, Again)
                and refusals >= _NO_ROOM
                and self._may_go_on_here(outcome)
            ):
                logger.warning(
                    "the broker has no room for %r; its next attempt begins here: %s", copy, report
                )
                yield from self._go_on_here(outcome)
                return None
            now = time.monotonic()
            if now >= next_line:
                logger.error("could not publish %r, retrying: %s", copy, report)
                next_line = now + (_LOGGED_EVERY if next_line else LONGEST_PAUSE)
            if report.error is None:
                services.subscription.declare_again()  # unroutable: its queue was deleted
            if not (yield from self._until_ready(pause, outcome)):
                if isinstance(outcome, Dead) and outcome.is_done:
                    logger.error(
                        "lost the dead letter %r of a message that is done: %s",
                        copy,
                        outcome.reason,
                    )
                return None
            if self._has_waited_long() and not (isinstance(outcome, Dead) and outcome.is_done):
                logger.warning(
                    "requeued message %r: %r found no room", self.delivery.message_id, copy
                )
                services.subscription.requeue(self.delivery, 0.0)
                return None
            pause = min(2 * pause, LONGEST_PAUSE)

    def _may_go_on_here(self, outcome: Again) -> bool:
        return outcome.delay <= _SOON and not self.is_given_up  # else a late attempt still runs

    def _go_on_here(self, outcome: Again) -> Steps[None]:
        """Wait for the next attempt, as the copy would have done, and turn the message into it."""
        if (yield from self._until_ready(outcome.delay, outcome)):
            delivery = self.delivery
            delivery.headers = {**(delivery.headers or {}), **next_attempt(outcome)}
            self.event = None
            self._goes_on_here = True

    def _until_ready(
        self, seconds: float, outcome: Outcome, closing: Closing = Closing.NEVER
    ) -> Steps[bool]:
        """Wait ``seconds``, then for the broker; return False if the message must be left."""
        services = self._services
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()

        def must_leave() -> bool:
            return services.is_stopping or self._is_left_to_broker(outcome)

        def may_go_on() -> bool:
            return must_leave() or services.publisher.connected

        yield Pause(seconds, may_go_on, closing)
        return not must_leave()

    def _has_waited_long(self) -> bool:
        """Return whether the message must be given back before the broker takes it back."""
        since = self._waiting_since
        if since is None or not self._services.subscription.limits_processing:
            return False
        return time.monotonic() - since >= LONGEST_WAIT

    def _ack(self) -> None:
        self.is_acked = True
        self._services.subscription.ack(self.delivery)


def may_be_excused(result: Outcome | Failed) -> TypeGuard[Failed]:
    """Return whether an attempt doesn't count as failed if its worker was stopping.

    The signal that stops a worker often stops what its handlers need as well, such as the programs
    they wait for. But what the handler or its time limit has decided would have come in any case;
    and a message that is done would be skipped as a duplicate when it is redelivered.
    """
    if not isinstance(result, Failed) or result.is_done:
        return False
    failures = result.failures or (result.error,)
    return not any(isinstance(failure, Retry | ProcessTimeout) for failure in failures)
