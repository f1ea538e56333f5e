"""The life of a message: decode, process, outcome. No I/O of its own; shared by every engine."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter

from outbox import BrokerError, Event, EventCollector, Publisher, PublishFailed, UnpublishedEvents
from outbox.consumers.consumer import Consumer
from outbox.consumers.outcome import (
    ACK,
    Ack,
    Dead,
    Hold,
    Outcome,
    Reject,
    Requeue,
    Return,
)
from outbox.consumers.received import ReceivedEvent, Undecodable, decode
from outbox.ids import follow_on_id
from outbox.spread import ids
from outbox.subscription import Delivery

__all__ = ["run"]

logger = logging.getLogger("outbox.consumer")


def run(consumer: Consumer, delivery: Delivery, publisher: Publisher) -> Outcome:
    """Return what is to become of ``delivery``, having processed it.

    To be called in a context of the message's own. Never raises an ``Exception``.
    """
    try:
        event = decode(delivery)
    except Undecodable as error:
        return Dead(f"undecodable: {error}", error)
    collector = _MessageCollector(publisher, event, auto_publish=consumer.auto_publish)
    with EventCollector.use(collector):
        try:
            outcome = _process(consumer, event, collector)
        except (Exception, SystemExit) as error:  # a handler's sys.exit() is no worker's end
            outcome = _of_exception(error)
        finally:
            left = collector.end()
        if left and not isinstance(outcome, Ack):
            logger.debug("dropped with %r: %s", event.id, ids(left))
        return outcome


def _process(consumer: Consumer, event: ReceivedEvent, collector: _MessageCollector) -> Outcome:
    result = consumer.process(event)
    outcome = ACK if result is None else result
    if not isinstance(outcome, Ack | Dead | Return):
        raise TypeError(
            f"process() returned {result!r}; return None, ACK, REJECT or REQUEUE, "
            "and publish follow-on events with publish()"
        )
    if isinstance(outcome, Ack) and collector.events:
        if consumer.auto_publish:
            collector.publish()
        else:
            unpublished = tuple(one.id for one in collector.events)
            raise UnpublishedEvents(unpublished)
    return outcome


def _of_exception(error: BaseException) -> Outcome:
    match error:
        case Reject():
            return Dead(error.reason, error)
        case Requeue():
            return Return()
        case PublishFailed() if error.report.error is None:
            return Dead(f"a follow-on was rejected: {_text(error)}", error)
        case BrokerError():
            return Hold(error)
        case _:
            return Dead(f"{type(error).__qualname__}: {_text(error)}", error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as why:  # the application's own exception, which need not be sound
        return f"(its text cannot be told: {type(why).__qualname__})"


class _MessageCollector(EventCollector):
    """The collector of one message: its events' ids follow from the message's."""

    __slots__ = ()

    def __init__(self, publisher: Publisher, event: ReceivedEvent, *, auto_publish: bool) -> None:
        super().__init__(publisher=publisher, make_id=_FollowOnIds(event))
        self._root.root.publishes_itself = auto_publish

    def end(self) -> tuple[Event, ...]:
        return self._drop(self._root.close())


class _FollowOnIds:
    """Ids that a second run of the same message makes again. Thread-safe.

    An id follows from the message, the queue, and all that makes the event what it is: a different
    event never gets it. Of identical events in one run each has a number.
    """

    def __init__(self, event: ReceivedEvent) -> None:
        self._event = event
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, ...]] = Counter()

    def __call__(self, exchange: str, target: str, key: str | None, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        keyed = "" if key is None else f"={key}"
        parts = (self._event.id, self._event.queue, exchange, target, keyed, digest)
        with self._lock:
            number = self._seen[parts]
            self._seen[parts] = number + 1
        return follow_on_id(*parts, str(number))
