"""Stored events, and a relay that runs while a test looks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from outbox import Event
from outbox.sql import Relay, Store
from outbox.storage.engines import open_engine

__all__ = ["an_event", "is_empty", "many", "opened", "running"]


def opened(url: str) -> Store:
    """Return a store with its table."""
    store = Store(open_engine(url))
    store.create()
    return store


@contextlib.contextmanager
def running(relay: Relay, timeout: float = 10.0) -> Iterator[Relay]:
    """Run ``relay`` within the block."""
    relay.start()
    try:
        yield relay
    finally:
        relay.stop(timeout)


def an_event(number: int, exchange: str, target: str = "a", **options: Any) -> Event:
    """Return an event whose id and body contain its number."""
    return Event(id=f"e{number}", target=target, exchange=exchange, body=b"%d" % number, **options)


def many(count: int, exchange: str, **options: Any) -> list[Event]:
    """Return ``count`` events, numbered from 0."""
    return [an_event(number, exchange, **options) for number in range(count)]


def is_empty(store: Store) -> bool:
    """Return whether every stored event is published or dead."""
    return not store.status().queues
