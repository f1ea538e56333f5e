"""Events stored through Django's connection, or held until its commit.

An event is one INSERT on the connection of its alias. So Django and the database decide what
becomes of it, as for every other row, and nothing has to run at the commit. A callback of
``on_commit`` only makes it faster: this process publishes the row without waiting for a relay.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import importlib.util
import logging
import os
import re
import threading
import time
import weakref
from typing import Any, NamedTuple

from django.conf import settings as django_settings
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections

from outbox import EventCollector, UsageError, configuration
from outbox.backlog.notifier import ids
from outbox.configuration import default_publisher
from outbox.django import project
from outbox.django.connecting import can_hand_over, engine_of, vendor_of
from outbox.django.environment import is_test_environment
from outbox.django.moments import NOW, in_column
from outbox.event import Event
from outbox.messages.headers import TASK
from outbox.messages.rows import UNROUTED, values_of
from outbox.observer import Observer, seam
from outbox.publisher import Publisher
from outbox.sinks import Bound, Sink
from outbox.telemetry import sources
from outbox.unit_of_work.origin import application_frame, warn_at
from outbox.url import BrokerURL

__all__ = ["followed", "pending_of", "sink_using"]

logger = logging.getLogger("outbox.django")

_GRACE = 1  # seconds, as in outbox.storage.schema, which needs SQLAlchemy

_COLUMNS = (
    "id",
    "aggregatetype",
    "aggregateid",
    "type",
    "payload",
    "exchange",
    "content_type",
    "headers",
    "key",
    "priority",
    "unroutable",
    "queue",
    "rank",
    "occurred_at",  # the last one: it is converted for the database
)
# Which have defaults in our own schema, but not in a test database made without migrations.
_CONSTANTS = {"deliveries": "0", "attempts": "0"}
_LACKS_TABLE = re.compile(
    r"no such table: outbox_events|(?<!of )relation \"outbox_events\" does not exist"
    r"|outbox_events' doesn't exist"
)
_AFTER_GRACE = {
    "postgresql": f"{NOW['postgresql']} + interval '{_GRACE} second'",
    "sqlite": f"{NOW['sqlite']} + {_GRACE}",
    "mysql": f"{NOW['mysql']} + INTERVAL {_GRACE} SECOND",
}


def sink_using(alias: str | Bound) -> Sink | None:
    """Return the sink of a database of the project, or of the one that ``OUTBOX`` names.

    It is None if the event is to be collected, with ``STORE = None``.

    Raises:
        UsageError: the alias is unknown; an event loop runs in this thread; the event would be
            stored outside of the transaction that is open, or outside of any where ``OUTBOX``
            forbids that.
    """
    outbox = project.current()
    if isinstance(alias, Bound):
        if configuration.runs_here is not None and configuration.runs_here():
            return None  # it is another framework's, in a process of both
        if outbox.store is None:
            return _sink_without_store()
        chosen, is_named = outbox.store, False
    else:
        if alias not in django_settings.DATABASES:
            known = ", ".join(map(repr, django_settings.DATABASES))
            raise UsageError(f"using={alias!r} is not in DATABASES ({known})")
        chosen, is_named = alias, True
    _check_no_loop()
    connection = connections[chosen]
    if not _in_transaction(connection):
        if not is_named:
            _check_others(chosen)
        _check_outside(outbox.outside_atomic, chosen)
    return functools.partial(_store, connection)


def pending_of(function: object) -> Pending | None:
    """Return what a callback in a connection's ``run_on_commit`` publishes, if it is of outbox."""
    pending = getattr(function, "pending", None)
    return pending if isinstance(pending, Pending) else None


class StoredRow(NamedTuple):
    """A row that was stored.

    Attributes:
        number: its number.
        at: the ``time.monotonic()`` before it was written.
        queue: its queue.
    """

    number: int
    at: float
    queue: str


class TransactionState:
    """Whether a transaction was committed, for those who look after it is over.

    Attributes:
        is_committed: whether it was committed.
    """

    __slots__ = ("is_committed",)

    def __init__(self) -> None:
        self.is_committed = False


class Pending:
    """What is published after the commit of a transaction, or of one of its savepoints.

    Django drops it together with the savepoint that is rolled back. While a test observes events,
    each has one for itself, and so the test learns whether it was rolled back.

    Attributes:
        publisher: the publisher; None if a relay publishes the rows.
        events: the events, in their order.
        rows: each event's row; empty if the events were not stored.
        state: what is known of their transaction once this object is gone.
    """

    advice = (
        "its transaction was not committed, and TestCase commits none: use TransactionTestCase "
        "(pytest-django: transactional_db), which does; or have the callbacks run as if it was "
        "committed, with captureOnCommitCallbacks(execute=True) (pytest-django: "
        "django_capture_on_commit_callbacks) around the code under test"
    )

    def __init__(
        self, connection: Any, publisher: Publisher | None, observer: Observer | None
    ) -> None:
        """Begin without events."""
        self._connection = connection
        self._observer = observer
        self.publisher = publisher
        self.events: list[Event] = []
        self.rows: list[StoredRow] = []
        self.state = TransactionState()

    def publish(self) -> None:
        """Publish what was committed; never raise, since others' callbacks may follow."""
        self.state.is_committed = True
        try:
            if not self.rows:
                if self.publisher is not None:
                    _publish(self.publisher, self.events)
                return
            if self._observer is not None:
                if self._finds_row() is False:
                    return
                self._observer.committed(self.events)
            if self.publisher is not None and not self._connection.in_atomic_block:
                # In one, the transaction is a test's, and was not committed.
                _hand_over(self._connection.alias, self.publisher, self.events, self.rows)
        except Exception:
            logger.exception("could not publish after the commit: %s", ids(self.events))

    def holds(self) -> bool:
        """Return whether its one event was not rolled back."""
        is_there = self._finds_row() if self.rows else None
        if is_there is not None:
            return is_there
        return self.waits()

    def waits(self) -> bool:
        """Return whether Django would call it at a commit that is yet to come."""
        return any(pending_of(hook[1]) is self for hook in list(self._connection.run_on_commit))

    def _finds_row(self) -> bool | None:
        """Return whether the row of its one event is in the table; None if that can't be asked.

        Django doesn't know what becomes of a savepoint made by hand, and forgets all callbacks if
        one of another app raises: only the table does.
        """
        connection = self._connection
        if (
            connection.connection is None
            or connection._thread_ident != threading.get_ident()
            or not (connection.in_atomic_block or connection.autocommit)  # it would begin one
        ):
            return None
        [(number, _, _)], [event] = self.rows, self.events
        try:
            # Without Django's cursor, whose queries an application's test may count.
            with contextlib.closing(connection.connection.cursor()) as cursor:
                cursor.execute(f"SELECT id FROM outbox_events WHERE seq = {number:d}")
                found = cursor.fetchone()
        except Exception:  # the transaction is broken
            return None
        # SQLite gives the number of a row that was rolled back to another.
        return found is not None and found[0] == event.id


def _store(connection: Any, event: Event, publisher: Publisher | None) -> bool:
    """Insert ``event`` through Django's ``connection``: one query, whatever happens later."""
    alias: str = connection.alias
    observer = seam.observer
    may_hand_over = (
        publisher is not None
        and _has_sqlalchemy()
        and (observer.hands_over if observer else not is_test_environment())
    )
    hands_over = (
        may_hand_over
        and publisher is not None
        and publisher.settings.after_commit != "nothing"
        and event.deliver_at is None
        and can_hand_over(alias)
    )
    queue = _queue_for(alias, event, publisher) if may_hand_over else ""
    in_grace = hands_over and _is_published_here(publisher, queue)
    at = time.monotonic()
    number = _insert(connection, event, queue, in_grace=in_grace)
    if observer is not None:
        observer.stored_in_transaction(event)
    elif not hands_over and (TASK not in event.headers or is_test_environment()):
        return False  # only handles of tasks have to know what becomes of it
    if connection.in_atomic_block:
        pending = _pending_at_commit(connection, publisher if hands_over else None, observer)
        pending.events.append(event)
        pending.rows.append(StoredRow(number, at, queue))
        if observer is not None:
            observer.attached(event, pending)
    elif connection.get_autocommit():
        if observer is not None:
            observer.committed([event])
        if hands_over and publisher is not None:
            _hand_over(alias, publisher, [event], [StoredRow(number, at, queue)])
    # else the process can't learn of the commit: a relay publishes it
    return False


def _queue_for(alias: str, event: Event, publisher: Publisher | None) -> str:
    """Return the queue of the row that is to be stored: ``""`` is the relay's."""
    if publisher is None or not _names_database(publisher.settings.url or ""):
        return ""
    try:
        engine = engine_of(alias)
    except UsageError:  # a database in memory
        return ""
    return publisher.queue_for(event, engine, {})


@functools.cache
def _names_database(url: str) -> bool:
    return bool(url) and BrokerURL.parse(url).is_database


def _is_published_here(publisher: Publisher | None, queue: str) -> bool:
    """Return whether relays and workers leave the row to this process for a moment."""
    return (
        publisher is not None
        and publisher.settings.after_commit == "publish"
        and queue in ("", UNROUTED)
    )


def _insert(connection: Any, event: Event, queue: str, *, in_grace: bool) -> int:
    vendor = vendor_of(connection.alias)
    values = values_of(event, queue=queue, rank=(event.priority or 0) if queue else 0)
    times = (
        [event.occurred_at] if event.deliver_at is None else [event.occurred_at, event.deliver_at]
    )
    parameters = [values[name] for name in _COLUMNS[:-1]]
    parameters += [in_column(time, vendor) for time in times]
    statement = _statement(vendor, in_grace, event.deliver_at is not None)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            number = cursor.fetchone()[0] if vendor == "postgresql" else cursor.lastrowid
    except DatabaseError as error:
        if connection.in_atomic_block:
            # As Model.save() does: the data must not be committed without the event, even if the
            # caller catches this, whatever the database makes of it.
            connection.needs_rollback = True
            connection.rollback_exc = error
        text = str(error)
        if _LACKS_TABLE.search(text):
            raise UsageError(
                f"the table outbox_events does not exist in the database {connection.alias!r}; "
                f"run `manage.py migrate outbox_events --database {connection.alias}`"
            ) from error
        raise
    return int(number)


@functools.cache
def _statement(vendor: str, in_grace: bool, is_scheduled: bool) -> str:
    quote = "`" if vendor == "mysql" else '"'
    columns = [*_COLUMNS, "stored_at", "available_at", *_CONSTANTS]
    names = ", ".join(f"{quote}{name}{quote}" for name in columns)
    due = "%s" if is_scheduled else (_AFTER_GRACE if in_grace else NOW)[vendor]
    values = ", ".join(["%s"] * len(_COLUMNS) + [NOW[vendor], due, *_CONSTANTS.values()])
    returning = " RETURNING seq" if vendor == "postgresql" else ""
    return f"INSERT INTO outbox_events ({names}) VALUES ({values}){returning}"


def _pending_at_commit(
    connection: Any, publisher: Publisher | None, observer: Observer | None
) -> Pending:
    """Return what is published at the commit of the innermost savepoint, for one more event.

    Its callback goes before those of others, one of which may raise: Django then drops the rest.
    """
    hooks = connection.run_on_commit
    # In a test each event has a callback, at the end: those registered in a part of it may be run
    # apart, and captureOnCommitCallbacks() counts from the beginning.
    is_test = observer is not None or is_test_environment()
    end = len(hooks) if is_test else _end_of_ours(hooks)
    if end and not is_test:
        savepoints, function = hooks[end - 1][:2]
        pending = pending_of(function)
        if (
            pending is not None
            and pending.publisher is publisher
            and savepoints == set(connection.savepoint_ids)
        ):
            return pending
    pending = Pending(connection, publisher, observer)

    # A function, since Django wants a name for its log of callbacks that raise.
    def publish_after_commit() -> None:
        pending.publish()

    publish_after_commit.pending = pending  # type: ignore[attr-defined]
    connection.on_commit(publish_after_commit, robust=True)
    hooks.insert(end, hooks.pop())
    return pending


def _end_of_ours(hooks: list[Any]) -> int:
    return bisect.bisect_left(hooks, True, key=lambda hook: pending_of(hook[1]) is None)


class OpenRow:
    """A row in a transaction of Django, or an event that is held until its commit.

    Django drops what is to be published together with the row. It isn't known what becomes of a
    savepoint that is made by hand. Connections are not kept alive.
    """

    __slots__ = ("_pending", "_state")

    def __init__(self, pending: Pending) -> None:
        """Follow an event of ``pending``."""
        self._pending = weakref.ref(pending)
        self._state = pending.state

    @property
    def is_open(self) -> bool:
        """Whether the transaction is open, so that the row may be committed or dropped."""
        return not self._state.is_committed and self._waits()

    @property
    def is_dropped(self) -> bool:
        """Whether the row was rolled back; False if that isn't known for certain."""
        return not self._waits() and not self._state.is_committed

    def _waits(self) -> bool:
        pending = self._pending()
        return pending is not None and pending.waits()


class RowOfTest:
    """A row that is stored in a ``TestCase``, which commits nothing, and without a callback.

    Attributes:
        is_dropped: whether the row was rolled back, which isn't known.
    """

    __slots__ = ("_block", "_connection")

    is_dropped = False

    def __init__(self, connection: Any, block: Any) -> None:
        """Follow a row that is stored in ``block``, the ``TestCase``'s own."""
        self._connection = weakref.ref(connection)
        self._block = block

    @property
    def is_open(self) -> bool:
        """Whether the test goes on."""
        connection = self._connection()
        return connection is not None and any(
            block is self._block for block in connection.atomic_blocks
        )


def followed(event: Event, using: str | Bound) -> OpenRow | RowOfTest | None:
    """Return what becomes of the event that was stored, or held, last; None outside of a block."""
    alias = project.current().store if isinstance(using, Bound) else using
    for connection in _initialized() if alias is None else [connections[alias]]:
        hooks = connection.run_on_commit
        for end in {len(hooks), _end_of_ours(hooks)} if hooks else ():
            pending = pending_of(hooks[end - 1][1]) if end else None
            if pending is not None and pending.events[-1] is event:
                return OpenRow(pending)
        for block in reversed(connection.atomic_blocks):
            if getattr(block, "_from_testcase", False):  # its callbacks are counted: there is none
                return RowOfTest(connection, block)
    return None


def _hand_over(
    alias: str, publisher: Publisher, events: list[Event], rows: list[StoredRow]
) -> None:
    """Have the process's background thread publish committed rows; never raise."""
    sources.count("outbox_events_collected_total", (), len(events))
    sources.count("outbox_events_total", ("stored",), len(events))
    try:
        from outbox.sql.handover import Place, Row, handover_for

        engine = engine_of(alias)
        handover = handover_for(engine, publisher)
        # A savepoint that is rolled back by hand takes its rows with it, and leaves this callback.
        certain = not connections[alias].savepoint_state
        if handover is None:
            return
        submitted: dict[str, list[Row]] = {}
        for event, (number, at, queue) in zip(events, rows, strict=True):
            submitted.setdefault(queue, []).append(Row(number, event.id, at, certain))
        for queue, numbers in submitted.items():
            if queue in ("", UNROUTED):
                handover.submit(Place(engine, queue=queue), numbers)
            else:
                handover.announce((queue,))
    except Exception:
        logger.exception("leaving stored events to the relay: %s", ids(events))


def _sink_without_store() -> Sink | None:
    """Return what holds an event until the commit, or publishes it at once outside of one."""
    open_here = [each for each in _initialized() if each.in_atomic_block]
    aliases = [each.alias for each in open_here]
    if open_here:
        if len(open_here) > 1 and DEFAULT_DB_ALIAS not in aliases:
            raise UsageError(
                f"transactions of {' and '.join(map(repr, aliases))} are open, and with "
                "OUTBOX['STORE'] = None nothing says which one the event belongs to: set STORE, "
                "or enqueue it with using=alias, which stores it there"
            )
        chosen = [each for each in open_here if each.alias == DEFAULT_DB_ALIAS] or open_here
        return functools.partial(_hold, chosen[0])
    for each in _initialized():
        if _in_transaction(each):
            raise UsageError(
                f"the database {each.alias!r} is not in autocommit mode, so Django calls nothing "
                "at its commit, and OUTBOX['STORE'] = None can't hold the event until then; use "
                "transaction.atomic()"
            )
    return _publish_soon if EventCollector.current().is_lazy else None


def _hold(connection: Any, event: Event, publisher: Publisher | None) -> bool:
    publisher = publisher or default_publisher()
    observer = seam.observer
    pending = _pending_at_commit(connection, publisher, observer)
    pending.events.append(event)
    if observer is not None:
        observer.enqueued(event)
        observer.attached(event, pending)
    return False


def _publish_soon(event: Event, publisher: Publisher | None) -> bool:
    if seam.observer is not None:
        seam.observer.enqueued(event)
    _publish(publisher or default_publisher(), [event])
    return False


def _publish(publisher: Publisher, events: list[Event]) -> None:
    """Publish ``events`` as one chunk, and wait for the confirms where waiting is possible."""
    try:
        publisher.check_may_wait()
    except UsageError:
        publisher.submit(events)
    else:
        publisher.publish(events)


def _initialized() -> list[Any]:
    return list(connections.all(initialized_only=True))


def _in_transaction(connection: Any) -> bool:
    """Return whether the application has a transaction open on ``connection``.

    The one that Django's ``TestCase`` puts around each test is not the application's.
    """
    if connection.in_atomic_block:
        return any(
            not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks
        )
    if connection.connection is None:  # not connected: its attribute says nothing yet
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.autocommit


def _check_others(alias: str) -> None:
    for other in _initialized():
        if other.alias != alias and _in_transaction(other):
            raise UsageError(
                f"a transaction of the database {other.alias!r} is open, but the event would be "
                f"stored in {alias!r}, at once: a rollback would not undo it. Pass "
                f"using={other.alias!r} to store it in that transaction, using={alias!r} to store "
                "it at once, or using=None to publish it at once"
            )


def _check_outside(what: project.OutsideAtomic, alias: str) -> None:
    if what == "store":
        return
    text = (
        f"an event is stored outside of transaction.atomic(using={alias!r}): it commits at once, "
        "apart from the data it belongs to"
    )
    if what == "error":
        raise UsageError(text)
    frame = application_frame()
    warn_at(text, frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def _check_no_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
        raise UsageError(
            "Django's connections can't be used on an event loop; use "
            "`await outbox.django.aenqueue_event(...)`"
        )


@functools.cache
def _has_sqlalchemy() -> bool:
    found = importlib.util.find_spec("sqlalchemy") is not None
    if not found:
        logger.warning(
            "SQLAlchemy isn't installed: this process stores events, and leaves publishing them to "
            "a relay; pip install 'outbox-events[django]'"
        )
    return found
