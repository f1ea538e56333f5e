"""ASGI 3: each HTTP request is a unit of work.

The events are published after the application has *returned*, not when the response has been sent:
frameworks commit after the last byte (FastAPI's dependencies with ``yield``), and background tasks
belong to the request. An exception, or a final status that ``is_success`` does not accept, drops
them. A client that disconnects changes nothing, unless the server then cancels the application.

Publishing happens on the publisher's thread and starts before the first ``await``: a cancellation
ends the wait, never the publishing.

A WebSocket connection isn't a unit of work, since it may last for days: use
``async with auto_publishing()`` for each message. Events enqueued outside such a block are
published when the connection ends. Lifespan events work likewise; at shutdown the publisher is
drained, even if the application doesn't support lifespan.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope
from starlette.websockets import WebSocketDisconnect

from outbox import Publisher
from outbox.configuration import configured_publisher
from outbox.middleware.request_collector import IsSuccess, RequestCollector, below_400
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["OutboxMiddleware"]

logger = logging.getLogger("outbox.middleware")

_MARKER = "outbox.collector"


class OutboxMiddleware:
    """ASGI middleware that publishes each request's events if the request succeeds.

    Pure ASGI; usable as ``OutboxMiddleware(app)`` or with ``app.add_middleware(OutboxMiddleware)``.
    If an application is wrapped twice, the inner middleware does nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        publisher: Publisher | None = None,
        is_success: IsSuccess = below_400,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: the application.
            publisher: the publisher of the events; the default is the process's.
            is_success: decides by the response's status code whether to publish the events.
        """
        self.app = app
        self._publisher = publisher
        self._is_success = is_success

    async def __call__(self, asgi_scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket connection or lifespan."""
        outer = asgi_scope.get(_MARKER)
        if outer is not None and not outer.closed:  # closed if an ended request is tried again
            await self.app(asgi_scope, receive, send)
            return
        kind = asgi_scope["type"]
        collector = RequestCollector(self._publisher, kind == "http")
        asgi_scope[_MARKER] = collector
        token = Scope.enter(collector, collector._buffer)
        try:
            if kind == "http":
                await self._request(collector, asgi_scope, receive, send)
            elif kind == "websocket":
                await self._websocket(collector, asgi_scope, receive, send)
            else:
                await self._lifespan(collector, asgi_scope, receive, send)
        finally:
            collector.close()
            Scope.leave(token)

    async def _request(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        status = 0

        def watch(message: Message):  # type: ignore[no-untyped-def]  # awaitable, not async: faster
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self.app(asgi_scope, receive, watch)
        except BaseException as error:
            collector.discard(f"the request failed with {type(error).__qualname__}")
            raise
        if collector._buffer.events:
            if status and self._is_success(status):
                await collector.publish_quietly_async()
            else:
                collector.discard(f"the response's status is {status or 'not known'}")

    async def _websocket(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        send_errors: list[OSError] = []

        async def watch(message: Message) -> None:
            try:
                await send(message)
            except OSError as error:  # the client has disconnected (ASGI 2.4 and later)
                send_errors.append(error)
                raise

        try:
            await self.app(asgi_scope, receive, watch)
        except Exception as error:
            if _is_disconnect(error, send_errors):
                await collector.publish_quietly_async()
            else:
                collector.discard(f"the connection failed with {type(error).__qualname__}")
            raise
        except BaseException:
            # The server is shutting down, but what earlier messages did is done: publish.
            collector.submit_quietly()
            raise
        await collector.publish_quietly_async()

    async def _lifespan(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        received = False

        async def watched_receive() -> Message:
            nonlocal received
            received = True
            return await receive()

        async def publishing_send(message: Message) -> None:
            if message["type"] in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await collector.publish_quietly_async()
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                publisher = self._publisher or configured_publisher()
                if publisher is not None:
                    await publisher.drain_async()
            await send(message)

        try:
            await self.app(asgi_scope, watched_receive, publishing_send)
        except BaseException as error:
            collector.discard(f"the lifespan failed with {type(error).__qualname__}")
            if received or not isinstance(error, Exception):
                raise
            logger.info("the application does not support lifespan (%r)", error)
        if not received:
            # Servers that die by a signal don't run exit handlers: this is the only chance to
            # drain, so it must not depend on the application's support for lifespan.
            await receive()
            await publishing_send({"type": "lifespan.startup.complete"})
            await receive()
            await publishing_send({"type": "lifespan.shutdown.complete"})


def _is_disconnect(error: Exception, send_errors: Sequence[OSError]) -> bool:
    """Return whether the client's disconnect alone ended the connection.

    Args:
        error: the exception raised by the application.
        send_errors: the exceptions raised by the server's ``send``.
    """
    if isinstance(error, ExceptionGroup):  # the handler ran in a task group
        return all(_is_disconnect(nested, send_errors) for nested in error.exceptions)
    return isinstance(error, WebSocketDisconnect) or any(error is sent for sent in send_errors)
