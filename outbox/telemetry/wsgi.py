"""Probes and metrics as a WSGI application, which any server can run, or mount in another one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from werkzeug.wrappers import Request, Response

from outbox.configuration import configured_publisher
from outbox.errors import CollectorFull
from outbox.telemetry import metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["ProcessSource", "ServiceApp", "Source"]

_METHODS = ("GET", "HEAD")


class Source(Protocol):
    """What a :class:`ServiceApp` shows. Thread-safe; no method waits for anything."""

    def live(self) -> Sequence[str]:
        """Return why it isn't live, one phrase each; nothing if it is."""
        ...

    def ready(self) -> Sequence[str]:
        """Return why it isn't ready, one phrase each; nothing if it is."""
        ...

    def metrics(self) -> str:
        """Return the metrics in Prometheus' text format."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Return what people want to know, as JSON can hold it."""
        ...


class ProcessSource:
    """Shows the process in which it runs, such as one of a web server."""

    def live(self) -> Sequence[str]:
        """Return nothing: a process that answers is live."""
        return ()

    def ready(self) -> Sequence[str]:
        """Return why events can't be accepted: a lost connection isn't a reason, a full memory is.

        Events are kept while the broker is unavailable.
        """
        publisher = configured_publisher()
        if publisher is None:
            return ()
        try:
            publisher.check_room()
        except CollectorFull:
            kept = publisher.stats().kept
            return (f"the publisher accepts no more events: {kept} are kept",)
        return ("the publisher is closed",) if publisher.closed else ()

    def metrics(self) -> str:
        """Return what this process has counted."""
        return metrics.render(metrics.snapshot())

    def status(self) -> Mapping[str, Any]:
        """Return the state of the default publisher."""
        publisher = configured_publisher()
        status: dict[str, Any] = {"pid": os.getpid(), "version": metrics.version()}
        if publisher is not None:
            stats = publisher.stats()
            status["publisher"] = {
                "connected": stats.connected,
                "kept": stats.kept,
                "kept_bytes": stats.kept_bytes,
            }
        return status


_STATUS_IS_OFF = "/status is off: it takes --http-status, or ServiceApp(status=True)\n"


class ServiceApp:
    """A WSGI application with the pages ``/livez``, ``/readyz``, ``/metrics`` and ``/status``.

    Mount it under any path, or under the name of one page to have only that:
    ``DispatcherMiddleware(app, {"/metrics": ServiceApp(status=False)})``. Only GET and HEAD are
    allowed. The probes answer 200 or 503, with one line a reason, or JSON if the client accepts
    that and no plain text. Thread-safe.
    """

    def __init__(self, source: Source | None = None, *, status: bool = True) -> None:
        """Create the application.

        Args:
            source: what it shows; the default is the process in which it runs.
            status: whether it has the page ``/status``, which names hosts, queues and errors.
        """
        self._source = source or ProcessSource()
        self._pages: dict[str, Callable[[Request], Response]] = {
            "livez": self._livez,
            "readyz": self._readyz,
            "metrics": self._metrics,
        }
        if status:
            self._pages["status"] = self._status

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        request = Request(environ)
        # Mounted under the name of a page, nothing is left of the path.
        name = request.path.strip("/") or request.root_path.rstrip("/").rpartition("/")[2]
        page = self._pages.get(name)
        if page is None:
            paths = "".join(f"/{each}\n" for each in self._pages)
            off = _STATUS_IS_OFF if name == "status" else ""
            response = _text(f"not found; there are\n{paths}{off}", 404)
        elif request.method not in _METHODS:
            response = _text("only GET and HEAD are allowed\n", 405)
            response.headers["Allow"] = ", ".join(_METHODS)
        else:
            response = page(request)
        response.headers["Cache-Control"] = "no-store"
        return response(environ, start_response)

    def _livez(self, request: Request) -> Response:
        return _probe(request, "live", self._source.live())

    def _readyz(self, request: Request) -> Response:
        return _probe(request, "ready", self._source.ready())

    def _metrics(self, _: Request) -> Response:
        return Response(self._source.metrics(), content_type=metrics.CONTENT_TYPE)

    def _status(self, _: Request) -> Response:
        return _json(dict(self._source.status()), 200)


def _probe(request: Request, what: str, reasons: Sequence[str]) -> Response:
    status = 503 if reasons else 200
    accepted = request.accept_mimetypes
    if accepted.best_match(["text/plain", "application/json"]) == "application/json":
        return _json({what: not reasons, "reasons": list(reasons)}, status)
    return _text("".join(f"{reason}\n" for reason in reasons) or f"{what}\n", status)


def _text(text: str, status: int) -> Response:
    return Response(text, status, content_type="text/plain; charset=utf-8")


def _json(content: Mapping[str, Any], status: int) -> Response:
    text = json.dumps(content, indent=2, default=str) + "\n"
    return Response(text, status, content_type="application/json")
