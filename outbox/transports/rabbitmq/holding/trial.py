"""Publishes one event on a channel apart, so that a refusal costs no other event anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pika
import pika.channel
import pika.exceptions
import pika.frame
import pika.spec

from outbox.backlog.chunk import Entry
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.amqp.encoder import on_channel
from outbox.transports.rabbitmq.pika_errors import one_line, reply_of

__all__ = ["MOST_TRIALS", "Answer", "Trial", "Verdict"]

MOST_TRIALS = 8
"""How many may run at once over one connection."""

_HIGHEST = 65_535  # a channel's number where the broker sets no limit


@dataclass(frozen=True, slots=True)
class Answer:
    """The broker's answer to the event of a trial.

    Attributes:
        nacked: whether it was nacked.
        returned: why it was returned; empty if it wasn't.
        closed: the reply code with which the channel was closed, or 0: it was answered.
        text: the code and the reply text of that, in one line.
    """

    nacked: bool = False
    returned: str = ""
    closed: int = 0
    text: str = ""


class Verdict(Protocol):
    """The callback of a trial, called once unless the connection ends first."""

    def __call__(self, answer: Answer) -> None:
        """Take the answer."""
        ...


class Trial:
    """One event on its way over a channel apart, in confirm mode. For the link's thread."""

    def __init__(
        self, connection: pika.SelectConnection, slot: int, entry: Entry, verdict: Verdict
    ) -> None:
        """Open the channel.

        Args:
            connection: an open connection.
            slot: a number below ``MOST_TRIALS`` that no other trial over it has now.
            entry: the event.
            verdict: the callback.
        """
        self._entry = entry
        self._verdict = verdict
        self._returned = ""
        self._nacked: bool | None = None  # not answered yet
        # The highest numbers: pika gives out the lowest, and the publishing channel needs its own.
        number = (connection.params.channel_max or _HIGHEST) - slot
        connection.channel(number, self._on_open)

    def _on_open(self, channel: pika.channel.Channel) -> None:
        channel.add_on_close_callback(self._on_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, lambda _frame: self._on_ready(channel))
        self._channel = channel

    def _on_ready(self, channel: pika.channel.Channel) -> None:
        frames = on_channel(channel.channel_number, self._entry.frames)
        pika_connection.write(channel, frames)

    def _on_return(
        self,
        _channel: pika.channel.Channel,
        method: pika.spec.Basic.Return,
        _properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        self._returned = f"{method.reply_code} {one_line(method.reply_text)}"

    def _on_confirm(
        self, frame: pika.frame.Method[pika.spec.Basic.Ack | pika.spec.Basic.Nack]
    ) -> None:
        self._nacked = isinstance(frame.method, pika.spec.Basic.Nack)
        self._channel.close()  # its number is free once the broker has agreed

    def _on_closed(self, channel: pika.channel.Channel, reason: Exception) -> None:
        match reason:
            case pika.exceptions.ChannelClosedByBroker():
                answer = Answer(closed=reason.reply_code, text=reply_of(reason))
            case pika.exceptions.ChannelClosedByClient():
                answer = Answer(nacked=bool(self._nacked), returned=self._returned)
            case _:
                return  # the connection has ended, which its owner notices
        # In the loop's next turn: until then pika still has the closed channel under its number.
        channel.connection.ioloop.call_later(0, lambda: self._verdict(answer))
