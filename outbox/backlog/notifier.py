"""Applies the side effects of a backlog change: futures, hooks, log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from outbox.backlog.backlog import News
from outbox.event import Event
from outbox.settings import Settings

__all__ = ["Notifier", "call_hook", "ids"]

logger = logging.getLogger("outbox.publisher")

_NAMED = 20


def ids(events: Iterable[Event]) -> str:
    """Return the ids of ``events`` for a log line, the first 20 of them."""
    found = [event.id for event in events]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(map(repr, found[:_NAMED])) + more


class Notifier:
    """Resolves futures, calls hooks, writes the log. Thread-safe.

    To be called without the backlog's lock: a hook may call the publisher.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, news: News) -> None:
        """Pass ``news`` on; a hook that raises is logged and stops nobody."""
        for chunk, report in news.reports:
            chunk.resolve(report)
        if self._settings.on_confirmed is not None:
            for chunk, report in news.reports:
                if chunk.took is not None and report.published:
                    call_hook(self._settings.on_confirmed, len(report.published), chunk.took)
        if news.kept:
            logger.warning(
                "%d event(s) kept, to be retried: %s; %s",
                len(news.kept),
                ids(news.kept),
                news.error,
            )
            call_hook(self._settings.on_kept, tuple(news.kept))
        if news.parked:
            logger.warning("%d event(s) parked: %s", len(news.parked), ids(news.parked))
            call_hook(self._settings.on_parked, tuple(news.parked))
        by_reason: dict[str, list[Event]] = {}
        for event, reason in news.rejected:
            by_reason.setdefault(reason, []).append(event)
        for reason, events in by_reason.items():
            logger.error("%d event(s) rejected, %r: %s", len(events), reason, ids(events))
        for event, reason in news.rejected:
            call_hook(self._settings.on_rejected, event, reason)


def call_hook(hook: Callable[..., object] | None, *arguments: object) -> None:
    """Call ``hook``, if there is one; what it raises is logged and stops nobody."""
    if hook is None:
        return
    try:
        hook(*arguments)
    except BaseException as error:  # a hook's sys.exit() must not end the link's thread
        logger.exception("the hook %r raised", hook)
        if isinstance(error, KeyboardInterrupt):
            raise
