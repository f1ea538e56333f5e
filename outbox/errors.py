"""Every exception that outbox raises.

    OutboxError
    ├── UsageError                the caller's mistake: never retried
    │   ├── InvalidEvent          (also a ValueError) the event cannot be carried
    │   ├── CollectorFull         the collector or the kept events have reached their limit
    │   ├── CollectorClosed       the unit of work has ended
    │   ├── NotConfigured         no broker URL is known
    │   ├── MissingExtra          an optional dependency is not installed
    │   ├── NoResults             nothing keeps the results of tasks
    │   └── UnpublishedEvents     a consumer enqueued events and did not publish them
    ├── TaskError                 a task has nothing to return
    │   ├── TaskFailed            it has failed
    │   ├── TaskCancelled         it was cancelled
    │   ├── ResultLost            it has succeeded, but its value could not be kept
    │   └── ResultTimeout         (also a TimeoutError) no result within the caller's timeout
    └── BrokerError               a failure of the broker or the network: may pass
        ├── ConnectFailed         no connection could be opened
        ├── ConnectionLost        the connection was lost before all events were confirmed
        ├── Blocked               the broker has stopped reading from publishers
        ├── Nacked                the broker refused an event for now (a full queue)
        ├── PublishTimeout        no confirm within the caller's timeout
        └── PublishFailed         raised from a report that is not ok; carries ``.report``

The control flow of consumers (``Reject``, ``Requeue``) is outside this tree, in
``outbox.consumers``, so that ``except OutboxError`` never swallows it.

Driver exceptions never leave outbox: they are the ``__cause__`` of one of these. All of these
survive pickling.
"""

from __future__ import annotations

__all__ = [
    "Blocked",
    "BrokerError",
    "CollectorClosed",
    "CollectorFull",
    "ConnectFailed",
    "ConnectionLost",
    "InvalidEvent",
    "MissingExtra",
    "Nacked",
    "NoResults",
    "NotConfigured",
    "OutboxError",
    "PublishTimeout",
    "ResultLost",
    "ResultTimeout",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "UnpublishedEvents",
    "UsageError",
]


class OutboxError(Exception):
    """The base class of all outbox errors."""


class UsageError(OutboxError):
    """The caller's mistake: the same call would fail again."""


class InvalidEvent(UsageError, ValueError):
    """The event cannot be carried: its payload, target, headers or an option is invalid.

    Raised by ``enqueue_event()``, before anything commits; the collector is unchanged.
    """


class CollectorFull(UsageError):
    """A limit was reached: the collector's, or that of the publisher's kept events.

    Raised by ``enqueue_event()``, so that the unit of work fails before it commits.
    """


class CollectorClosed(UsageError):
    """The collector's unit of work has ended; the event was not collected.

    At the end of a savepoint that outlived its unit: its events were dropped.
    """


class NotConfigured(UsageError):
    """No broker URL is known.

    Call ``outbox.configure(url)`` or set ``OUTBOX_URL``, in one of the forms
    ``amqp://user:password@host:5672/vhost``, ``postgresql://user:password@host/database``,
    ``mariadb://user:password@host/database``, ``sqlite:///outbox.db`` or ``memory://``. A test
    doesn't need a URL if it uses the fixture ``collected_events``.
    """

    def __init__(self, message: str = "") -> None:
        # The docstring is the default message.
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))


class MissingExtra(UsageError):
    """An optional dependency is not installed; the message names the extra."""


class NoResults(UsageError):
    """Nothing that is configured keeps the results of tasks, or what was cancelled."""


class UnpublishedEvents(UsageError):
    """A consumer succeeded, but did not publish its events.

    Attributes:
        event_ids: the ids of those events, in the order they were enqueued.
    """

    def __init__(self, event_ids: tuple[str, ...] = ()) -> None:
        super().__init__(event_ids)
        self.event_ids = event_ids

    def __str__(self) -> str:
        return (
            f"{len(self.event_ids)} event(s) were enqueued and never published: "
            f"{', '.join(self.event_ids)}; call publish() at the end of process(), "
            "or set auto_publish = True on the consumer"
        )


class TaskError(OutboxError):
    """A task has nothing to return; raised by ``TaskHandle.result()``."""


class TaskFailed(TaskError):
    """A task has failed, and will not be tried again.

    Attributes:
        error_type: the class of what it raised, as text: whatever wrote the result is not imported.
        error: the text of that, or the reason why it was given up.
        traceback: the traceback, without the values of variables; empty if there is none.
    """

    def __init__(self, error_type: str = "", error: str = "", traceback: str = "") -> None:
        super().__init__(error_type, error, traceback)
        self.error_type = error_type
        self.error = error
        self.traceback = traceback

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.error_type, self.error)))


class TaskCancelled(TaskError):
    """A task was cancelled before it ran."""


class ResultLost(TaskError):
    """A task has succeeded, but what it returned could not be kept; the text says why."""


class ResultTimeout(TimeoutError, TaskError):
    """A task has no result within the caller's timeout; it may run later all the same."""


class BrokerError(OutboxError):
    """The broker or the network failed; a later attempt may succeed."""


class ConnectFailed(BrokerError):
    """No connection to the broker could be opened."""


class ConnectionLost(BrokerError):
    """The connection was lost before the broker had confirmed."""


class Blocked(BrokerError):
    """The broker has stopped reading from publishers: a memory or disk alarm, a locked file."""


class Nacked(BrokerError):
    """The broker refused an event for now: a queue is full, or a permission is missing."""


class PublishTimeout(BrokerError):
    """The broker did not confirm within the caller's timeout."""
