"""What the WSGI and the ASGI middleware have in common: a request's collector and its end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from outbox import EventCollector, Publisher, UsageError
from outbox.backlog.notifier import ids
from outbox.observer import installed_observer
from outbox.unit_of_work.buffer import Buffer
from outbox.unit_of_work.unit_of_work import UnitOfWork

__all__ = ["IsSuccess", "RequestCollector", "below_400"]

logger = logging.getLogger("outbox.middleware")

IsSuccess: TypeAlias = Callable[[int], bool]
"""Says of a final status, 100 to 599, whether the request's events are to be published."""


def below_400(status: int) -> bool:
    """Return whether ``status`` is neither a client's nor a server's error."""
    return status < 400


class RequestCollector(EventCollector):
    """The collector of one request, connection or lifespan.

    What its methods do, they do to the whole unit of work, whatever block is open where they are
    called: one that the application never ended must not keep the rest of the request back.
    """

    __slots__ = ()

    def __init__(self, publisher: Publisher | None, publishes_itself: bool) -> None:
        # Every request makes one: what EventCollector's own __init__ does, without calling it.
        self._unit = UnitOfWork(publisher, installed_observer(), publishes_itself)
        self._buffer = Buffer(self._unit)

    @property
    def buffer(self) -> Buffer:
        """The buffer of the whole request."""
        return self._buffer

    def publish_quietly(self) -> None:
        """Publish; whatever fails is logged, and never fails the response.

        The events have reached the publisher, or stay in the collector. Where an event loop runs
        in this thread, they are handed over without waiting.
        """
        if self.buffer.events:
            try:
                publisher = self.publisher
                chunk = self._hand_over(self.buffer, publisher)
                with contextlib.suppress(UsageError):
                    publisher.check_may_wait()
                    publisher.wait_for(chunk)
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    async def publish_quietly_async(self) -> None:
        """Do what :meth:`publish_quietly` does, on an event loop."""
        if self.buffer.events:
            try:
                publisher = self.publisher
                await publisher.wait_for_async(self._hand_over(self.buffer, publisher))
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    def submit_quietly(self) -> None:
        """Hand the events to the publisher without waiting; whatever fails is logged."""
        if self.buffer.events:
            try:
                self._hand_over(self.buffer, self.publisher)
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    def discard(self, why: Any) -> None:
        """Drop what was enqueued, with a warning that names the ids."""
        if self.buffer.events:
            dropped = self._drop(self.buffer.take())
            logger.warning("%d event(s) dropped, since %s: %s", len(dropped), why, ids(dropped))

    def close(self) -> None:
        """End the unit of work: a late ``enqueue_event`` raises ``CollectorClosed``."""
        left = self._drop(self.buffer.close())
        if left:
            logger.error("%d event(s) lost at the end of a request: %s", len(left), ids(left))

    def _held(self) -> str:
        return ids(self.buffer.events)
