"""Finds the event that made the broker close the channel, and saves all others. No I/O.

The broker says what was wrong, but not with which message (AMQP 0-9-1, Channel.Close). So one event
that it doesn't accept closes the channel for all events in flight. The rules:

1.  If the broker names a missing exchange, the events for that exchange are unroutable. All others
    are sent again.
2.  Otherwise any event in flight may be the cause. If there are several, they are sent again one by
    one, until as many events have been answered.
3.  An event that was in flight alone is sent again once, and given up if the channel is closed a
    second time: the first time may have had another cause, such as a permission that was missing
    for a moment.
4.  A reply code that isn't about messages is a failure of the broker, for which no event is given
    up. An event that was in flight alone is retried after a back-off.
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
"""Reply codes that may be about a message; others, such as 541, are failures of the broker."""


@dataclass(slots=True)
class Verdict:
    """The decision about the entries that were in flight when the channel was closed.

    Attributes:
        again: entries to send again at once, in this order.
        later: entries to send again after a back-off.
        unroutable: entries for an exchange that doesn't exist.
        rejected: entries to give up.
    """

    again: Sequence[Entry] = field(default_factory=list)
    later: Sequence[Entry] = field(default_factory=list)
    unroutable: Sequence[Entry] = field(default_factory=list)
    rejected: Sequence[Entry] = field(default_factory=list)


class ChannelFaults:
    """Decides about the entries of a publisher whose channel was closed. For one thread.

    Attributes:
        to_isolate: the number of entries to send one by one until the cause is known.
    """

    def __init__(self) -> None:
        self.to_isolate = 0
        self._failed_alone: Entry | None = None  # the last entry that was sent alone and failed

    def answered(self, count: int) -> None:
        """Note that the broker has answered ``count`` entries: they were not the cause."""
        self.to_isolate = max(0, self.to_isolate - count)

    def judge(self, entries: Sequence[Entry], code: int, text: str) -> Verdict:
        """Return what to do with ``entries``: all that were in flight, at least one.

        Args:
            entries: the entries in the order they were sent.
            code: the broker's reply code.
            text: the code and the reply text, in one line.
        """
        if unroutable := [entry for entry in entries if _names_exchange(code, text, entry)]:
            self.to_isolate = 0  # the cause is known
            others = set(entries).difference(unroutable)
            again = [entry for entry in entries if entry in others]
            return Verdict(again=again, unroutable=unroutable)
        if len(entries) > 1:
            # Counting answers suffices: the cause itself reaches _judge_alone(), all others are
            # answered, so isolation ends after exactly these entries.
            self.to_isolate = len(entries)
            return Verdict(again=entries)
        return self._judge_alone(entries, code)

    def _judge_alone(self, entries: Sequence[Entry], code: int) -> Verdict:
        [entry] = entries
        logger.debug("the broker closed the channel because of %r", entry.event)
        self.answered(1)
        if code not in _FAULTS_OF_MESSAGES:
            return Verdict(later=entries)
        if entry is not self._failed_alone:
            self._failed_alone = entry
            self.to_isolate += 1
            return Verdict(again=entries)
        self._failed_alone = None
        if code == _NO_SUCH_EXCHANGE:
            return Verdict(unroutable=entries)
        return Verdict(rejected=entries)


def _names_exchange(code: int, text: str, entry: Entry) -> bool:
    """Return whether the broker reports that the exchange of ``entry`` is missing."""
    exchange = entry.sent_as.exchange
    return (
        bool(exchange)
        and code == _NO_SUCH_EXCHANGE
        and f"no exchange '{one_line(exchange)}' in vhost" in text
    )
