"""Publishes over RabbitMQ: the I/O around backlog, confirms and link."""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import pika
import pika.channel
import pika.exceptions
import pika.frame
import pika.spec

from outbox.backlog.chunk import Entry, Fate
from outbox.backlog.notifier import Notifier, call_hook
from outbox.errors import Blocked, BrokerError, ConnectionLost, Nacked
from outbox.event import Event
from outbox.settings import Settings
from outbox.system.backoff import backoff
from outbox.transports.backlogged import BackloggedTransport
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import PUBLISH_CHANNEL, Encoder
from outbox.transports.rabbitmq.channel_faults import ChannelFaults
from outbox.transports.rabbitmq.confirms import Confirms
from outbox.transports.rabbitmq.delay_ladder import LONGEST_DELAY
from outbox.transports.rabbitmq.delayer import Delayer
from outbox.transports.rabbitmq.holding.addresses import exchange_of
from outbox.transports.rabbitmq.holding.gate import Gate
from outbox.transports.rabbitmq.holding.key_order import KeyOrder
from outbox.transports.rabbitmq.link import ConnectionApart, Link
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.parking import Parking, TaskQueueMaker
from outbox.transports.rabbitmq.pika_errors import (
    one_line,
    reply_of,
    was_ended_for_an_error,
)
from outbox.transports.rabbitmq.presence.announcer import Announcer
from outbox.url import BrokerURL

__all__ = ["RabbitMQTransport"]

logger = logging.getLogger("outbox.publisher")

_WRITE_EVENTS = 1000
_WRITE_BYTES = 256 * 1024
_WINDOW = 4 * _WRITE_EVENTS
"""The maximum of unconfirmed events: enough to keep the broker busy while confirms travel."""

_NONE: Mapping[Entry, int] = {}
_deliver_at = operator.attrgetter("event.deliver_at")
_RETIRING = 1.0
"""Seconds that a replaced transport waits for confirms under way. Its successor sends what has none
by then, so that it may arrive twice."""


class RabbitMQTransport(BackloggedTransport):
    """Publishes the events of all callers over one channel in confirm mode.

    Callers encode, and wake the link's thread, which writes, takes confirms and resolves futures.
    The methods below the line run on that thread.
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
            connection_parameters(url, settings, "publisher"),
            self,
            name="outbox-publisher",
            on_started=self._on_wake,
            on_ended=self._finish,
            kept=lambda: self.backlog.kept_size[0],
            credentials=settings.credentials,
        )
        self._connection: pika_connection.Connection | None = None
        self._channel: pika.channel.Channel | None = None  # set while it can be written to
        self._connection_serves = False  # whether a channel was opened on this connection
        self._retiring = False
        self._watched_since: float | None = None
        self._watching = False
        self._written = 0  # bytes sent over this connection, up to the end of the last event
        self._taken = 0  # those that the broker had taken when last looked at
        self._blocked = False
        self._faults = ChannelFaults()
        self._steps = topology.exchange(settings.exchange, settings.declare)
        creates = settings.declare == "create" and self._steps
        self._gate = Gate(self, settings.exchange if creates else "")
        self._parking = Parking(self._encoder, settings)
        self._key_order = KeyOrder()
        self._announcer = Announcer(settings.declare, lambda: self.connected)
        self._delayer = Delayer(
            self._encoder, settings.declare, self._resend, self._on_no_destination, self._set_aside
        )
        self._task_queues = TaskQueueMaker(settings, self._resend, self._on_no_task_queue)

    @property
    def connected(self) -> bool:
        """Whether a channel is open and the broker doesn't block it."""
        return self._channel is not None and not self._blocked

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller is a hook on the link's thread."""
        return self._link.on_thread

    def start(self) -> None:
        """Start connecting in the background, unless that has started."""
        self._link.start()

    def start_now(self) -> None:
        """Start the thread without connecting: later, Python may refuse to start one."""
        self._link.start_now(connect=False)

    def announce(self, body: bytes) -> None:
        """Publish ``body`` for those who listen to processes; drop it while that isn't possible."""
        self._link.call(lambda: self._announce(body))

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the link's thread; return False if it doesn't run."""
        return self._link.ping(answer)

    def _encode(self, event: Event) -> bytes:
        return self._encoder.encode(event)

    def _wake_thread(self) -> None:
        self._link.call(self._on_wake)

    def _stop_before_start(self) -> bool:
        return self._link.cancel_start()

    def _stop(self, *, graceful: bool) -> bool:
        return self._link.stop(graceful=graceful)

    # ------------------------------------------------------------------ on the link's thread

    def opened(self, connection: pika_connection.Connection) -> None:
        """Declare the exchange, then open a channel."""
        self._connection = connection
        self._gate.opened(connection)
        self._delayer.opened(connection)
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        topology.declare(connection, self._steps, self._on_declared)

    def closed(self, error: BrokerError) -> None:
        """Put the entries in flight back into the queue, and open the circuit."""
        was_connected = self._connection_serves
        self._connection_serves = False
        self._connection = self._channel = None
        self._blocked = False
        self._announcer.closed()
        self._watched_since = None
        self._written = self._taken = 0
        in_flight, for_an_error = self._confirms.clear(), was_ended_for_an_error(error)
        if for_an_error and in_flight and not self._gate.busy:
            suspect = self._faults.connection_ended(in_flight)
            if suspect is not None:
                self._gate.suspect(suspect)
        # Oldest first: entries refused by the broker, those in flight, those not sent yet.
        held, delayed = self._gate.closed(by_broker=for_an_error), self._delayer.closed()
        nacked, tasks = self._key_order.closed(), self._task_queues.closed()
        self._notify(self.backlog.down([*held, *in_flight, *nacked, *delayed, *tasks], error))
        if was_connected:
            call_hook(self._settings.on_disconnected, error)

    def _on_declared(self, refused: str | None) -> None:
        if refused is not None:
            # Publish all the same: the exchange may exist with another type or other arguments.
            logger.error("cannot declare the exchange %r: %s", self._settings.exchange, refused)
        elif self._steps:
            self._gate.exchange_exists(self._settings.exchange)
        self._open_channel()

    def _open_channel(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.channel(PUBLISH_CHANNEL, self._on_channel_open)

    def _on_channel_open(self, channel: pika.channel.Channel) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, lambda _frame: self._on_channel_ready(channel))

    def _on_channel_ready(self, channel: pika.channel.Channel) -> None:
        self._encoder.limit_frames(channel.connection.params.frame_max)
        self._channel = channel
        if self._connection is not None:
            self._connection.read_confirms(PUBLISH_CHANNEL, self._on_acks)
        self._link.ready()
        if not self._blocked:
            self._up()
        if not self._connection_serves:
            self._connection_serves = True
            self.backlog.tally.connects += 1
            call_hook(self._settings.on_connected, self._link.address)
        self._pump()

    def _on_channel_closed(self, channel: pika.channel.Channel, reason: Exception) -> None:
        if not isinstance(reason, pika.exceptions.ChannelClosedByBroker) or self._link_is_gone():
            return  # the link calls closed() when the connection ends
        self._channel = None
        if self._connection is not None:
            self._connection.read_all_with_pika()
        entries, why = self._confirms.clear(), reply_of(reason)
        if not entries:
            self._link.fail(ConnectionLost(f"the broker closed the channel: {why}"))
            return
        verdict = self._faults.judge(entries, reason.reply_code, why)
        self.backlog.requeue(verdict.again)
        if verdict.later:
            self._set_aside(verdict.later, Nacked(f"the broker closed the channel: {why}"))
        if verdict.unroutable:
            self._gate.missing(verdict.unroutable, why)
        if verdict.refused:
            self._gate.refused(verdict.refused, why, by_topic=verdict.by_topic)
        if verdict.rejected:
            self.reject(verdict.rejected, why)
        # In the loop's next turn: until then pika still has the closed channel under this number.
        self._link.later(0, self._open_channel)

    def _link_is_gone(self) -> bool:
        return self._connection is None or not self._connection.is_open

    def _on_wake(self) -> None:
        self._take_in()
        self._pump()

    def _hurry(self) -> None:
        self._link.hurry()
        self._gate.hurry()

    def _on_retire(self) -> None:
        self._retiring = True
        self._link.later(_RETIRING, self._surrender)
        self._pump()

    def _surrender(self) -> None:
        # Forget all entries: what happens on this connection from now on doesn't concern them.
        self._confirms.clear()
        self._gate.closed(by_broker=False)
        self._delayer.closed()
        self._key_order.closed()
        self._task_queues.closed()
        super()._surrender()
        self._link.stop()

    def _pump(self) -> None:
        """Write queued entries until the window is full."""
        if self._retiring:
            if not len(self._confirms):
                self._surrender()
            return
        while self._channel is not None and not self._blocked and self.backlog.queued:
            room = (1 if self._faults.to_isolate else _WINDOW) - len(self._confirms)
            if room <= 0 or (room < _WRITE_EVENTS and len(self._confirms) > _WRITE_EVENTS):
                break  # the next confirms make room for a larger write
            entries = self.backlog.take(min(room, _WRITE_EVENTS), _WRITE_BYTES)
            if not entries:
                break
            if self._key_order.keys:
                entries = self._keep_order(entries)
            has_delayed = any(map(_deliver_at, entries))
            if has_delayed:
                entries = self._delayer.sendable(entries)
            if self._encoder.limited:
                self._encode_anew(entries)
            if unsendable := [entry for entry in entries if not entry.frames]:
                entries = [entry for entry in entries if entry.frames]
                limit = self._encoder.frame_max
                why = f"its headers do not fit into one frame of at most {limit} bytes"
                self.reject(unsendable, why)
            plain = self._gate.addresses.plain
            if has_delayed or not plain.issuperset(map(exchange_of, entries)):
                entries = self._gate.admit(entries)
            if not entries:
                continue
            self._confirms.sent(entries)
            pika_connection.publish(self._channel, entries)
            self.written()

    def _encode_anew(self, entries: Sequence[Entry]) -> None:
        """Encode what may hold a frame that is too large: made before the limit was known."""
        limit = self._encoder.frame_max
        for entry in entries:
            if len(entry.frames) > limit:
                entry.frames = self._encoder.encode(entry.sent_as)

    @property
    def _watch_interval(self) -> float:
        return min(1.0, self._settings.stall_timeout / 4) or 0.1

    def _on_watch(self) -> None:
        """Reconnect if nothing has moved for too long with events in flight.

        Both a confirm and bytes of events that the broker takes are progress: on a slow link, a
        large event is under way for longer than ``stall_timeout``. Heartbeats, which are written
        behind the events, are none: a broker that only takes those has stalled.
        """
        self._watching = False
        if self._watched_since is None:
            return
        if not len(self._confirms) and not self._gate.busy:
            self._watched_since = None
            return
        if self._connection is not None:
            taken = min(self._connection.bytes_taken, self._written)
            if taken != self._taken:
                self._taken = taken
                self._watched_since = time.monotonic()
        silence = time.monotonic() - self._watched_since
        if silence > self._settings.stall_timeout and not self._blocked:
            self._link.fail(
                ConnectionLost(
                    f"{self._link.address} has confirmed nothing for {silence:.1f} s, "
                    "nor taken any more of what was sent"
                )
            )
            return
        self._watch()

    def _watch(self) -> None:
        self._watching = True
        self._link.later(self._watch_interval, self._on_watch)

    def _on_confirm(
        self, frame: pika.frame.Method[pika.spec.Basic.Ack | pika.spec.Basic.Nack]
    ) -> None:
        """Take an answer from pika: every Nack, and an Ack only if pika reads all frames."""
        method = frame.method
        if not isinstance(method, pika.spec.Basic.Nack):
            self._on_acks([(method.delivery_tag, method.multiple)])
            return
        numbers = self._confirms.numbers(method.delivery_tag, multiple=method.multiple)
        entries, unroutable = self._confirms.confirmed([(method.delivery_tag, method.multiple)])
        self._note_answer(len(entries) + len(unroutable))
        self._handle_unroutable(unroutable)
        self._on_nacked(entries, numbers)
        self._pump()

    def _on_acks(self, acks: Sequence[tuple[int, int]]) -> None:
        entries, unroutable = self._confirms.confirmed(acks)
        self._note_answer(len(entries) + len(unroutable))
        if unroutable:
            self._handle_unroutable(unroutable)
        if entries:
            self._finish_confirmed(entries)
        self._pump()

    def _note_answer(self, answered: int) -> None:
        if self._faults.to_isolate:
            self._faults.answered(answered)
        if self._watched_since is not None:
            self._watched_since = time.monotonic()
        self.backlog.confirmed()

    def _finish_confirmed(self, entries: Sequence[Entry]) -> None:
        to_park = [entry for entry in entries if entry.parked_as is not None]
        if to_park:
            self._notify(self.backlog.give_fate(to_park, Fate.PARKED))
            entries = [entry for entry in entries if entry.parked_as is None]
        self._notify(self.backlog.give_fate(entries, Fate.PUBLISHED))
        if self._key_order.keys:
            self._end_turns([*to_park, *entries])

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
            logger.warning("ignoring returned event %r, which is not in flight", event_id)

    def _handle_unroutable(self, unroutable: Sequence[tuple[Entry, str]]) -> None:
        """Park, reject or ignore unroutable entries, each with the broker's reason."""
        connection = self._connection
        if connection is not None and connection.is_open:
            tasks = [entry for entry, _ in unroutable if self._task_queues.makes(entry)]
            if tasks:
                unroutable = [each for each in unroutable if each[0] not in set(tasks)]
                self._task_queues.make(connection, tasks)
        from_ladder = [entry for entry, _ in unroutable if self._delayer.needs_ladder(entry)]
        excluded = set(from_ladder)
        for entry in from_ladder:  # the delayer declares what is missing
            self._gate.forget_fault(entry.sent_as.exchange)
        fates, to_park, returned = self._parking.sort(
            (entry, reason) for entry, reason in unroutable if entry not in excluded
        )
        for (fate, reason), entries in fates.items():
            self._notify(self.backlog.give_fate(entries, fate, reason))
            self._end_turns(entries)
        if to_park:
            self._gate.note_parked()
            self.backlog.put_behind(to_park)  # at the end, where successive groups keep their order
        for reason, entries in returned.items():
            self._gate.unparked(entries, reason)
        self._send_again(from_ladder)

    def _send_again(self, entries: Sequence[Entry]) -> None:
        """Send entries returned from the delay ladder again: first at once, then with back-off."""
        at_once = [entry for entry in entries if not entry.attempts]
        for entry in at_once:
            entry.attempts = 1
        self.backlog.requeue(at_once)
        if len(at_once) < len(entries):
            error = Nacked("delayed events were returned: parts of the delay ladder are missing")
            self._set_aside([entry for entry in entries if entry not in set(at_once)], error)

    def _on_no_task_queue(self, entries: Sequence[Entry], reason: str) -> None:
        self._handle_unroutable([(entry, reason) for entry in entries])
        self._pump()

    def _on_no_destination(self, entries: Sequence[Entry], reason: str) -> None:
        """Treat delayed entries as unroutable, because their queue or exchange is missing."""
        for entry in entries:
            entry.delayed_as = None
        self._handle_unroutable([(entry, reason) for entry in entries])
        self._pump()

    def _on_nacked(self, entries: Sequence[Entry], numbers: Mapping[Entry, int] = _NONE) -> None:
        error = Nacked(f"the broker nacked {len(entries)} event(s) (basic.nack)")
        self._set_aside(entries, error, numbers)

    def _set_aside(
        self, entries: Sequence[Entry], error: BrokerError, numbers: Mapping[Entry, int] = _NONE
    ) -> None:
        """Keep ``entries`` outside the queue, and send each again after its back-off.

        Those with a key take turns, in the order of ``numbers``.
        """
        self._notify(self.backlog.refused(entries, error))
        unsettled = [entry for entry in entries if entry.fate is None]
        with_key = [entry for entry in unsettled if entry.event.key is not None]
        for key in self._key_order.nacked(with_key, numbers):
            attempts = max(entry.attempts for entry in with_key if entry.event.key == key)
            take_turn = functools.partial(self._take_turn, key)
            self._link.later(backoff(attempts - 1), take_turn)
        for entry in unsettled:
            if entry.event.key is None:
                resend = functools.partial(self._resend, [entry])
                self._link.later(backoff(entry.attempts - 1), resend)

    def _keep_order(self, entries: list[Entry]) -> list[Entry]:
        """Return those of ``entries`` that need not wait behind a nacked one with their key."""
        ready, waiting = self._key_order.hold_back(entries)
        if waiting:
            error = Nacked("an earlier event with the same key was nacked (basic.nack)")
            self._notify(self.backlog.hold(waiting, error))
            self.backlog.release_held(waiting)  # they count like what the broker nacked
        return ready

    def _take_turn(self, key: str) -> None:
        entry = self._key_order.take_turn(key)
        if entry is not None:
            self._resend([entry])

    def _end_turns(self, entries: Iterable[Entry]) -> None:
        for key in self._key_order.settled(entries):
            self._take_turn(key)

    def _resend(self, entries: Sequence[Entry]) -> None:
        """Send ``entries`` again now, unless they belong to the successor."""
        if self.successor is not None:
            return
        self.backlog.requeue(entries)
        self._pump()

    # -------------------------------------------------------------------- what the gate asks for

    def pass_on(self, entries: Sequence[Entry]) -> None:
        """Publish ``entries`` now, ahead of others."""
        self.backlog.release_held(entries)
        self._resend(entries)

    def answered(self, entry: Entry, *, nacked: bool, returned: str) -> None:
        """Treat ``entry`` as answered by the broker."""
        self._note_answer(1)
        self.backlog.release_held([entry])
        if returned:
            self._handle_unroutable([(entry, returned)])
        elif nacked:
            self._on_nacked([entry])
        else:
            self._finish_confirmed([entry])

    def unroutable(self, entries: Sequence[Entry], reason: str) -> None:
        """Park, reject or ignore ``entries``."""
        self.backlog.release_held(entries)
        self._handle_unroutable([(entry, reason) for entry in entries])
        self._wake()

    def reject(self, entries: Sequence[Entry], reason: str) -> None:
        """Give up ``entries``."""
        self._notify(self.backlog.give_fate(entries, Fate.REJECTED, reason))
        self._end_turns(entries)

    def hold(self, entries: Sequence[Entry], reason: str) -> None:
        """Report ``entries`` as kept: the gate holds them."""
        self._notify(self.backlog.hold(entries, Nacked(f"the broker refuses the event: {reason}")))

    def written(self) -> None:
        """Watch that the broker takes and answers what has been sent."""
        if self._connection is not None:
            self._written = self._connection.bytes_sent
        if self._watched_since is None:
            self._watched_since = time.monotonic()
            if not self._watching:  # the timer of an earlier connection may still be running
                self._watch()

    def later(self, delay: float, function: Callable[[], None]) -> None:
        """Call ``function`` in ``delay`` seconds."""
        self._link.later(delay, function)

    def look_for(self, exchange: str, done: Callable[[str | None], None]) -> None:
        """Declare ``exchange`` passively."""
        if self._connection is not None and self._connection.is_open:
            topology.declare(self._connection, [topology.existing_exchange(exchange)], done)

    def declare_again(self, done: Callable[[str | None], None]) -> None:
        """Declare the publisher's own exchange."""
        if self._connection is not None and self._connection.is_open:
            topology.declare(self._connection, self._steps, done)

    def make_parking_queue(self, done: Callable[[str | None], None]) -> None:
        """Declare the parking queue, if that is allowed."""
        if self._connection is not None and self._connection.is_open:
            self._parking.make_queue(self._connection, done)

    def connect_apart(
        self,
        opened: Callable[[pika_connection.Connection], None],
        ended: Callable[[int, str], None],
    ) -> ConnectionApart:
        """Open another connection."""
        return self._link.connect_apart(opened, ended)

    def _announce(self, body: bytes) -> None:
        if self._connection is not None:
            self._announcer.announce(self._connection, body)

    # ------------------------------------------------------------------------- a blocking broker

    def _on_blocked(
        self, _connection: object, frame: pika.frame.Method[pika.spec.Connection.Blocked]
    ) -> None:
        reason = one_line(frame.method.reason)
        self._blocked = True
        logger.warning("the broker at %s blocks publishers: %r", self._link.address, reason)
        self._notify(self.backlog.down((), Blocked(f"the broker blocks publishers: {reason}")))

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = False
        if self._watched_since is not None:
            self._watched_since = time.monotonic()
        if self._channel is not None:
            self._up()
            self._pump()
