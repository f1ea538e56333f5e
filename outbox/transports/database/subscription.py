"""Consumes from a database: claims rows, extends their leases, settles them."""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from outbox.backlog.chunk import Fate
from outbox.backlog.notifier import ids
from outbox.errors import BrokerError, ConnectionLost, OutboxError, UsageError
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import Delivery, QueueSpec, dead_letter_queue
from outbox.messages.rows import UNROUTED
from outbox.settings import Settings
from outbox.storage.store import OWNER_LENGTH, Claimed
from outbox.storage.upkeep import published_rows
from outbox.storage.upkeep.purging import Purging
from outbox.system.backoff import backoff
from outbox.transports.database import routing
from outbox.transports.database.claimed_rows import (
    delivery_of,
    is_deadly,
    is_suspect,
    letter_of_deadly,
)
from outbox.transports.database.clock_jumps import ClockJumps
from outbox.transports.database.kinds import database_at
from outbox.transports.database.leases import Leases
from outbox.transports.database.pace import Pace
from outbox.transports.database.plan import Plan, rows_of
from outbox.transports.database.router import Router, StoredEvent
from outbox.url import BrokerURL

__all__ = ["DatabaseSubscription"]

logger = logging.getLogger("outbox.consumer")

_FIRST_POLL = 0.01
"""Seconds between two looks while messages come; when none do, it grows to the database's."""
_POLL_GROWTH = 1.3
_LOOK_AGAIN = 1.25
"""Seconds after which due rows are looked up in any case: the system's clock may have been set."""

_LOOK_FOR_URGENT = 0.04
"""Seconds between two looks for tasks that overtake those which are claimed."""

_LOOK_FOR_STORED = 1.0
"""Seconds between two looks for stored events that their processes have not routed."""

_LONGEST_PAUSE = 2.0
"""The longest back-off in seconds: short, because the leases have to be extended in time."""

_LOOK_AT_CLOCK = 0.5
"""The longest time in seconds in which a worker with leases doesn't notice a jump of the clock."""

_TIME_TO_EXTEND = 2.0
"""Seconds after such a jump, or a long outage, in which other workers have extended their leases
once they have noticed."""

_ALONE = 60.0
"""Seconds for which a message that was lost several times may keep others from being claimed, and
others may keep it from being claimed."""

_CANCEL_TIMEOUT = 2.0
_CLOSE_TIMEOUT = 3.0


_CLOCK_JUMPED = "the clock has jumped %.0f s forward: extending all leases"
_REPLACED = (
    "%s was deleted or replaced by another file: declaring the queues there; %d message(s) of the "
    "old one can't be acknowledged any more"
)


class _Done(NamedTuple):
    """A settlement to write: an ack if ``delay`` is None, else a requeue in ``delay`` seconds.

    With ``headers`` the message waits for its next attempt, and they are added to its own.
    """

    tag: int
    delay: float | None
    headers: Mapping[str, Any] | None = None


class _Written(NamedTuple):
    """What a turn has written.

    Attributes:
        extended: the numbers of the rows that are still leased; None if no leases were extended.
        claimed: the rows that were claimed.
        routed: what became of stored events; None if none were to be routed.
    """

    extended: set[int] | None
    claimed: list[Claimed]
    routed: Plan[StoredEvent] | None


class _OwnRowsAreDue(Exception):
    """A claim has got rows that this worker holds: their leases ended early, by the clock."""


class _Dead(NamedTuple):
    """Dead processes whose rows are to be released, and what had been begun there."""

    owners: Sequence[str]
    was_begun: Callable[[str, str], bool]


class DatabaseSubscription:
    """Settles and claims rows for all queues of a worker, on one thread.

    Each turn is one transaction. Handlers run elsewhere. The methods below the line run on that
    thread.
    """

    limits_processing = False
    keeps_order = True

    def __init__(
        self, url: BrokerURL, settings: Settings, queues: Sequence[QueueSpec], prefetch: int
    ) -> None:
        """Check the URL, and that a file can be created; nothing is connected yet.

        Raises:
            UsageError: the URL has an unknown option, or the database can't be used.
        """
        self.owner = uuid.uuid4().hex[:OWNER_LENGTH]
        self._settings = settings
        self._queues = queues
        self._ordered = {queue.name for queue in queues if queue.ordered}
        self._paces = {queue.name: Pace(queue.places) for queue in queues if queue.places}
        self._held_up_until: dict[str, float] = {}  # by queue, when to look there again
        self._stopping = False
        self._give_up_at = 0.0
        self._database = database_at(
            url,
            lambda: self._stopping and time.monotonic() > self._give_up_at,
            self._on_reopened,
            owner=self.owner,
        )
        self._leases = Leases(prefetch, self._database.lease)
        # Written only when the database isn't in use: a log handler may publish.
        self._to_log: list[tuple[int, str, tuple[Any, ...]]] = []
        self._clock_jumps = ClockJumps()
        self._claim_at = 0.0
        self._keeps = settings.keep_published > 0
        self._purging = Purging(settings.keep_published)
        self._deliver: Callable[[Delivery], None] = _not_started
        self._refused: Callable[[str], None] = _not_started
        self._wake = threading.Event()
        self._cancelling = False
        self._cancelled = threading.Event()
        self._done: deque[_Done] = deque()
        self._dead: deque[_Dead] = deque()
        self._suspected: str | None = None  # the queue of a message that is claimed alone
        self._alone_at = 0.0
        self._thread: threading.Thread | None = None
        self._to_declare = True
        self._in_doubt = False  # whether a claim may have been committed unnoticed
        self._has_consumed = False
        self._failures = 0
        self._worked_at = time.monotonic()
        self._poll = _FIRST_POLL
        self._look_at = 0.0
        self._router = Router(settings)
        self._routes_stored = False
        self._look_for_stored_at = 0.0

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Declare the queues and consume, until :meth:`cancel`."""
        self._deliver = deliver
        self._refused = refused
        self._database.listen(self._wake, [queue.name for queue in self._queues])
        self._thread = threading.Thread(target=self._run, name="outbox-consumer", daemon=True)
        self._thread.start()

    @property
    def is_consuming(self) -> bool:
        """Whether the queues are declared and the last turn succeeded."""
        return self._has_consumed and not self._failures

    def ping(self, answer: Callable[[], None]) -> bool:
        """Return False: another process may keep the database locked for long."""
        return False

    def release_of(self, owners: Sequence[str], was_begun: Callable[[str, str], bool]) -> None:
        """Release the rows of dead processes soon, in place."""
        self._dead.append(_Dead(owners, was_begun))
        self._wake.set()

    def ack(self, delivery: Delivery) -> None:
        """Delete the row of ``delivery`` soon, together with others."""
        self._done.append(_Done(delivery.tag, None))
        self._wake.set()

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Release the row of ``delivery`` soon, due in ``delay`` seconds."""
        self._done.append(_Done(delivery.tag, delay))
        self._wake.set()

    def back_off(self, delivery: Delivery, delay: float, headers: Mapping[str, Any]) -> None:
        """Release the row of ``delivery`` soon, in its place, with ``headers`` added to its own."""
        self._done.append(_Done(delivery.tag, delay, headers))
        self._wake.set()

    def out(self, queue: str) -> int:
        """Return the number of leased rows of ``queue``."""
        return self._leases.held(queue)

    def is_stale(self, delivery: Delivery) -> bool:
        """Return whether the lease of ``delivery`` was lost."""
        return delivery.tag not in self._leases

    def declare_again(self) -> None:
        """Declare all queues again, soon."""
        self._to_declare = True
        self._wake.set()

    def cancel(self) -> None:
        """Stop claiming, and wait at most 2 seconds until that takes effect."""
        self._cancelling = True
        self._wake.set()
        if self._thread is not None:
            self._cancelled.wait(_CANCEL_TIMEOUT)

    def close(self) -> None:
        """Write the settlements, return the other rows to their places, and disconnect."""
        self._database.stop_listening(self._wake)
        self._give_up_at = time.monotonic() + _CLOSE_TIMEOUT - 1.0
        self._cancelling = self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_TIMEOUT)

    # ------------------------------------------------------------------------ on its own thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._wait()
                if not self._stopping:
                    self._turn()
                    self._has_consumed = True
                    self._failures = 0
                    self._worked_at = time.monotonic()
            except _OwnRowsAreDue:
                self._leases.extend_soon()
            except (BrokerError, UsageError) as error:
                self._on_failure(error)
            except Exception as error:  # a bug in outbox must not end the thread
                logger.exception(
                    "unexpected error while consuming from %s; retrying", self._database.name
                )
                self._on_failure(ConnectionLost(str(error)))
            self._write_log()
        self._give_back()
        self._database.end()
        self._cancelled.set()

    def _write_log(self) -> None:
        lines, self._to_log = self._to_log, []
        for level, message, arguments in lines:
            logger.log(level, message, *arguments)

    def _wait(self) -> None:
        """Wait until there is something to do."""
        while True:
            self._wake.clear()
            if self._cancelling:
                self._cancelled.set()
            now = time.monotonic()
            has_room = (
                self._may_claim(now)
                and any(self._may_have_room(queue.name) for queue in self._queues)
                and not (len(self._leases) and self._is_left_alone(now))
            )
            extend_in = self._leases.extend_in(now)
            if (
                self._stopping
                or self._done
                or self._dead
                or self._to_declare
                or self._in_doubt
                or self._purging.due_in() <= 0
                or (extend_in is not None and extend_in <= 0)
                or (has_room and self._is_due(now))
            ):
                return
            if self._was_replaced(has_room):
                return
            self._write_log()
            if self._wake.wait(min(self._pauses(now, extend_in, has_room), default=None)):
                self._look_at = 0.0
                soon = time.monotonic() + _FIRST_POLL
                for queue, until in self._held_up_until.items():
                    self._held_up_until[queue] = min(until, soon)
            elif has_room:
                self._poll = min(self._database.poll, self._poll * _POLL_GROWTH)

    def _was_replaced(self, has_room: bool) -> bool:
        """Return whether the queues have to be declared, since the file is another one now."""
        if not has_room and not self._cancelling:  # nothing else has looked at it
            self._database.open()
        return self._to_declare

    def _pauses(self, now: float, extend_in: float | None, has_room: bool) -> list[float]:
        pauses = []
        if extend_in is not None:
            pauses += [extend_in, _LOOK_AT_CLOCK]
        if now < self._claim_at:
            pauses.append(self._claim_at - now)
        if self._keeps:
            pauses.append(max(0.0, self._purging.due_in()))
        if has_room:
            pauses += [min(self._poll, self._database.poll), max(0.0, self._look_at - now)]
        return pauses

    def _may_claim(self, now: float) -> bool:
        """Return whether to claim rows: not while stopping, or while others extend their leases."""
        if jump := self._clock_jumps.look():
            # By the clock all leases may have ended by now. Each worker extends its own ones before
            # another worker takes their rows, which are being processed.
            self._to_log.append((logging.WARNING, _CLOCK_JUMPED, (jump,)))
            self._leases.extend_soon()
            self._claim_at = now + _TIME_TO_EXTEND
        return not self._cancelling and now >= self._claim_at

    def _is_due(self, now: float) -> bool:
        """Return whether a row is due, looking it up only if the answer may have changed."""
        if not self._database.changed() and now < self._look_at:
            return False
        queues = [
            queue.name
            for queue in self._queues
            if self._may_have_room(queue.name) and self._held_up_until.get(queue.name, 0.0) <= now
        ]
        self._routes_stored = self._looks_for_stored(now)
        if self._routes_stored:
            queues.append(UNROUTED)
        due_in = self._database.due_in(queues)
        self._worked_at = now
        soonest = _LOOK_AGAIN if due_in is None else due_in
        for until in self._held_up_until.values():
            if until > now:
                soonest = min(soonest, until - now)
        if soonest <= 0:
            self._database.note_found()
        self._look_at = now + min(max(soonest, 0.0), _LOOK_AGAIN)
        return soonest <= 0

    def _looks_for_stored(self, now: float) -> bool:
        """Return whether it is time to look for stored events that nothing has routed.

        Any worker does that for all queues, since the process that stored them may be dead.
        """
        if now < self._look_for_stored_at:
            return False
        self._look_for_stored_at = now + _LOOK_FOR_STORED
        return True

    def _may_have_room(self, queue: str) -> bool:
        """Return whether rows of ``queue`` may be claimed; urgent tasks always."""
        return queue in self._paces or self._leases.free(queue) > 0

    def _turn(self) -> None:
        now = time.monotonic()
        done = [self._done.popleft() for _ in range(len(self._done))]
        dead = [self._dead.popleft() for _ in range(len(self._dead))]
        declaring, self._to_declare = self._to_declare, False
        try:
            written = None
            # A busy worker comes here without a look before.
            self._routes_stored |= self._looks_for_stored(now)
            if not (dead or declaring or self._in_doubt or self._routes_stored or self._keeps):
                written = self._exchange(now, done)
            if written is None:
                write = functools.partial(self._write, now, done, dead, declares=declaring)
                written = self._database.run(write, durable=False)
            extended, claimed, routed = written
        except BaseException:
            # Rolled back: the next turn does all of it. So the leases change only after the commit.
            self._done.extendleft(reversed(done))
            self._dead.extendleft(reversed(dead))
            self._to_declare |= declaring
            raise
        self._in_doubt = False
        if self._paces:
            self._note_paces(done, claimed)
        self._leases.drop(settlement.tag for settlement in done)
        if extended is not None and (lost := self._leases.extended(extended, now)):
            logger.warning(
                "lost %d message(s): their leases ended, and other workers have claimed them", lost
            )
        if claimed:
            self._poll = _FIRST_POLL
        self._look_at = 0.0
        self._routes_stored = False
        if routed is not None:
            self._note_routed(routed)
        for row in claimed:
            if not is_deadly(row):
                self._deliver(delivery_of(row, self._leases.take(row, now)))
                continue
            logger.error(
                "dead-lettered message %r of %r: it was delivered too often without being settled",
                row.event.id,
                row.queue,
            )

    def _write(
        self,
        now: float,
        done: Sequence[_Done],
        dead: Sequence[_Dead],
        connection: Connection,
        *,
        declares: bool,
    ) -> _Written:
        """Write what has happened, route stored events if need be, and claim rows."""
        if declares:
            self._declare(connection)
        self._settle(done, connection)
        self._purging.turn(functools.partial(published_rows.purge, connection))
        self._release_dead(dead, connection)
        if self._in_doubt:
            self._release_unknown(connection)
        extend_in = self._leases.extend_in(now)
        extended = self._extend(connection) if extend_in is not None and extend_in <= 0 else None
        may_claim = self._may_claim(now)
        routed = None
        if may_claim and self._routes_stored:
            routed = self._router.route_stored(self._database.store, connection)
        claimed = self._claim(done, connection) if may_claim else []
        if self._leases.among(claimed, settled={settlement.tag for settlement in done}):
            raise _OwnRowsAreDue
        self._dead_letter([row for row in claimed if is_deadly(row)], connection)
        self._in_doubt |= bool(claimed)
        return _Written(extended, claimed, routed)

    def _exchange(self, now: float, done: Sequence[_Done]) -> _Written | None:
        """Do the same as :meth:`_write` in one round trip for each queue.

        It is what a worker does nearly always: delete what is acked, and claim as much. Handlers go
        on while the database does that. None if there is something else to do.
        """
        may_claim = self._may_claim(now)
        extend_in = self._leases.extend_in(now)
        if (
            not may_claim
            or (extend_in is not None and extend_in <= 0)
            or self._ordered
            or self._paces
            or self._suspected is not None
            or any(settlement.delay is not None for settlement in done)
        ):
            return None
        settled = self._settled(done)
        names = [queue.name for queue in self._queues]
        free = {name: self._leases.free(name) + settled[name] for name in names}
        queues = [name for name, room in free.items() if room > 0]
        if not queues or not self._database.exchanges(queues):
            return None
        acked = [row for tag, _, _ in done if (row := self._leases.get(tag)) is not None]
        claimed: list[Claimed] = []
        self._in_doubt = True
        for name in queues:
            claimed += self._database.exchange(acked, free[name], name)
            acked = []
        if any(map(is_suspect, claimed)):
            claimed = self._database.run(functools.partial(self._sift, claimed), durable=False)
        return _Written(None, claimed, None)

    def _note_paces(self, done: Sequence[_Done], claimed: Sequence[Claimed]) -> None:
        settled = self._settled(done)
        new = Counter(row.queue for row in claimed)
        now = time.monotonic()
        for name, pace in self._paces.items():
            held = self._leases.held(name) - settled[name] + new[name]
            pace.note(settled[name], held, now)

    def _settled(self, done: Sequence[_Done]) -> Counter[str]:
        """Return the number of rows that are settled, by queue."""
        rows = (self._leases.get(tag) for tag in {settlement.tag for settlement in done})
        return Counter(row.queue for row in rows if row is not None)

    def _note_routed(self, routed: Plan[StoredEvent]) -> None:
        """Wake the workers that get what was routed, and have more routed soon, if there is any."""
        self._look_for_stored_at = 0.0
        self._database.published({row["queue"] for row in routed.rows})
        for (fate, reason), stored in routed.fates.items():
            those = ids(each.event for each in stored)
            if fate is Fate.PARKED:
                logger.warning("%d stored event(s) parked in %r: %s; no queue is bound to them",
                               len(stored), PARKING_QUEUE, those)  # fmt: skip
            elif fate is Fate.REJECTED:
                logger.error("%d stored event(s) are dead: %s; %s", len(stored), those, reason)
        if routed.without_queue:
            those = ids(each.event for each in routed.without_queue)
            logger.error("cannot park %d stored event(s), no queue %r: %s",
                         len(routed.without_queue), PARKING_QUEUE, those)  # fmt: skip

    def _declare(self, connection: Connection) -> None:
        """Create the queues, or check that they exist.

        Raises:
            UsageError: a queue is missing and must not be created, or a table that is needed.
        """
        if self._keeps:
            published_rows.check(connection)
        names = [
            name for queue in self._queues for name in (dead_letter_queue(queue.name), queue.name)
        ]
        if self._settings.declare == "create":
            bindings = [each for queue in self._queues for each in routing.of_consumer(queue)]
            routing.add(connection, bindings)
        else:
            if self._settings.declare == "never":
                names = [queue.name for queue in self._queues]
            existing = set(routing.load(connection))
            missing = [name for name in names if routing.of_queue(name) not in existing]
            if missing:
                raise UsageError(f"NOT_FOUND - no queue {missing[0]!r}")

    def _settle(self, done: Sequence[_Done], connection: Connection) -> None:
        store = self._database.store
        acked: list[Claimed] = []
        returned: dict[float, list[Claimed]] = {}
        for tag, delay, headers in done:
            row = self._leases.get(tag)
            if row is None:
                continue
            if delay is not None and headers is not None:
                store.back_off(row, delay, {**row.event.headers, **headers}, connection=connection)
            elif delay is None:
                acked.append(row)
            else:
                returned.setdefault(delay, []).append(row)
        store.complete(acked, keep=self._settings.keep_published, connection=connection)
        for delay, rows in returned.items():
            store.release(rows, delay, failed=True, in_place=delay <= 0, connection=connection)

    def _extend(self, connection: Connection) -> set[int]:
        rows = self._leases.rows
        self._database.store.extend(rows, self._database.lease, connection=connection)
        return self._database.store.leased(rows, connection=connection)

    def _release_dead(self, dead: Sequence[_Dead], connection: Connection) -> None:
        store = self._database.store
        for owners, was_begun in dead:
            begun: list[Claimed] = []
            sent_ahead: list[Claimed] = []
            for row in self._held_by(owners, connection):
                (begun if was_begun(row.queue, row.event.id) else sent_ahead).append(row)
            store.release(begun, in_place=True, connection=connection)
            self._release_unbegun(sent_ahead, connection)

    def _release_unknown(self, connection: Connection) -> None:
        """Release what was claimed by a commit whose answer got lost."""
        known = {row.seq for row in self._leases.rows}
        held = self._held_by([self.owner], connection)
        self._release_unbegun([row for row in held if row.seq not in known], connection)

    def _held_by(self, owners: Sequence[str], connection: Connection) -> list[Claimed]:
        queues = [queue.name for queue in self._queues]
        lease = self._database.lease
        return self._database.store.held_by(owners, queues, lease, connection=connection)

    def _release_unbegun(self, rows: Sequence[Claimed], connection: Connection) -> None:
        # Counted as returned, so that is_deadly() doesn't count the claim as a loss.
        self._database.store.release(rows, failed=True, in_place=True, connection=connection)

    def _claim(self, done: Sequence[_Done], connection: Connection) -> list[Claimed]:
        store = self._database.store
        settled = self._settled(done)
        if self._suspected is not None:
            return self._claim_alone(len(self._leases) - settled.total(), connection)
        claimed: list[Claimed] = []
        if self._ordered:
            routing.take_turns(connection, sorted(self._ordered))
        for queue in self._queues:
            free = self._leases.free(queue.name) + settled[queue.name]
            if queue.name in self._paces:
                claimed += self._claim_paced(queue.name, done, connection)
            elif free > 0:
                taken = store.claim(
                    free,
                    queue=queue.name,
                    lease=self._database.lease,
                    one_a_key=queue.ordered,
                    floors=self._database.floors,
                    connection=connection,
                )
                claimed += taken
                if queue.ordered and len(taken) < free:
                    # What is due besides waits for others of its keys: looking at once, and again
                    # and again, would find nothing.
                    pause = _FIRST_POLL if taken else self._poll
                    self._held_up_until[queue.name] = time.monotonic() + pause
        return self._without_suspects(claimed, connection)

    def _without_suspects(self, claimed: list[Claimed], connection: Connection) -> list[Claimed]:
        suspects = [row for row in claimed if is_suspect(row) and not is_deadly(row)]
        if suspects:
            # Whatever is in hand when a worker dies counts a loss, and may soon be deadly itself.
            self._release_unbegun(suspects, connection)
            self._suspected, self._alone_at = suspects[0].queue, time.monotonic()
        released = {row.seq for row in suspects}
        return [row for row in claimed if row.seq not in released]

    def _sift(self, claimed: list[Claimed], connection: Connection) -> list[Claimed]:
        """Release suspects, and dead-letter what is deadly; return the others, and the latter."""
        self._dead_letter([row for row in claimed if is_deadly(row)], connection)
        return self._without_suspects(claimed, connection)

    def _claim_paced(
        self, queue: str, done: Sequence[_Done], connection: Connection
    ) -> list[Claimed]:
        """Claim tasks for about 50 ms, and the more urgent ones although others are claimed."""
        limit = min(self._leases.prefetch, self._paces[queue].limit)
        held = self._leases.ranks(queue, settled={settlement.tag for settlement in done})
        claimed = self._database.store.claim(
            limit,
            queue=queue,
            lease=self._database.lease,
            held=held,
            floors=self._database.floors,
            connection=connection,
        )
        if held.total() + len(claimed) >= limit:
            # What is due besides is less urgent, or will be due later.
            self._held_up_until[queue] = time.monotonic() + _LOOK_FOR_URGENT
        else:
            self._held_up_until.pop(queue, None)
        return claimed

    def _claim_alone(self, held: int, connection: Connection) -> list[Claimed]:
        """Claim a suspect if no other row is held, or has been held for too long."""
        now = time.monotonic()
        if self._suspected is None or (held and self._is_left_alone(now)):
            return []
        store = self._database.store
        is_ordered = self._suspected in self._ordered
        if is_ordered:
            routing.take_turns(connection, [self._suspected])
        claimed = store.claim(
            1,
            queue=self._suspected,
            lease=self._database.lease,
            one_a_key=is_ordered,
            connection=connection,
        )
        self._alone_at = now
        if not any(map(is_suspect, claimed)):
            self._suspected = None
        return claimed

    def _is_left_alone(self, now: float) -> bool:
        """Return whether nothing is claimed besides the rows that are held."""
        return self._suspected is not None and now < self._alone_at + _ALONE

    def _dead_letter(self, rows: Sequence[Claimed], connection: Connection) -> None:
        for row in rows:
            letter = letter_of_deadly(row)
            self._database.put_rows(rows_of(letter, (letter.target,)), connection)
        self._database.store.complete(rows, connection=connection)

    def _give_back(self) -> None:
        """Write the settlements that wait, and release the other rows."""
        done = list(self._done)
        try:
            if not len(self._leases):
                return
            queues = {row.queue for row in self._leases.rows}
            self._database.run(functools.partial(self._return_all, done), durable=False)
            self._database.published(queues)  # other workers may go on with them
        except BrokerError as error:
            logger.warning(
                "cannot release messages; they will be redelivered after %.0f s: %s",
                self._database.lease,
                error,
            )

    def _return_all(self, done: Sequence[_Done], connection: Connection) -> None:
        self._settle(done, connection)
        settled = {settlement.tag for settlement in done}
        others = [row for tag, row in self._leases.items() if tag not in settled]
        self._release_unbegun(others, connection)

    def _on_reopened(self, is_another: bool) -> None:
        self._to_declare = True
        self._leases.extend_soon()
        if is_another:
            lost = self._leases.drop_all()
            self._to_log.append((logging.ERROR, _REPLACED, (self._database.name, lost)))

    def _on_failure(self, error: OutboxError) -> None:
        if UsageError in (type(error), type(error.__cause__)) and not self._has_consumed:
            self._refused(str(error))
        if not self._failures:
            logger.error("cannot consume: %s; retrying", error)
        now = time.monotonic()
        until = now + min(_LONGEST_PAUSE, backoff(self._failures))
        self._failures += 1
        if now > self._worked_at + self._database.lease / 2:
            # By now leases may have ended. Those that hold a row extend its lease first.
            self._claim_at = until + _LONGEST_PAUSE + _TIME_TO_EXTEND
        while not self._stopping and (remaining := until - time.monotonic()) > 0:
            if self._cancelling:
                self._cancelled.set()
            self._wake.wait(min(remaining, 0.1))
            self._wake.clear()


def _not_started(_: Any) -> None:
    raise ConnectionLost("the subscription was not started")
