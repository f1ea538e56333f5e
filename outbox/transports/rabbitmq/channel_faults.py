"""Finds the event that made the broker close the channel, and saves all others. No I/O.

The broker says what was wrong, but not with which message (AMQP 0-9-1, Channel.Close). So one event
that it doesn't accept closes the channel for all events in flight. The rules:

1.  If the broker names an exchange, the events for it are the cause, and all others are sent again.
    Events for a missing exchange are unroutable. Those for an internal one are given up. Those for
    one that the user may not write to, or not with this routing key, are *refused*: that is the
    fault of the user, not of the events, and a permission may be granted again.
2.  Otherwise any event in flight may be the cause. If there are several, they are sent again one by
    one, until as many events have been answered.
3.  An event that was in flight alone is sent again once, and given up if the channel is closed a
    second time: the first time may have had another cause. If access was refused (403), without
    saying to what, it is refused like those of rule 1: a token may have expired, for example.
4.  A reply code that isn't about messages is a failure of the broker, for which no event is given
    up. An event that was in flight alone is retried after a back-off.
5.  If the broker ends the whole connection because of an error, the same events may be the cause.
    They are sent again one by one. One that was in flight alone is a suspect, and is tried over
    another connection, where it can do no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from outbox.backlog.chunk import Entry
from outbox.transports.rabbitmq.holding.replies import (
    ACCESS_REFUSED,
    NOT_FOUND,
    Complaint,
    complaint_about,
)

__all__ = ["ChannelFaults", "Verdict"]

logger = logging.getLogger("outbox.publisher")

_FAULTS_OF_MESSAGES = frozenset((311, ACCESS_REFUSED, NOT_FOUND, 406))
"""Reply codes that may be about a message; others, such as 541, are failures of the broker."""


@dataclass(slots=True)
class Verdict:
    """The decision about the entries that were in flight when the channel was closed.

    Attributes:
        again: entries to send again at once, in this order.
        later: entries to send again after a back-off.
        unroutable: entries for an exchange that doesn't exist.
        rejected: entries to give up.
        refused: entries that the user may not publish, in order.
        by_topic: whether those were refused because of their routing key.
    """

    again: Sequence[Entry] = field(default_factory=list)
    later: Sequence[Entry] = field(default_factory=list)
    unroutable: Sequence[Entry] = field(default_factory=list)
    rejected: Sequence[Entry] = field(default_factory=list)
    refused: Sequence[Entry] = field(default_factory=list)
    by_topic: bool = False


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
        complaints = [(entry, complaint_about(entry.sent_as, code, text)) for entry in entries]
        if causes := {entry: complaint for entry, complaint in complaints if complaint}:
            self.to_isolate = 0  # the cause is known
            again = [entry for entry in entries if entry not in causes]
            guilty = list(causes)
            match causes[guilty[0]]:
                case Complaint.MISSING:
                    return Verdict(again=again, unroutable=guilty)
                case Complaint.INTERNAL:
                    return Verdict(again=again, rejected=guilty)
                case complaint:
                    by_topic = complaint is Complaint.FORBIDDEN_TOPIC
                    return Verdict(again=again, refused=guilty, by_topic=by_topic)
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
        if code == NOT_FOUND:
            return Verdict(unroutable=entries)
        if code == ACCESS_REFUSED:
            return Verdict(refused=entries)
        return Verdict(rejected=entries)

    def connection_ended(self, entries: Sequence[Entry]) -> Entry | None:
        """Return the suspect, if the broker ended the connection with ``entries`` in flight.

        If there are several, they are isolated on the next connection.
        """
        if len(entries) == 1:
            self.answered(1)
            return entries[0]
        self.to_isolate = len(entries)
        return None
