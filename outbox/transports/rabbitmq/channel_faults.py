"""Finds the event over which the broker closed the channel, and spares all others. No I/O.

The broker says what was wrong, not with which message (AMQP 0-9-1, Channel.Close), so that one
event that it does not accept takes the channel from all that are on their way. The rules:

1.  Events to an exchange whose absence the broker reports by name are unroutable. All others are
    sent again.
2.  Otherwise, of several events any may be the cause. They are *suspects*: sent again one at a
    time, until as many events have been answered.
3.  One that was alone on its way is *accused*. It is given up when the channel is closed over it a
    second time: the first time may have been about something else, such as a permission that was
    missing for a moment.
4.  A code that is not about messages is the broker's own trouble: no event is given up for it. The
    one that was alone on its way is tried again after a back-off.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from outbox.backlog.chunk import Entry
from outbox.transports.rabbitmq.pika_errors import one_line

__all__ = ["ChannelFaults", "Verdict"]

logger = logging.getLogger("outbox.publisher")

_NO_SUCH_EXCHANGE = 404
_FAULTS_OF_MESSAGES = frozenset((311, 403, _NO_SUCH_EXCHANGE, 406))
"""Reply codes that may be about the message; others (541, say) are the broker's own trouble."""


@dataclass(slots=True)
class Verdict:
    """What is to be done with each event that was on its way when the channel was closed.

    Attributes:
        again: to be sent again at once, in this order.
        later: to be sent again after a back-off.
        unroutable: to an exchange that does not exist.
        rejected: never to be sent again.
    """

    again: Sequence[Entry] = field(default_factory=list)
    later: Sequence[Entry] = field(default_factory=list)
    unroutable: Sequence[Entry] = field(default_factory=list)
    rejected: Sequence[Entry] = field(default_factory=list)


class ChannelFaults:
    """The suspects of one publisher. For one thread.

    Attributes:
        suspects: the number of events that must be sent one at a time; 0 in good times.
    """

    def __init__(self) -> None:
        self.suspects = 0
        self._accused: Entry | None = None

    def answered(self, count: int) -> None:
        """Note that the broker has answered ``count`` events: they were not the cause."""
        self.suspects = max(0, self.suspects - count)

    def judge(self, entries: Sequence[Entry], code: int, text: str) -> Verdict:
        """Return what is to be done with ``entries``, all that were on their way; at least one.

        Args:
            entries: in the order in which they were sent.
            code: the broker's reply code.
            text: the code and the reply text, as one line.
        """
        if unroutable := [entry for entry in entries if _names_exchange(code, text, entry)]:
            self.suspects = 0
            others = set(entries).difference(unroutable)
            again = [entry for entry in entries if entry in others]
            return Verdict(again=again, unroutable=unroutable)
        if len(entries) > 1:
            self.suspects = len(entries)
            return Verdict(again=entries)
        return self._judge_alone(entries, code)

    def _judge_alone(self, entries: Sequence[Entry], code: int) -> Verdict:
        [entry] = entries
        logger.debug("the broker closed the channel over %r", entry.event)
        self.answered(1)
        if code not in _FAULTS_OF_MESSAGES:
            return Verdict(later=entries)
        if entry is not self._accused:
            self._accused = entry
            self.suspects += 1
            return Verdict(again=entries)
        self._accused = None
        if code == _NO_SUCH_EXCHANGE:
            return Verdict(unroutable=entries)
        return Verdict(rejected=entries)


def _names_exchange(code: int, text: str, entry: Entry) -> bool:
    """Return whether it is the exchange of ``entry`` that the broker does not have."""
    exchange = entry.sent_as.exchange
    return (
        bool(exchange)
        and code == _NO_SUCH_EXCHANGE
        and f"no exchange '{one_line(exchange)}' in vhost" in text
    )
