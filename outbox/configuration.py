"""The default publisher of the process."""

from __future__ import annotations

import os
import threading
from typing import Unpack

from outbox import serializer
from outbox.errors import NotConfigured, UsageError
from outbox.observer import Observer, installed_observer
from outbox.publisher import Publisher
from outbox.settings import SettingOverrides
from outbox.system import process

__all__ = ["configure", "configured_publisher", "default_publisher", "publisher_if_any"]

_publisher: Publisher | None = None
_stand_in: tuple[Observer | None, Publisher] | None = None
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


process.after_fork(_renew_lock)


def configure(url: str | None = None, **settings: Unpack[SettingOverrides]) -> Publisher:
    """Make the process's default publisher, and return it.

    A second call replaces the first one's publisher; what is kept moves to the new one. Call it
    once, where the application starts: before or after a fork makes no difference. Without any
    call the first ``enqueue_event()`` makes a publisher from ``OUTBOX_URL`` and the other
    ``OUTBOX_*`` variables.

    Args:
        url: ``amqp(s)://user:password@host[:port][,host2...]/vhost``, ``memory://``; the default
            is ``OUTBOX_URL``.
        **settings: see :class:`outbox.settings.Settings`.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL or a setting cannot be used, or what is kept cannot move to the new
            publisher; the present one stays in place.
    """
    global _publisher
    with _lock:
        publisher = Publisher(url, **settings)
        if _publisher is not None:
            try:
                _publisher.hand_over_to(publisher)
            except UsageError:
                publisher.close(0)
                raise
        serializer.register(publisher.settings.serializer)
        _publisher = publisher
        return publisher


def default_publisher(observer: Observer | None = None) -> Publisher:
    """Return the process's default publisher, made from the environment if need be.

    Args:
        observer: of the unit of work that asks; by default the one in force.

    Raises:
        NotConfigured: neither ``configure()`` was called nor is ``OUTBOX_URL`` set.
    """
    found = _publisher
    if found is not None:
        return found
    with _lock:
        if (
            _publisher is None
            and (observer or installed_observer()) is not None
            and not os.environ.get("OUTBOX_URL")
        ):
            return _stand_in_for(observer or installed_observer())
        return _publisher or configure()


def _stand_in_for(observer: Observer | None) -> Publisher:
    """Return the publisher of a test whose code has configured none."""
    global _stand_in
    if _stand_in is None or _stand_in[0] is not observer:
        _stand_in = observer, Publisher("memory://")
    return _stand_in[1]


def publisher_if_any() -> Publisher | None:
    """Return the default publisher, or None where neither code nor the environment names a URL."""
    try:
        return default_publisher()
    except NotConfigured:
        return None


def configured_publisher() -> Publisher | None:
    """Return the default publisher if there is one; never make it."""
    return _publisher
