"""Decides the fates of unroutable events, and creates the parking queue when it is missing.

The rules:

1.  The event's policy, by default the publisher's, says whether it is parked, rejected or ignored.
2.  An event is parked by publishing it to the parking queue instead. Its fate is *parked* once the
    broker has confirmed that; until then it is in flight.
3.  If an event is returned from there too, the parking queue doesn't exist. If allowed, the queue
    is created on a separate channel, and the event is sent again. Otherwise the event is held, and
    tried again after a back-off, because the queue may be created.
4.  A task is never parked for want of its queue, which the first call may precede: the queue is
    declared, as a worker would, and the task is sent again. So that costs nothing otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from outbox.backlog.chunk import Entry, Fate
from outbox.messages import task_queues
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import Encoder

__all__ = ["Parking", "TaskQueueMaker"]

logger = logging.getLogger("outbox.publisher")

_AGAIN = 1.0
"""Seconds after which a queue that was declared is declared again: it may have been deleted. What
is returned before was sent before."""

Entries = Sequence[Entry]


class Parking:
    """The unroutable entries of one publisher. For the link's thread."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        """Take the publisher's encoder, the policy, and whether queues may be created."""
        self._encoder = encoder
        self._settings = settings

    def sort(
        self, unroutable: Iterable[tuple[Entry, str]]
    ) -> tuple[dict[tuple[Fate, str], list[Entry]], list[Entry], dict[str, list[Entry]]]:
        """Decide about unroutable entries, each given with the broker's reason.

        Returns:
            The entries with a fate, by fate and reason; the entries to send, now encoded for the
            parking queue; and those that were returned from there, by reason.
        """
        fates: dict[tuple[Fate, str], list[Entry]] = {}
        to_park: list[Entry] = []
        returned: dict[str, list[Entry]] = {}
        for entry, reason in unroutable:
            policy = entry.event.unroutable or self._settings.unroutable
            if entry.parked_as is not None:
                returned.setdefault(reason, []).append(entry)
            elif policy == "park":
                entry.parked_as = parked(entry.event, reason)
                entry.frames = self._encoder.encode(entry.parked_as)
                to_park.append(entry)
            else:
                fate = Fate.IGNORED if policy == "ignore" else Fate.REJECTED
                fates.setdefault((fate, f"unroutable: {reason}"), []).append(entry)
        return fates, to_park, returned

    def make_queue(
        self, connection: pika_connection.Connection, done: Callable[[str | None], None]
    ) -> None:
        """Create the parking queue if that is allowed; ``done`` gets None or the reason why not."""
        mode = self._settings.declare
        if mode == "create":
            topology.declare(connection, topology.parking_queue(PARKING_QUEUE, mode), done)
        else:
            done(f"not created, as declare={mode!r}")


class TaskQueueMaker:
    """Declares queues over one connection after the other. Only for the link's thread."""

    def __init__(
        self,
        settings: Settings,
        send_again: Callable[[Sequence[Entry]], None],
        unroutable: Callable[[Sequence[Entry], str], None],
    ) -> None:
        """Create a maker.

        Args:
            settings: the publisher's.
            send_again: the callback for entries whose queue is there now.
            unroutable: the callback for entries whose queue can't be declared, with the reason.
        """
        self._settings = settings
        self._send_again = send_again
        self._unroutable = unroutable
        self._waiting: dict[str, list[Entry]] = {}
        self._declaring: set[str] = set()
        self._refused: set[str] = set()  # over this connection
        self._made_at: dict[str, float] = {}

    def makes(self, entry: Entry) -> bool:
        """Return whether an unroutable entry is a task whose queue can be declared."""
        event = entry.event
        return (
            self._settings.declare == "create"
            and entry.parked_as is None
            and task_queues.is_task(event)
            and event.target not in self._refused
            and task_queues.spec_of(event.target, self._settings) is not None
        )

    def make(self, connection: pika_connection.Connection, entries: Sequence[Entry]) -> None:
        """Declare the queues of ``entries``, and send these again."""
        for entry in entries:
            queue = entry.event.target
            if queue in self._waiting:
                self._waiting[queue].append(entry)
            else:
                self._waiting[queue] = [entry]
        now = time.monotonic()
        for queue in dict.fromkeys(entry.event.target for entry in entries):
            if now - self._made_at.get(queue, -_AGAIN) < _AGAIN:
                self._send_again(self._waiting.pop(queue))
            elif queue not in self._declaring:
                self._declaring.add(queue)
                self._declare(connection, queue)

    def closed(self) -> list[Entry]:
        """Forget the connection, and return the entries that wait."""
        waiting = [entry for entries in self._waiting.values() for entry in entries]
        self._waiting.clear()
        self._declaring.clear()
        self._refused.clear()
        return waiting

    def _declare(self, connection: pika_connection.Connection, queue: str) -> None:
        spec = task_queues.spec_of(queue, self._settings)
        steps = [] if spec is None else topology.queue(spec, self._settings.declare)
        topology.declare(connection, steps, lambda refused: self._on_declared(queue, refused))

    def _on_declared(self, queue: str, refused: str | None) -> None:
        entries = self._waiting.pop(queue, [])
        self._declaring.discard(queue)
        if refused is None:
            self._made_at[queue] = time.monotonic()
            logger.info("declared the queue %r, to which a task is called", queue)
            self._send_again(entries)
        else:
            self._refused.add(queue)
            logger.error("cannot declare the queue %r of a task: %s", queue, refused)
            self._unroutable(entries, refused)
