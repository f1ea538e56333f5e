"""Publishing follow-on events again that the broker has refused for now.

Their handler has succeeded. So only the events are sent again, with the same ids, and the handler
isn't run once more.
"""

from __future__ import annotations

import logging
import time

from outbox import Nacked, PublishFailed, PublishReport
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Confirm, Pause, Steps
from outbox.consumers.outcome import FollowOnsRefused
from outbox.messages.delivery import Delivery
from outbox.report import Withdrawn

__all__ = ["FIRST_PAUSE", "LONGEST_PAUSE", "PATIENCE", "check", "republished"]

logger = logging.getLogger("outbox.consumer")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
PATIENCE = 300.0
"""Seconds for which refused events are tried: a full queue that has a consumer has room by then,
and RabbitMQ's limit for an ack is 30 minutes."""


def republished(report: PublishReport, delivery: Delivery, services: Services) -> Steps[None]:
    """Publish again what the broker has refused according to ``report``, until it is confirmed.

    Raises:
        FollowOnsRefused: it was refused for too long.
        PublishFailed: it wasn't published for another reason, or the message must be left.
    """

    def must_leave() -> bool:
        return services.is_stopping or services.subscription.is_stale(delivery)

    def may_go_on() -> bool:
        return must_leave() or services.publisher.connected

    if isinstance(report.error, Nacked):
        deadline = time.monotonic() + PATIENCE
        pause = FIRST_PAUSE
        while not report.ok and all(isinstance(each, Withdrawn) for each in report.rejected):
            if must_leave():
                break
            if time.monotonic() >= deadline:
                raise FollowOnsRefused(str(report)) from report.error
            logger.warning(
                "the follow-on events of message %r of %r were refused; publishing them again in "
                "%.1f s: %s",
                delivery.message_id,
                delivery.queue,
                pause,
                report,
            )
            yield Pause(pause, may_go_on, is_in_attempt=True)
            if must_leave():
                break
            events = [each.event for each in report.rejected]
            report = yield Confirm(services.publisher.submit_chunk(events, keep=False))
            pause = min(2 * pause, LONGEST_PAUSE)
    check(report)


def check(report: PublishReport) -> None:
    """Raise ``PublishFailed`` if follow-on events were not published."""
    try:
        report.raise_for_failure()
    except PublishFailed as error:
        error.is_of_message = True
        raise
