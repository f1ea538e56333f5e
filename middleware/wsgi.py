"""WSGI (PEP 3333): each request is a unit of work.

When a request's events are published depends on what its response is known to be:

- *Complete*: the status is known, and the body is a list or tuple, or a Content-Length was sent, or
  the status is 204 or 304. Whatever the application does was done before it returned: its events
  are published before the first byte, and what its iterator adds is published at ``close()``.
- Otherwise the body is being made while it is sent: published when it is exhausted, or at
  ``close()``, whichever comes first.

A client that goes away has not undone the work: ``close()`` without an exception is success. An
exception that passes through the application or its iterator is failure, as is a final status that
``is_success`` does not accept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import Token
from typing import TYPE_CHECKING, Any

from outbox import Publisher, scope
from outbox.middleware.unit import IsSuccess, RequestCollector, below_400
from outbox.scope import Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["OutboxMiddleware"]

_MARKER = "outbox.collector"
_WITHOUT_BODY = (204, 304)


class OutboxMiddleware:
    """Wraps a WSGI application so that each request's events are published if it succeeds.

    Safe for any server: the collector is set for the call, for every step of the body and for its
    ``close()``. Wrapped twice, the inner one stands aside.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        publisher: Publisher | None = None,
        is_success: IsSuccess = below_400,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: the application.
            publisher: where the events go; the default is the process's own.
            is_success: says of the final status code whether the events are published.
        """
        self.app = app
        self._publisher = publisher
        self._is_success = is_success

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if _MARKER in environ:
            return self.app(environ, start_response)
        collector = environ[_MARKER] = RequestCollector(self._publisher, publishes_itself=True)
        request = _Request(collector, start_response, self._is_success)
        token = scope.enter(collector, collector.buffer)
        try:
            body = self.app(environ, request.start_response)
            return request.respond(body, environ.get("wsgi.file_wrapper"))
        except BaseException as error:
            request.fail(error)
            collector.close()
            raise
        finally:
            scope.leave(token)


class _Request:
    """The state of one request: its collector and what is known of its response."""

    __slots__ = ("_is_success", "_start_response", "collector", "failed", "has_length", "status")

    def __init__(
        self, collector: RequestCollector, start_response: StartResponse, is_success: IsSuccess
    ) -> None:
        self.collector = collector
        self._start_response = start_response
        self._is_success = is_success
        self.status = 0
        self.has_length = False
        self.failed = False

    def start_response(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        # May be called again with exc_info until the headers are sent: the last status counts.
        self.status = int(status[:3])
        self.has_length = any(name.lower() == "content-length" for name, _ in headers)
        return self._start_response(status, headers, *exc_info)

    def respond(self, body: Iterable[bytes], file_wrapper: Any) -> Iterable[bytes]:
        """Return ``body``, or what stands for it so that the unit ends when the response does."""
        kind = type(body)
        untouched = kind is list or kind is tuple or isinstance(body, list | tuple)
        if not untouched and isinstance(file_wrapper, type) and isinstance(body, file_wrapper):
            untouched = True  # servers know it by its type and send the file by themselves
        if untouched:
            self.settle()
            self.collector.close()
            return body
        if self.status and (self.has_length or self.status in _WITHOUT_BODY):
            self.settle()
        return _SizedBody(self, body) if hasattr(body, "__len__") else _Body(self, body)

    def settle(self) -> None:
        """Publish or drop what has been enqueued so far."""
        if not self.collector.buffer.events:
            return
        if self.failed:
            self.collector.discard("its request had failed")
        elif self.status and self._is_success(self.status):
            self.collector.publish_quietly()
        else:
            self.collector.discard(f"the response's status is {self.status or 'not known'}")

    def fail(self, error: BaseException) -> None:
        self.failed = True
        self.collector.discard(f"the request failed with {type(error).__qualname__}")


class _Body:
    """A response's body, iterated and closed with its request's collector current."""

    __slots__ = ("_body", "_closed", "_iterator", "_request")

    def __init__(self, request: _Request, body: Iterable[bytes]) -> None:
        self._request = request
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = self._enter()
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except StopIteration:
            self._request.settle()
            raise
        except BaseException as error:
            self._request.fail(error)
            raise
        finally:
            scope.leave(token)

    def close(self) -> None:
        """Close the application's body, once, and end the unit of work."""
        if self._closed:
            return
        self._closed = True
        token = self._enter()
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
            self._request.settle()
        except BaseException as error:
            self._request.fail(error)
            raise
        finally:
            self._request.collector.close()
            scope.leave(token)

    def _enter(self) -> Token[Scope | None]:
        collector = self._request.collector
        return scope.enter(collector, collector.buffer)


class _SizedBody(_Body):
    """Of a body that knows its length: servers may derive a Content-Length from it."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]
