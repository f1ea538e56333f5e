"""ASGI 3: each HTTP request is a unit of work.

The events are published after the application has *returned*, not when the response has been sent:
frameworks commit after the last byte (FastAPI's dependencies with ``yield``), and background tasks
belong to the request. They are dropped, with a warning that names them, if

- an exception leaves the application, whatever it is;
- the client disconnects while the response is sent, and the application gets to know: frameworks
  then cancel the code that produces the body, whose transaction rolls back, and return as if
  nothing had happened. An application that doesn't look is not affected;
- ``is_success`` does not accept the final status.

Publishing happens on the publisher's thread and starts before the first ``await``: a cancellation
ends the wait, never the publishing.

A WebSocket connection isn't a unit of work, since it may last for days: use
``async with auto_publishing()`` for each message. Events enqueued outside such a block warn, and
wait until the application has returned; an exception drops them, even that of a client's
disconnect. Lifespan events are published when startup and shutdown are complete; at shutdown the
publisher is drained, even if the application doesn't support lifespan.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Send
from starlette.types import Scope as ASGIScope

from outbox import Publisher
from outbox.configuration import configured_publisher
from outbox.middleware.request_collector import IsSuccess, RequestCollector, below_400
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["OutboxMiddleware"]

logger = logging.getLogger("outbox.middleware")

_MARKER = "outbox.collector"
_CAUTION = (
    "an event was enqueued that waits until {}; to publish it at once, "
    "use async with auto_publishing(independent=True)"
)
_KEYS_OF_REQUESTS = frozenset(
    ("client", "headers", "method", "path", "query_string", "raw_path", "root_path", "server")
)


class OutboxMiddleware:
    """ASGI middleware that publishes each request's events if the request succeeds.

    Pure ASGI; usable as ``OutboxMiddleware(app)`` or with ``app.add_middleware(OutboxMiddleware)``.
    If an application is wrapped twice, the inner middleware does nothing.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        publisher: Publisher | None = None,
        is_success: IsSuccess = below_400,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: the application: of Starlette's types, Litestar's, or another framework's.
            publisher: the publisher of the events; the default is the process's.
            is_success: decides by the response's status code whether to publish the events.
        """
        self.app = app
        self._publisher = publisher
        self._is_success = is_success

    async def __call__(self, asgi_scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket connection or lifespan; pass on any other scope."""
        outer = asgi_scope.get(_MARKER)
        if outer is not None and not outer.closed:  # closed if an ended request is tried again
            await self.app(asgi_scope, receive, send)
            return
        kind = asgi_scope["type"]
        if kind == "http":
            serve = self._request
        elif kind == "websocket":
            serve = self._websocket
        elif kind == "lifespan":
            serve = self._lifespan
        else:  # another protocol, which knows best what its units of work are
            await self.app(asgi_scope, receive, send)
            return
        collector = RequestCollector(self._publisher, kind == "http")
        asgi_scope[_MARKER] = collector
        token = Scope.enter(collector, collector._buffer)
        try:
            await serve(collector, asgi_scope, receive, send)
        finally:
            collector.close()
            Scope.leave(token)

    async def _request(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        status: object = None
        is_complete = is_begun = is_interrupted = False

        def watch(message: Message):  # type: ignore[no-untyped-def]  # awaitable, not async: faster
            nonlocal status, is_begun, is_complete
            kind = message["type"]
            if kind == "http.response.body":
                is_begun = True
                is_complete = not message.get("more_body", False)
            elif kind == "http.response.start":
                status = message["status"]
                if _is_event_stream(message):
                    collector._unit.caution = _CAUTION.format("this stream of events has ended")
            elif kind == "http.response.zerocopysend":
                is_begun = True
                is_complete = not message.get("more_body", False)
            elif kind == "http.response.pathsend":
                is_complete = True
            return send(message)

        async def watch_receive() -> Message:
            nonlocal is_interrupted
            message = await receive()
            if message["type"] == "http.disconnect" and status is not None and not is_complete:
                is_interrupted = True
            return message

        try:
            await self.app(asgi_scope, watch_receive, watch)
        except BaseException as error:
            collector.refuse()
            collector.discard(f"the request failed with {type(error).__qualname__}")
            raise
        collector.refuse()
        if collector._buffer.events:
            if is_interrupted or (is_begun and not is_complete):
                collector.discard("the response was interrupted")
            elif collector.accepts(self._is_success, status):
                await collector.publish_quietly_async()
            else:
                known = "not known" if status is None else repr(status)
                collector.discard(f"the response's status is {known}")

    async def _websocket(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        collector._unit.caution = _CAUTION.format("this connection has ended")
        try:
            await self.app(asgi_scope, receive, send)
        except BaseException as error:
            # A disconnect, too, has gone through the code that enqueued them, and its transaction.
            collector.refuse()
            collector.discard(f"the connection ended with {type(error).__qualname__}")
            raise
        collector.refuse()
        await collector.publish_quietly_async()

    async def _lifespan(
        self, collector: RequestCollector, asgi_scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        unit = collector._unit
        received = False

        async def watch_receive() -> Message:
            nonlocal received
            received = True
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                unit.caution = None  # published soon: when the shutdown is complete
            return message

        async def publishing_send(message: Message) -> None:
            kind = message["type"]
            if kind == "lifespan.startup.complete":
                await collector.publish_quietly_async()
                unit.caution = _CAUTION.format("the server shuts down")
            elif kind == "lifespan.startup.failed":
                collector.discard("the startup failed")
            elif kind == "lifespan.shutdown.complete":
                collector.refuse()
                await collector.publish_quietly_async()
                await self._drain()
            elif kind == "lifespan.shutdown.failed":
                collector.refuse()
                collector.discard("the shutdown failed")
                await self._drain()
            await send(message)

        try:
            await self.app(asgi_scope, watch_receive, publishing_send)
        except BaseException as error:
            collector.refuse()
            collector.discard(f"the lifespan failed with {type(error).__qualname__}")
            if received or not _refuses_lifespan(error):
                raise
            logger.info("the application does not support lifespan (%r)", error)
        if not received:
            # Servers that die by a signal don't run exit handlers: this is the only chance to
            # drain, so it must not depend on the application's support for lifespan.
            await receive()
            await publishing_send({"type": "lifespan.startup.complete"})
            await receive()
            await publishing_send({"type": "lifespan.shutdown.complete"})
        collector.refuse()
        await collector.publish_quietly_async()

    async def _drain(self) -> None:
        publisher = self._publisher or configured_publisher()
        if publisher is not None:
            await publisher.drain_async()


def _is_event_stream(start: Message) -> bool:
    """Return whether a response is one of server-sent events, which may last for days."""
    for name, value in start.get("headers", ()):
        if name == b"content-type":
            is_event_stream: bool = value.startswith(b"text/event-stream")
            return is_event_stream
    return False


def _refuses_lifespan(error: BaseException) -> bool:
    """Return whether ``error`` says that the application doesn't know this kind of scope.

    ASGI has no answer for that: applications assert, look for a key that only requests have, or
    name what they don't support. Any other exception is an error of the application's startup,
    which the server must see.
    """
    if isinstance(error, KeyError):
        return bool(error.args) and error.args[0] in _KEYS_OF_REQUESTS
    return isinstance(error, (AssertionError, NotImplementedError)) or (
        isinstance(error, Exception) and "lifespan" in str(error)
    )
