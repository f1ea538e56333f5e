"""Installs a test's observer, a recorder or a live broker; one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Installed:
    """What is installed.

    Attributes:
        where: the test or place that installed it, for error messages.
        is_replaceable: whether another one may take its place until its own end.
    """

    where: str
    is_replaceable: bool


_installed: _Installed | None = None


@contextmanager
def recorded(
    where: str, *, strict: bool = False, replaceable: bool = False
) -> Iterator[CollectedEvents]:
    """Record every event of the process in the block, instead of publishing it.

    Args:
        where: the name of the calling test or place, for messages.
        strict: see :class:`outbox.testing.CollectedEvents`; the caller checks it at the end.
        replaceable: whether a block within this one may record the events, or publish them, in its
            place; otherwise that is an error.

    Raises:
        UsageError: another block is already active; the message names both places.
    """
    recorder = Recorder(where)
    with _observing(recorder, _Installed(where, replaceable)):
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
    with _observing(broker, _Installed(where, is_replaceable=False)):
        try:
            publisher = publisher_if_any()
            broker.read_back([(publisher.settings if publisher else Settings()).exchange])
            yield LiveEvents(broker, strict=strict)
        finally:
            broker.end()


@contextmanager
def _observing(observer: Observer, installed: _Installed) -> Iterator[None]:
    global _installed
    replaced, observer_before = _installed, seam.observer
    if observer_before is not None and not (replaced and replaced.is_replaceable):
        raise UsageError(
            "this test's events are already recorded, or published live, by "
            f"{replaced.where if replaced else 'something else'}: {installed.where} cannot do so "
            "too; use only one of them"
        )
    outer = Scope.present()
    seam.observer = observer
    _installed = installed
    try:
        yield
    finally:
        Scope.resume(outer)  # a block that the test has left open must not reach the next test
        seam.observer = observer_before
        _installed = replaced
