"""The collector of a request, shared by the WSGI and the ASGI middleware."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from outbox import EventCollector, Publisher, UsageError
from outbox.backlog.notifier import ids
from outbox.observer import seam
from outbox.unit_of_work.unit_of_work import Buffer, UnitOfWork

__all__ = ["IsSuccess", "RequestCollector", "below_400"]

logger = logging.getLogger("outbox.middleware")

IsSuccess: TypeAlias = Callable[[int], bool]
"""A function that decides by the final status, 100 to 599, whether to publish the events."""


def below_400(status: int) -> bool:
    """Return whether ``status`` is neither a client nor a server error."""
    return status < 400


class RequestCollector(EventCollector):
    """The collector of one request, connection or lifespan.

    Its methods act on the whole unit of work, whatever block is open where they are called: a block
    that the application never ended must not hold back the rest of the request.
    """

    __slots__ = ()

    def __init__(self, publisher: Publisher | None, publishes_itself: bool) -> None:
        # EventCollector.__init__(), inlined, since every request creates a collector.
        self._unit = UnitOfWork(publisher, seam.observer, publishes_itself)
        self._buffer = Buffer(self._unit)

    def publish_quietly(self) -> None:
        """Publish, and log any failure: it never fails the response.

        The events have then reached the publisher, or stay in the collector. If an event loop is
        running in this thread, they are submitted without waiting.
        """
        if self._buffer.events:
            try:
                publisher = self.publisher
                chunk = self._hand_over(self._buffer, publisher)
                with contextlib.suppress(UsageError):
                    publisher.check_may_wait()
                    publisher.wait_for(chunk)
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    async def publish_quietly_async(self) -> None:
        """Publish as :meth:`publish_quietly` does, on an event loop."""
        if self._buffer.events:
            try:
                publisher = self.publisher
                await publisher.wait_for_async(self._hand_over(self._buffer, publisher))
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    def submit_quietly(self) -> None:
        """Hand the events to the publisher without waiting, and log any failure."""
        if self._buffer.events:
            try:
                self._hand_over(self._buffer, self.publisher)
            except Exception:
                logger.exception("could not publish the events of a request: %s", self._held())

    def discard(self, why: Any) -> None:
        """Drop the events, with a warning that names their ids."""
        if self._buffer.events:
            dropped = self._drop(self._buffer.take())
            logger.warning("%d event(s) dropped because %s: %s", len(dropped), why, ids(dropped))

    def close(self) -> None:
        """End the unit of work: a late ``enqueue_event`` raises ``CollectorClosed``."""
        lost = self._buffer.close()
        if lost:
            self._drop(lost)
            logger.error("%d event(s) lost at the end of a request: %s", len(lost), ids(lost))

    def _held(self) -> str:
        return ids(self._buffer.events)
