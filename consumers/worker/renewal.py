"""Renewal: a message that came back often is replaced by a copy, before the broker gives it up.

RabbitMQ 4 gives up a message that came back 20 times, unless its queue or a policy has another
limit, and a policy may have one on every version. It counts a message that was only sent ahead to a
worker whose connection then ended. So a message that came back half as often is renewed as soon as
it arrives, before it waits for a place: a confirmed copy takes its place in the queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from outbox import Nacked, Publisher, PublishReport, UsageError
from outbox.messages.dead_letters import renewed
from outbox.messages.delivery import Delivery
from outbox.system.backoff import backoff
from outbox.transports.subscription import Subscription

__all__ = ["Renewal"]

logger = logging.getLogger("outbox.consumer")

_OFTEN = 10  # half the limit of 20: a few more losses may come before the copy is confirmed
_TRIES = 10


class Renewal:
    """Renews the messages of a worker that came back often, and passes on all others.

    Thread-safe. A copy that the broker doesn't take, such as into a full queue, is given up: the
    message is passed on like the others. While the publisher has no connection, the message waits
    for it, unbegun and without a thread, through ten tries with growing pauses.
    """

    def __init__(
        self,
        publisher: Publisher,
        subscription: Subscription,
        pass_on: Callable[[Delivery], None],
    ) -> None:
        """Publish copies with ``publisher``; ``pass_on`` takes what is to be processed."""
        self._publisher = publisher
        self._subscription = subscription
        self._pass_on = pass_on
        self._changed = threading.Condition()
        self._under_way = 0
        self._waiting: list[tuple[Delivery, int]] = []  # with the number of tries so far
        self._timer: threading.Timer | None = None
        self._stopped = False

    def receiver(self) -> Callable[[Delivery], None]:
        """Return the function that takes a message from the subscription, and doesn't block."""
        renew, pass_on = self._renew, self._pass_on
        return lambda delivery: (
            renew(delivery, 1)
            if delivery.redelivered and delivery.counted >= _OFTEN
            else pass_on(delivery)
        )

    def stop(self, deadline: float) -> None:
        """Wait for the copies under way, until ``deadline`` (monotonic); begin no others."""
        with self._changed:
            self._stopped = True
            if self._timer is not None:
                self._timer.cancel()
            while self._under_way and (seconds := deadline - time.monotonic()) > 0:
                self._changed.wait(seconds)

    def _renew(self, delivery: Delivery, number: int) -> None:
        copy = renewed(delivery)
        with self._changed:
            begins = copy is not None and not self._stopped
            self._under_way += begins
        if copy is None or not begins:
            self._pass_on(delivery)
            return
        try:
            chunk = self._publisher.submit_chunk([copy], keep=False)
        except UsageError:  # the publisher was closed
            self._end()
            self._pass_on(delivery)
            return
        chunk.on_reported(lambda report: self._on_reported(delivery, number, report))

    def _on_reported(self, delivery: Delivery, number: int, report: PublishReport) -> None:
        if report.ok:
            logger.info(
                "renewed message %r, which came back to %r %d times without being settled",
                delivery.message_id,
                delivery.queue,
                delivery.returned,
            )
            self._subscription.ack(delivery)
        elif report.error is not None and not isinstance(report.error, Nacked) and number < _TRIES:
            self._try_later(delivery, number)
        else:
            logger.warning("could not renew message %r: %s", delivery.message_id, report)
            self._pass_on(delivery)
        self._end()

    def _try_later(self, delivery: Delivery, number: int) -> None:
        with self._changed:
            self._waiting.append((delivery, number))
            if self._timer is None and not self._stopped:
                self._timer = threading.Timer(backoff(number - 1), self._try_again)
                self._timer.daemon = True
                self._timer.start()

    def _try_again(self) -> None:
        with self._changed:
            self._timer = None
            waiting, self._waiting = self._waiting, []
        for delivery, number in waiting:
            if not self._subscription.is_stale(delivery):  # else it is delivered again
                self._renew(delivery, number + 1)

    def _end(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()
