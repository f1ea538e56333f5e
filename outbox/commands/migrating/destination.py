"""The transport that messages are moved to."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from outbox.errors import BrokerError, UsageError
from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import QueueSpec
from outbox.publisher import Publisher
from outbox.report import Withdrawn
from outbox.settings import Settings
from outbox.transports.database import routing
from outbox.transports.database.kinds import database_at
from outbox.transports.rabbitmq.delay_ladder import LONGEST_DELAY
from outbox.transports.rabbitmq.migrating.created_queues import create
from outbox.url import BrokerURL

__all__ = ["Destination"]

_CONFIRMS = 30.0  # seconds to wait for those of one chunk


class Destination:
    """Creates queues, and publishes to them with confirms. For one thread.

    Attributes:
        error: why the last events were not confirmed, if the transport can't be reached, else None.
    """

    def __init__(self, url: str, settings: Mapping[str, Any]) -> None:
        """Connect to nothing yet."""
        self._url = BrokerURL.parse(url)
        # Nothing is kept: what is not confirmed stays where it was.
        self._settings = Settings.load(url, {**settings, "spool": "", "declare": "create"})
        self._publisher = Publisher(url, **{**settings, "spool": "", "declare": "create"})
        self.error: BrokerError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._publisher.close()

    def create(self, specs: Sequence[QueueSpec]) -> None:
        """Create the queues and bindings that are missing, and the queue of parked events.

        A queue that exists gets the bindings it lacks, and stays as it is otherwise.

        Raises:
            UsageError: something is refused, or a database has no tables.
            BrokerError: the transport can't be reached.
        """
        if self._url.scheme.startswith("amqp"):
            create(specs, self._url, self._settings)
            return
        bindings = [each for spec in specs for each in routing.of_consumer(spec)]
        database = database_at(self._url)
        try:
            database.open()
            database.run(
                lambda connection: routing.add(
                    connection, [*bindings, routing.of_queue(PARKING_QUEUE)]
                )
            )
        except BrokerError as error:
            if isinstance(error.__cause__, UsageError):
                raise error.__cause__ from None
            raise
        finally:
            database.end()

    def publish(self, events: Sequence[Event]) -> list[str | None]:
        """Publish events as one chunk; return for each why it isn't there, None if it is."""
        refused = {id(event): why for event, why in self._too_late(events)}
        report = self._publisher.publish(
            [event for event in events if id(event) not in refused], keep=False, timeout=_CONFIRMS
        )
        refused |= {id(each.event): each.reason for each in report.rejected}
        if any(isinstance(each, Withdrawn) for each in report.rejected):
            self.error = report.error or BrokerError(f"{self._url} has not confirmed the events")
        return [refused.get(id(event)) for event in events]

    def _too_late(self, events: Sequence[Event]) -> Iterator[tuple[Event, str]]:
        if self._url.scheme.startswith("amqp"):
            latest = datetime.datetime.now(datetime.UTC) + LONGEST_DELAY
            for event in events:
                if event.deliver_at is not None and event.deliver_at > latest:
                    yield event, f"RabbitMQ delays events until {latest.date()} at the latest"
