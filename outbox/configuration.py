"""The default publisher of the process."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Unpack

from outbox import serializer
from outbox.errors import NotConfigured, UsageError
from outbox.observer import Observer, seam
from outbox.publisher import Publisher
from outbox.settings import SettingOverrides, Settings
from outbox.system import process

__all__ = [
    "configure",
    "configured_publisher",
    "default_publisher",
    "override_url",
    "overriding_url",
    "provide",
    "provided_publisher",
    "provider",
    "publisher_if_any",
    "runs_here",
    "settings_to_store",
]

_publisher: Publisher | None = None
provider: Callable[[], Publisher | None] | None = None
"""Returns the publisher of the application that runs here, or None; see ``provide``."""
runs_here: Callable[[], bool] | None = None
"""Returns whether an application runs here that is one of several; None if there are none."""
_settings: Callable[[], Settings] | None = None
_provided: dict[bool, tuple[Callable[[], Publisher | None], Callable[[], Settings] | None]] = {}
"""What was provided, by whether it is for the whole process."""
_overriding_url: str | None = None
_stand_in: tuple[Observer | None, Publisher] | None = None
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


process.after_fork(_renew_lock)


def configure(url: str | None = None, **settings: Unpack[SettingOverrides]) -> Publisher:
    """Create and return the process's default publisher.

    Call it once, when the application starts; before or after a fork makes no difference. A second
    call, with rotated credentials say, replaces the publisher while others publish: all events that
    have no fate yet move to the new one, as does what is published through the old one later, and
    callers who wait for confirms go on waiting. Without a call, the first
    ``enqueue_event()`` creates a publisher from ``OUTBOX_URL`` and the other ``OUTBOX_*``
    variables.

    Args:
        url: ``amqp(s)://user:password@host[:port][,host2...]/vhost``, or the database that is the
            broker, ``postgresql://user:password@host/database``,
            ``mariadb://user:password@host/database`` or ``sqlite:///file``, or ``memory://``; the
            default is ``OUTBOX_URL``.
        **settings: the settings, see :class:`outbox.settings.Settings`.

    Raises:
        NotConfigured: no URL is given, and ``OUTBOX_URL`` is not set; in a test whose events are
            recorded, none is needed.
        UsageError: the URL or a setting is invalid; the current publisher stays in place.
        InvalidEvent: the new publisher cannot carry a kept event; likewise.
    """
    global _publisher
    url = _overriding_url or url
    if url is None and seam.observer is not None and not _environment_has_url():
        url = "memory://"  # a test records the events: it needs no URL
    with _lock:
        publisher = Publisher(url, **settings)
        if _publisher is not None:
            try:
                _publisher.retire(publisher)
            except UsageError:
                publisher.close(0)
                raise
            except BaseException:  # a signal handler raised, when events have begun to move
                _publisher = publisher
                raise
        serializer.register(publisher.settings.serializer)
        _publisher = publisher
        return publisher


def override_url(url: str | None) -> None:
    """Use ``url`` in every ``configure()`` of this process, also the implicit one.

    For a command that imports an application: its option has precedence over the application, which
    may call ``configure()`` at any time. None changes nothing.
    """
    global _overriding_url
    _overriding_url = url


def overriding_url() -> str | None:
    """Return the URL of ``override_url()``, or None."""
    return _overriding_url


def provide(
    function: Callable[[], Publisher | None] | None,
    settings: Callable[[], Settings] | None = None,
    *,
    is_here: Callable[[], bool] | None = None,
) -> None:
    """Ask ``function`` for the default publisher before the process's own is used.

    For a framework of which a process may run several applications, each with its settings, and
    for one whose application is the whole process. Both may be in one process.

    Args:
        function: returns the publisher of the application that runs here, or None. It is called
            for each event, from any thread. None ends all of this.
        settings: returns the settings of events that are stored without a publisher; None for
            those of the environment.
        is_here: returns whether an application of this framework runs here, which is then asked
            first; None if there is one, which runs everywhere else.
    """
    global provider, runs_here, _provided, _settings
    if function is None:
        provider = runs_here = _settings = None
        _provided = {}
        return
    _provided[is_here is None] = function, settings
    runs_here = is_here or runs_here
    if len(_provided) == 1:
        provider, _settings = function, settings
    else:
        provider, _settings = _publisher_of_either, _settings_of_either


def _publisher_of_either() -> Publisher | None:
    return _provided[not (runs_here and runs_here())][0]()


def _settings_of_either() -> Settings:
    settings = _provided[not (runs_here and runs_here())][1]
    return _settings_of_environment() if settings is None else settings()


def settings_to_store() -> Settings:
    """Return the settings of events that are stored without a publisher."""
    return _settings_of_environment() if _settings is None else _settings()


@functools.cache
def _settings_of_environment() -> Settings:
    return Settings.load(None, {})


def provided_publisher() -> Publisher | None:
    """Return the publisher of the application that runs here, or None without one."""
    return None if provider is None else provider()


def default_publisher(observer: Observer | None = None) -> Publisher:
    """Return the default publisher, creating the process's from the environment if necessary.

    Args:
        observer: the observer of the calling unit of work; the default is the installed one.

    Raises:
        NotConfigured: ``configure()`` was not called, and ``OUTBOX_URL`` is not set.
    """
    if provider is not None and (provided := provider()) is not None:
        return provided
    publisher = _publisher  # without the lock: every event comes this way
    if publisher is not None:
        return publisher
    with _lock:
        if (
            _publisher is None
            and (observer or seam.observer) is not None
            and not _environment_has_url()
        ):
            return _stand_in_for(observer or seam.observer)
        return _publisher or configure()


def _environment_has_url() -> bool:
    """Return whether ``OUTBOX_URL`` is set; a blank one counts as unset, as in the settings."""
    return bool(os.environ.get("OUTBOX_URL", "").strip())


def _stand_in_for(observer: Observer | None) -> Publisher:
    """Return an in-memory publisher for a test whose code has not configured one."""
    global _stand_in
    if _stand_in is None or _stand_in[0] is not observer:
        _stand_in = observer, Publisher("memory://")
    return _stand_in[1]


def publisher_if_any() -> Publisher | None:
    """Return the default publisher, or None if neither code nor the environment names a URL."""
    if (provided := provided_publisher()) is not None:
        return provided
    named = _overriding_url is not None or _environment_has_url()
    if _publisher is None and seam.observer is None and not named:
        return None  # without the search of the environment for settings: an event waits for it
    try:
        return default_publisher()
    except NotConfigured:
        return None


def configured_publisher() -> Publisher | None:
    """Return the default publisher if there is one; never create it."""
    return _publisher
