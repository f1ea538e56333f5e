"""The middleware of projects with ``STORE = None``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction

from outbox.middleware.request_collector import RequestCollector, below_400
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["OutboxMiddleware"]


class OutboxMiddleware:
    """Publishes what a request enqueues outside of ``atomic()`` as one chunk, if it succeeds.

    Only with ``OUTBOX["STORE"] = None``: otherwise events are stored, and nothing is left to do at
    the end of a request. What is enqueued inside ``atomic()`` is published after its commit in any
    case. A status from 400 on drops the events of the request.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        """Wrap ``get_response``, as Django does with each of ``MIDDLEWARE``."""
        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        """Return the response, or an awaitable of it."""
        if iscoroutinefunction(self):
            return self._call_async(request)
        collector = RequestCollector(None, publishes_itself=True)
        token = Scope.enter(collector, collector._buffer)
        try:
            response = self._get_response(request)
            if _succeeds(collector, response):
                collector.publish_quietly()
            return response
        finally:
            collector.close()
            Scope.leave(token)

    async def _call_async(self, request: Any) -> Any:
        get_response: Callable[[Any], Awaitable[Any]] = self._get_response
        collector = RequestCollector(None, publishes_itself=True)
        token = Scope.enter(collector, collector._buffer)
        try:
            response = await get_response(request)
            if _succeeds(collector, response):
                await collector.publish_quietly_async()
            return response
        finally:
            collector.close()
            Scope.leave(token)


def _succeeds(collector: RequestCollector, response: Any) -> bool:
    """Return whether the events of a request are to be published; otherwise drop them."""
    collector.refuse()
    if collector.accepts(below_400, response.status_code):
        return True
    collector.discard(f"the response has the status {response.status_code}")
    return False
