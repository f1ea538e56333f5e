"""WSGI (PEP 3333): each request is a unit of work.

When a request's events are published depends on what is known of its response:

- *Complete*: the status is known, and the body is a list or tuple, or a Content-Length was sent, or
  the status is 204 or 304. The application did its work before it returned: its events are
  published before the first byte. The unit stays open while there is an iterator, whose events are
  published like those of a stream.
- Otherwise the body is produced while it is sent: the events are published when it is exhausted,
  and at ``close()``, which ends the unit.

An exception from the application or its iterator is failure, as is a final status that
``is_success`` does not accept. So is a ``close()`` that ends a generator in the middle: the client
has disconnected, and ``GeneratorExit`` goes through the code that enqueued the events, and through
its transaction. Any other body that is closed early has done its work, which a disconnect does not
undo.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, GeneratorType, ModuleType
from typing import TYPE_CHECKING, Any

from outbox import Publisher
from outbox.middleware.request_collector import IsSuccess, RequestCollector, below_400
from outbox.unit_of_work.unit_of_work import Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["OutboxMiddleware"]

_MARKER = "outbox.collector"
_FILE_WRAPPER = "wsgi.file_wrapper"
_WITHOUT_BODY = ("204", "304")
_SEARCHED_DEPTH = 10
_SEARCHED_OBJECTS = 300


class OutboxMiddleware:
    """WSGI middleware that publishes each request's events if the request succeeds.

    Safe for any server: the collector is current during the call, each step of the body, and its
    ``close()``. If an application is wrapped twice, the inner middleware does nothing.
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
            publisher: the publisher of the events; the default is the process's.
            is_success: decides by the final status code whether to publish the events.
        """
        self.app = app
        self._publisher = publisher
        self._is_success = is_success

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        outer = environ.get(_MARKER)
        if outer is not None and not outer.closed:  # closed if an ended request is tried again
            return self.app(environ, start_response)
        request = environ[_MARKER] = _Request(self._publisher, start_response, self._is_success)
        wrapper = environ.get(_FILE_WRAPPER)
        if wrapper is not None and not isinstance(wrapper, (type, _FileWrapper)):
            environ[_FILE_WRAPPER] = _FileWrapper(wrapper)
        scope = Scope(request, request._buffer, Scope.around())
        try:
            token = Scope.resume(scope)
            try:
                body = self.app(environ, request.start_response)
            finally:
                Scope.leave(token)
        except BaseException as error:
            request.refuse()
            request.fail(f"failed with {type(error).__qualname__}")
            request.close()
            raise
        return request.respond(body, environ, scope)


class _Request(RequestCollector):
    """One request: its collector, and what is known of its response."""

    __slots__ = ("_failed", "_headers", "_is_success", "_start_response", "_status")

    def __init__(
        self,
        publisher: Publisher | None,
        start_response: StartResponse,
        is_success: IsSuccess,
    ) -> None:
        super().__init__(publisher, True)
        self._start_response = start_response
        self._is_success = is_success
        self._status = ""
        self._headers: list[tuple[str, str]] = []
        self._failed = False

    def start_response(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        # May be called again with exc_info until the headers are sent: the last status counts.
        self._status = status
        self._headers = headers
        return self._start_response(status, headers, *exc_info)

    def respond(
        self, body: Iterable[bytes], environ: WSGIEnvironment, scope: Scope
    ) -> Iterable[bytes]:
        """Return ``body``, wrapped if needed so that the unit ends when the response does."""
        if isinstance(body, (list, tuple)) or _is_file(body, environ):
            self.refuse()
            if self._buffer.events:
                self._finish_or_close(body)
            self.close()
            return body
        wrapped = (_SizedBody if hasattr(body, "__len__") else _Body)(self, body, scope)
        if self._buffer.events and self._is_complete():
            self._finish_or_close(wrapped)
        return wrapped

    def finish(self) -> None:
        """Publish or drop the events enqueued so far."""
        if not self._buffer.events:
            return
        if self._failed:
            self.discard("the request had failed")
        elif self.accepts(self._is_success, _number(self._status)):
            self.publish_quietly()
        else:
            known = ascii(self._status[:3])[1:-1] or "not known"
            self.discard(f"the response's status is {known}")

    def fail(self, how: str) -> None:
        """Drop the events enqueued so far, and those that follow."""
        self._failed = True
        self.discard(f"the request {how}")

    def _finish_or_close(self, body: Iterable[bytes]) -> None:
        """Finish; if interrupted, close ``body``, which the server won't get."""
        try:
            self.finish()
        except BaseException as error:
            self.fail(f"failed with {type(error).__qualname__}")
            _close(body)
            self.close()
            raise

    def _is_complete(self) -> bool:
        return self._status[:3] in _WITHOUT_BODY or any(
            name.lower() == "content-length" for name, _ in self._headers
        )


class _FileWrapper:
    """A server's ``wsgi.file_wrapper`` that is a function, and its latest result.

    PEP 3333 only requires a callable. uWSGI's returns the file itself, by which the server knows
    what to send: nothing else distinguishes it from other files that are iterated.
    """

    __slots__ = ("_wrapper", "made")

    def __init__(self, wrapper: Callable[..., object]) -> None:
        self._wrapper = wrapper
        self.made: object = None

    def __call__(self, *arguments: Any) -> object:
        self.made = self._wrapper(*arguments)
        return self.made


def _is_file(body: object, environ: WSGIEnvironment) -> bool:
    """Return whether ``body`` is the server's file wrapper, which the server sends directly."""
    wrapper = environ.get(_FILE_WRAPPER)
    if isinstance(wrapper, _FileWrapper):
        return body is wrapper.made
    return isinstance(wrapper, type) and isinstance(body, wrapper)


class _Body:
    """A response's body, iterated and closed with its request's collector current.

    A block that the application opens in one step, around a ``yield``, is still open in the next.
    """

    __slots__ = ("_body", "_closed", "_is_exhausted", "_iterator", "_request", "_scope")

    def __init__(self, request: _Request, body: Iterable[bytes], scope: Scope) -> None:
        self._request = request
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._scope: Scope | None = scope
        self._closed = False
        self._is_exhausted = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = Scope.resume(self._scope)
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except StopIteration:
            self._is_exhausted = True
            self._request.finish()
            raise
        except BaseException as error:
            self._request.fail(f"failed with {type(error).__qualname__}")
            raise
        finally:
            self._scope = Scope.present()
            Scope.leave(token)

    def close(self) -> None:
        """Close the application's body, once, and end the unit of work."""
        if self._closed:
            return
        self._closed = True
        token = Scope.resume(self._scope)
        try:
            is_interrupted = (
                not self._is_exhausted
                and self._iterator is not None
                and _holds_suspended_generator(self._iterator)
            )
            _close(self._body)
            self._request.refuse()
            if is_interrupted:
                self._request.fail("was interrupted in its body: the client has disconnected")
            self._request.finish()
        except BaseException as error:
            self._request.refuse()
            self._request.fail(f"failed with {type(error).__qualname__}")
            raise
        finally:
            self._request.close()
            Scope.leave(token)


class _SizedBody(_Body):
    """A body with a length, from which servers may derive a Content-Length."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


def _number(status: str) -> int | None:
    """Return the number that ``status`` begins with, or None."""
    digits = status[:3]
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _holds_suspended_generator(iterator: object) -> bool:
    """Return whether ``iterator`` is a generator that has begun and not ended, or wraps one.

    Frameworks wrap bodies in objects of many kinds (``map``, ``functools.partial``, classes with a
    ``close``), which the garbage collector can look into. Without a generator nothing runs in the
    application when the body is closed, except what its ``close()`` says.
    """
    seen: set[int] = set()
    level: list[Any] = [iterator]
    for _ in range(_SEARCHED_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if id(item) in seen or len(seen) > _SEARCHED_OBJECTS:
                continue
            seen.add(id(item))
            if isinstance(item, GeneratorType):
                if inspect.getgeneratorstate(item) == inspect.GEN_SUSPENDED:
                    return True
            elif isinstance(item, FunctionType):  # not its globals
                following += item.__closure__ or ()
            elif not isinstance(item, (type, ModuleType)):
                following += gc.get_referents(item)
        level = following
    return False
