"""Publishes over RabbitMQ: the shell around backlog, confirms and link."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence

import pika
import pika.channel
import pika.exceptions
import pika.frame
import pika.spec

from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.backlog.notifier import Notifier, call_hook
from outbox.errors import Blocked, BrokerError, ConnectionLost, Nacked
from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.settings import Settings
from outbox.system.backoff import backoff
from outbox.transports.backlogged import BackloggedTransport
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import PUBLISH_CHANNEL, Encoder
from outbox.transports.rabbitmq.confirms import Confirms
from outbox.transports.rabbitmq.delay_ladder import LONGEST_DELAY
from outbox.transports.rabbitmq.delayer import Delaying
from outbox.transports.rabbitmq.link import Link
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.pika_errors import one_line, told
from outbox.url import BrokerURL

__all__ = ["RabbitMQTransport"]

logger = logging.getLogger("outbox.publisher")

_WRITE_EVENTS = 1000
_WRITE_BYTES = 256 * 1024
_WINDOW = 4 * _WRITE_EVENTS
"""Events that may be outstanding at a time: the broker stays busy while confirms travel."""

_HURRY = 0.5  # seconds between two attempts to connect while somebody waits for the end
_NO_SUCH_EXCHANGE = 404
_FAULTS_OF_MESSAGES = frozenset((311, 403, _NO_SUCH_EXCHANGE, 406))
"""Reply codes that may be about the message; others (541, say) are the broker's own trouble."""


class RabbitMQTransport(BackloggedTransport):
    """One connection, one channel in confirm mode, any number of callers.

    ``submit`` encodes in the caller's thread and wakes the link's thread, which writes, counts
    confirms and resolves futures. Everything whose name begins with ``_on`` runs on that thread,
    as do the methods below the line.
    """

    supports_delay = True
    longest_delay = LONGEST_DELAY

    def __init__(
        self, url: BrokerURL, settings: Settings, notify: Notifier, encoder: Encoder | None = None
    ) -> None:
        super().__init__(notify)
        self._settings = settings
        self._encoder = encoder or Encoder(settings.app_id)
        self._confirms = Confirms()
        self._link = Link(
            connection_parameters(url, settings, "publisher"), self, name="outbox-publisher"
        )
        self._connection: pika_connection.Connection | None = None
        self._channel: pika.channel.Channel | None = None  # None unless it may be written to
        self._connection_serves = False  # it has had a channel to publish on
        self._woken = False
        self._watched_since: float | None = None
        self._watching = False
        self._blocked = False
        self._suspects = 0
        self._accused: Entry | None = None  # was alone when the channel was closed
        self._homeless: list[Entry] = []
        self._making_parking_queue = False
        self._delays = Delaying(
            self._encoder, settings.declare, self._on_way_made, self._on_no_way, self._keep_apart
        )

    @property
    def connected(self) -> bool:
        """Whether a channel is open and the broker reads from it."""
        return self._channel is not None and not self._blocked

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller is a hook, called on the link's thread."""
        return self._link.on_thread

    def start(self) -> None:
        """Begin to connect in the background, unless that has begun."""
        self._link.start()

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Encode ``events`` and take them over; whatever raises, raises before that."""
        encode = self._encoder.encode
        chunk = Chunk(events, keep=keep, frames=[encode(event) for event in events])
        self._link.start()
        self._notify(self._backlog.add(chunk))
        self._wake()
        return chunk

    def _wake(self) -> None:
        try:
            if not self._woken:
                self._woken = True
                self._link.call(self._on_wake)
        except BaseException:  # a signal's handler raised: the next caller must wake the link
            self._woken = False
            raise

    def drain(self, timeout: float) -> bool:
        """Wait until every event has its fate, trying the broker at once and again and again.

        There is an end to the waiting: after a long outage the back-off would outlast it.
        """
        deadline = time.monotonic() + timeout
        left = 0.0
        while not self._backlog.wait_empty(min(left, _HURRY)):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._link.call(self._link.hurry)
        return True

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Close the connection and return what is left."""
        self._link.stop(graceful=graceful)
        return self._hand_over()

    # ------------------------------------------------------------------ on the link's thread

    def opened(self, connection: pika_connection.Connection) -> None:
        """Declare the exchange, then open the channel."""
        self._connection = connection
        self._delays.opened(connection)
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        steps = topology.exchange(self._settings.exchange, self._settings.declare)
        topology.declare(connection, steps, self._on_declared)

    def closed(self, error: BrokerError) -> None:
        """Take back what was outstanding, and open the circuit."""
        was_connected = self._connection_serves
        self._connection_serves = False
        self._connection = self._channel = None
        self._blocked = False
        self._watched_since = None
        self._making_parking_queue = False
        homeless, self._homeless = self._homeless, []
        grounded = self._delays.closed()
        self._notify(self._backlog.down([*homeless, *self._confirms.clear(), *grounded], error))
        if was_connected:
            call_hook(self._settings.on_disconnected, error)

    def _on_declared(self, refused: str | None) -> None:
        if refused is not None:
            logger.error("the exchange %r is not as declared: %s", self._settings.exchange, refused)
        self._open_channel()

    def _open_channel(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.channel(PUBLISH_CHANNEL, self._on_channel_open)

    def _on_channel_open(self, channel: pika.channel.Channel) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, lambda _frame: self._on_channel_ready(channel))

    def _on_channel_ready(self, channel: pika.channel.Channel) -> None:
        frame_max = channel.connection.params.frame_max
        if frame_max < self._encoder.frame_max:
            self._encoder.frame_max = frame_max
            self._backlog.encode_anew(self._encoder.encode)
        self._channel = channel
        if self._connection is not None:
            self._connection.read_confirms(PUBLISH_CHANNEL, self._on_acks)
        self._link.ready()
        if not self._blocked:
            self._backlog.up()
        if not self._connection_serves:
            self._connection_serves = True
            self._backlog.tally.connects += 1
            call_hook(self._settings.on_connected, self._link.address)
        self._pump()

    def _on_channel_closed(self, channel: pika.channel.Channel, reason: Exception) -> None:
        if not isinstance(reason, pika.exceptions.ChannelClosedByBroker) or self._link_is_gone():
            return  # the connection's own end is reported to closed()
        self._channel = None
        if self._connection is not None:
            self._connection.read_all_with_pika()
        entries = self._confirms.clear()
        if named := [entry for entry in entries if _names_exchange(reason, entry)]:
            theirs = set(named)
            self._backlog.requeue([entry for entry in entries if entry not in theirs])
            self._settle_unroutable([(entry, told(reason)) for entry in named])
            self._suspects = 0
        elif len(entries) == 1:
            self._suspect(entries[0], reason)
        elif entries:
            # The broker does not say which one it was: one by one they show themselves.
            self._suspects = len(entries)
            self._backlog.requeue(entries)
        else:
            self._link.fail(ConnectionLost(f"the broker closed the channel: {told(reason)}"))
            return
        self._link.later(0, self._open_channel)  # when pika has forgotten this one

    def _link_is_gone(self) -> bool:
        return self._connection is None or not self._connection.is_open

    def _suspect(self, entry: Entry, reason: pika.exceptions.ChannelClosedByBroker) -> None:
        """Judge the entry that was alone on its way when the broker closed the channel."""
        logger.debug("the broker closed the channel over %r", entry.event)
        self._suspects = max(0, self._suspects - 1)
        if reason.reply_code not in _FAULTS_OF_MESSAGES:
            why = f"the broker closed the channel: {told(reason)}"
            self._keep_apart([entry], Nacked(why))
        elif entry is not self._accused:
            # It may have been about something else: only a second time proves it.
            self._accused = entry
            self._suspects += 1
            self._backlog.requeue([entry])
        else:
            self._accused = None
            if reason.reply_code == _NO_SUCH_EXCHANGE:
                self._settle_unroutable([(entry, told(reason))])
            else:
                self._notify(self._backlog.settle([entry], Fate.REJECTED, told(reason)))

    def _on_wake(self) -> None:
        self._woken = False
        self._pump()

    def _pump(self) -> None:
        """Write what waits, as far as the window has room."""
        while self._channel is not None and not self._blocked and self._backlog.queued:
            room = (1 if self._suspects else _WINDOW) - len(self._confirms)
            if room <= 0 or (room < _WRITE_EVENTS and len(self._confirms) > _WRITE_EVENTS):
                break  # a fuller write comes with the next confirms
            entries = self._backlog.take(min(room, _WRITE_EVENTS), _WRITE_BYTES)
            if not entries:
                break
            entries = self._delays.sendable(entries)
            if unsendable := [entry for entry in entries if not entry.frames]:
                entries = [entry for entry in entries if entry.frames]
                limit = self._encoder.frame_max
                why = f"its headers do not fit into one frame of the broker's {limit} bytes"
                self._notify(self._backlog.settle(unsendable, Fate.REJECTED, why))
            if not entries:
                continue
            self._confirms.sent(entries)
            pika_connection.publish(self._channel, entries)
        if len(self._confirms) and self._watched_since is None:
            self._watched_since = time.monotonic()
            if not self._watching:  # one may be left of an earlier connection
                self._watch()

    @property
    def _watch_interval(self) -> float:
        return min(1.0, self._settings.stall_timeout / 4) or 0.1

    def _on_watch(self) -> None:
        """Give the link up when it has been silent for too long with events outstanding."""
        self._watching = False
        if self._watched_since is None:
            return
        if not len(self._confirms):
            self._watched_since = None
            return
        silence = time.monotonic() - self._watched_since
        if silence > self._settings.stall_timeout and not self._blocked:
            self._link.fail(
                ConnectionLost(f"{self._link.address} has confirmed nothing for {silence:.1f} s")
            )
            return
        self._watch()

    def _watch(self) -> None:
        self._watching = True
        self._link.later(self._watch_interval, self._on_watch)

    def _on_confirm(
        self, frame: pika.frame.Method[pika.spec.Basic.Ack | pika.spec.Basic.Nack]
    ) -> None:
        """Take what comes by way of pika: every Nack, and where it reads all frames, every Ack."""
        method = frame.method
        if not isinstance(method, pika.spec.Basic.Nack):
            self._on_acks([(method.delivery_tag, method.multiple)])
            return
        entries, unroutable = self._confirms.confirmed([(method.delivery_tag, method.multiple)])
        self._note_answer(len(entries) + len(unroutable))
        self._settle_unroutable(unroutable)
        self._keep_apart(entries, _nacked(entries))
        self._pump()

    def _on_acks(self, acks: Sequence[tuple[int, int]]) -> None:
        entries, unroutable = self._confirms.confirmed(acks)
        self._note_answer(len(entries) + len(unroutable))
        if unroutable:
            self._settle_unroutable(unroutable)
        if entries:
            self._settle_confirmed(entries)
        self._pump()

    def _note_answer(self, answered: int) -> None:
        self._suspects = max(0, self._suspects - answered)
        if self._watched_since is not None:
            self._watched_since = time.monotonic()
        self._backlog.confirmed()

    def _settle_confirmed(self, entries: Sequence[Entry]) -> None:
        to_park = [entry for entry in entries if entry.parked_as is not None]
        if to_park:
            self._notify(self._backlog.settle(to_park, Fate.PARKED))
            entries = [entry for entry in entries if entry.parked_as is None]
        self._notify(self._backlog.settle(entries, Fate.PUBLISHED))

    def _on_return(
        self,
        _channel: pika.channel.Channel,
        method: pika.spec.Basic.Return,
        properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        reason = f"{method.reply_code} {one_line(method.reply_text)}"
        event_id = properties.message_id or ""
        if not self._confirms.returned(event_id, method.exchange, method.routing_key, reason):
            logger.warning("an event came back that is not outstanding: %r", event_id)

    def _settle_unroutable(self, unroutable: Sequence[tuple[Entry, str]]) -> None:
        by_fate: dict[tuple[Fate, str], list[Entry]] = {}
        to_park: list[Entry] = []
        again: list[Entry] = []
        for entry, reason in unroutable:
            policy = entry.event.unroutable or self._settings.unroutable
            if entry.parked_as is not None:
                self._homeless.append(entry)
            elif self._delays.may_be_mended(entry):
                again.append(entry)
            elif policy == "park":
                entry.parked_as = parked(entry.event, reason)
                entry.frames = self._encoder.encode(entry.parked_as)
                to_park.append(entry)
            else:
                fate = Fate.IGNORED if policy == "ignore" else Fate.REJECTED
                by_fate.setdefault((fate, f"unroutable: {reason}"), []).append(entry)
        for (fate, reason), entries in by_fate.items():
            self._notify(self._backlog.settle(entries, fate, reason))
        self._backlog.put_behind(to_park)  # group by group they keep their order
        self._send_again(again)
        if self._homeless and not self._making_parking_queue and self._connection is not None:
            self._making_parking_queue = True
            steps = topology.parking_queue(PARKING_QUEUE, self._settings.declare)
            topology.declare(self._connection, steps, self._on_parking_queue)

    def _send_again(self, entries: Sequence[Entry]) -> None:
        """Send again what came back from the ladder of delays: at once, but only once at once."""
        at_once = [entry for entry in entries if not entry.attempts]
        for entry in at_once:
            entry.attempts = 1
        self._backlog.requeue(at_once)
        if len(at_once) < len(entries):
            refused = Nacked("delayed events come back: parts of the ladder are missing")
            self._keep_apart([entry for entry in entries if entry not in set(at_once)], refused)

    def _on_way_made(self, entries: Sequence[Entry]) -> None:
        """Send delayed events, whose way is there now."""
        self._backlog.requeue(entries)
        self._pump()

    def _on_no_way(self, entries: Sequence[Entry], reason: str) -> None:
        """Deal with delayed events to what the broker does not have."""
        for entry in entries:
            entry.delayed_as = None
        self._settle_unroutable([(entry, reason) for entry in entries])
        self._pump()

    def _on_parking_queue(self, refused: str | None) -> None:
        """Send again what came back even from the parking queue, which should be there now."""
        self._making_parking_queue = False
        entries, self._homeless = self._homeless, []
        if refused is None and self._settings.declare == "create":
            self._backlog.requeue(entries)
            self._pump()
        else:
            logger.error("there is no queue %r to park events in: %s", PARKING_QUEUE, refused)
            self._keep_apart(entries, _nacked(entries))

    def _keep_apart(self, entries: Sequence[Entry], error: BrokerError) -> None:
        """Send again, each after a back-off of its own, what the broker would not take for now."""
        self._notify(self._backlog.refused(entries, error))
        for entry in entries:
            if entry.fate is None:
                self._link.later(backoff(entry.attempts - 1), functools.partial(self._retry, entry))

    def _retry(self, entry: Entry) -> None:
        self._backlog.requeue([entry])
        self._pump()

    def _on_blocked(
        self, _connection: object, frame: pika.frame.Method[pika.spec.Connection.Blocked]
    ) -> None:
        reason = one_line(frame.method.reason)
        self._blocked = True
        logger.warning("the broker at %s takes no events: %r", self._link.address, reason)
        self._notify(self._backlog.down((), Blocked(f"the broker takes no events: {reason}")))

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = False
        if self._watched_since is not None:
            self._watched_since = time.monotonic()
        if self._channel is not None:
            self._backlog.up()
            self._pump()


def _names_exchange(reason: pika.exceptions.ChannelClosedByBroker, entry: Entry) -> bool:
    """Return whether it is the exchange of ``entry`` that the broker does not have."""
    exchange = entry.sent_as.exchange
    return (
        bool(exchange)
        and reason.reply_code == _NO_SUCH_EXCHANGE
        and f"no exchange '{one_line(exchange)}' in vhost" in told(reason)
    )


def _nacked(entries: Sequence[Entry]) -> BrokerError:
    return Nacked(f"the broker refused {len(entries)} event(s) for now (basic.nack)")
