"""Installs a test's observer, a recorder or a live broker; one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from outbox import UsageError
from outbox.configuration import publisher_if_any
from outbox.observer import Observer, seam
from outbox.settings import Settings
from outbox.testing.collected_events import CollectedEvents
from outbox.testing.live_broker import LiveBroker
from outbox.testing.live_events import LiveEvents
from outbox.testing.recorder import Recorder
from outbox.unit_of_work.unit_of_work import Scope

__all__ = ["live", "recorded"]

_where = ""
"""The test or place that installed the observer, for error messages."""


@contextmanager
def recorded(where: str, *, strict: bool = False) -> Iterator[CollectedEvents]:
    """Record every event of the process in the block, instead of publishing it.

    Args:
        where: the name of the calling test or place, for messages.
        strict: see :class:`outbox.testing.CollectedEvents`; the caller checks it at the end.

    Raises:
        UsageError: another block is already active; the message names both places.
    """
    recorder = Recorder(where)
    with _installed(recorder, where):
        try:
            yield CollectedEvents(recorder, strict=strict)
        finally:
            recorder.end()


@contextmanager
def live(url: str, where: str, *, strict: bool = False) -> Iterator[LiveEvents]:
    """Have every publisher and worker of the process use the broker at ``url`` in the block.

    Args:
        url: the URL of a broker or virtual host that nothing else uses; ``amqp://`` or
            ``sqlite://``.
        where: the name of the calling test or place, for messages.
        strict: see :class:`outbox.testing.LiveEvents`; the caller checks it at the end.

    Raises:
        UsageError: another block is already active; the message names both places.
        AssertionError: the broker doesn't answer.
    """
    broker = LiveBroker(url, where)
    with _installed(broker, where):
        try:
            publisher = publisher_if_any()
            broker.read_back([(publisher.settings if publisher else Settings()).exchange])
            yield LiveEvents(broker, strict=strict)
        finally:
            broker.end()


@contextmanager
def _installed(observer: Observer, where: str) -> Iterator[None]:
    global _where
    if seam.observer is not None:
        raise UsageError(
            f"this test's events are already recorded, or published live, by "
            f"{_where or 'something else'}: {where} cannot do so too; use only one of them"
        )
    outer = Scope.present()
    seam.observer = observer
    _where = where
    try:
        yield
    finally:
        Scope.resume(outer)  # a block that the test has left open must not reach the next test
        seam.observer = None
        _where = ""
