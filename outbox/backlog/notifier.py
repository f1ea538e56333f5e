"""Applies the side effects of a backlog change: futures, hooks, log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from outbox.backlog.backlog import News
from outbox.errors import BrokerError
from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.settings import Settings
from outbox.system.log_lines import log

__all__ = ["Notifier", "call_hook", "ids", "log_kept"]

logger = logging.getLogger("outbox.publisher")

_NAMED = 20

_PARKED = (
    f"%d event(s) parked in {PARKING_QUEUE!r}: %s; no queue is bound to %s: start a worker with a "
    "consumer for it once, or set unroutable='ignore'; `outbox parked list` shows parked events, "
    "`outbox parked replay` publishes them"
)


def ids(events: Iterable[Event]) -> str:
    """Return the ids of the first 20 ``events``, for a log line."""
    event_ids = [event.id for event in events]
    more = f" and {len(event_ids) - _NAMED} more" if len(event_ids) > _NAMED else ""
    return ", ".join(map(repr, event_ids[:_NAMED])) + more


def _addresses(events: Iterable[Event]) -> str:
    """Return the first 20 distinct addresses of ``events``, for a log line."""
    addresses = list(dict.fromkeys((event.target, event.exchange) for event in events))
    more = f" and {len(addresses) - _NAMED} more" if len(addresses) > _NAMED else ""
    return ", ".join(f"{to!r} on exchange {on!r}" for to, on in addresses[:_NAMED]) + more


def log_kept(events: Sequence[Event], error: BrokerError | None) -> None:
    """Log that ``events`` are kept."""
    log(
        logger,
        logging.WARNING,
        "%d event(s) kept, retrying in the background: %s; %s",
        len(events),
        ids(events),
        error,
    )


class Notifier:
    """Resolves futures, calls hooks and writes log lines. Thread-safe.

    Call it when a change of the backlog is complete, since a hook may call the publisher.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, news: News) -> None:
        """Apply ``news``; an exception in a hook is logged, and stops nothing else."""
        for chunk, report in news.reports:
            chunk.resolve(report)
        for callback in news.settled:
            callback()
        if self._settings.on_confirmed is not None:
            for chunk, report in news.reports:
                if chunk.took is not None and report.published:
                    call_hook(self._settings.on_confirmed, len(report.published), chunk.took)
        if news.kept:
            kept = tuple([entry.event for entry in news.kept])
            if not news.quiet:
                log_kept(kept, news.error)
            call_hook(self._settings.on_kept, kept)
        if news.parked:
            if not news.quiet:
                parked = news.parked
                log(logger, logging.WARNING, _PARKED, len(parked), ids(parked), _addresses(parked))
            call_hook(self._settings.on_parked, tuple(news.parked))
        by_reason: dict[str, list[Event]] = {}
        for event, reason in news.rejected:
            by_reason.setdefault(reason, []).append(event)
        for reason, events in by_reason.items():
            if not news.quiet:
                given_up = "giving up %d event(s), %r: %s"
                log(logger, logging.ERROR, given_up, len(events), reason, ids(events))
        for event, reason in news.rejected:
            call_hook(self._settings.on_rejected, event, reason)


def call_hook(hook: Callable[..., object] | None, *arguments: object) -> None:
    """Call ``hook``, if there is one; an exception in it is logged, and stops nothing else."""
    if hook is None:
        return
    try:
        hook(*arguments)
    except BaseException as error:  # a hook's sys.exit() must not end the link's thread
        logger.exception("hook %r raised; continuing", hook)
        if isinstance(error, KeyboardInterrupt):
            raise
