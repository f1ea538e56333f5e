"""The collector of a request, shared by the WSGI and the ASGI middleware."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from outbox import Event, EventCollector, OutboxError, Publisher, UsageError
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

    def refuse(self) -> None:
        """Refuse further events, before the present ones are published or dropped.

        A late ``enqueue_event`` raises ``CollectorClosed``: in a task or thread that outlives the
        request, while this one is publishing.
        """
        self._buffer.closed = True

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
            except BaseException as error:
                self._publishing_failed(error)
                if not isinstance(error, Exception):
                    raise

    async def publish_quietly_async(self) -> None:
        """Publish as :meth:`publish_quietly` does, on an event loop."""
        if self._buffer.events:
            try:
                publisher = self.publisher
                await publisher.wait_for_async(self._hand_over(self._buffer, publisher))
            except BaseException as error:
                self._publishing_failed(error)
                if not isinstance(error, Exception):
                    raise

    def accepts(self, is_success: IsSuccess, status: object) -> bool:
        """Return whether ``status`` is a final status, and a success; never raise."""
        if not isinstance(status, int) or not 100 <= status <= 599:
            return False
        try:
            return bool(is_success(status))
        except Exception:
            logger.exception("is_success(%d) raised; the request counts as failed", status)
            return False

    def discard(self, why: Any) -> None:
        """Drop the events, with a warning that names their ids."""
        if self._buffer.events:
            taken: list[Event] = []
            try:
                self._buffer.take(taken)
                self._drop(taken)
            finally:  # a signal handler may raise meanwhile
                if taken:
                    logger.warning(
                        "%d event(s) dropped because %s: %s", len(taken), why, ids(taken)
                    )

    def close(self) -> None:
        """End the unit of work; log the events that could not be published."""
        lost = self._buffer.close()
        if lost:
            self._drop(lost)
            logger.error("%d event(s) lost at the end of a request: %s", len(lost), ids(lost))

    def _publishing_failed(self, error: BaseException) -> None:
        """Log ``error``; submit what it has left here, unless the publisher has refused it.

        The exception of a signal handler doesn't undo the request.
        """
        left = list(self._buffer.events)
        if left and not isinstance(error, OutboxError):
            with contextlib.suppress(Exception):  # what remains is logged as lost
                self._hand_over(self._buffer, self.publisher)
        if self._buffer.events:
            logger.error("could not publish the events of a request: %s", ids(left), exc_info=error)
        elif isinstance(error, Exception):
            logger.warning("publishing the events of a request was interrupted", exc_info=error)
