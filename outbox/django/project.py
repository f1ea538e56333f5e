"""The setting ``OUTBOX`` of a Django project, and the publisher that it describes."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from django.conf import settings as django_settings

from outbox import Publisher, UsageError
from outbox.configuration import configured_publisher, overriding_url
from outbox.django.connecting import engine_of
from outbox.django.environment import is_test_environment
from outbox.observer import seam
from outbox.settings import Settings, suggestion
from outbox.system import process

__all__ = [
    "NAMES",
    "OutsideAtomic",
    "Project",
    "current",
    "forget",
    "misspelled",
    "publisher",
    "settings_of",
    "settings_to_store",
]

OutsideAtomic = Literal["store", "warn", "error"]

_OWN = ("URL", "STORE", "OUTSIDE_ATOMIC")
NAMES = (
    *_OWN,
    *(field.name.upper() for field in fields(Settings) if field.name != "url"),
)
"""The keys of the setting ``OUTBOX``."""


@dataclass(frozen=True)
class Project:
    """What the setting ``OUTBOX`` says.

    Attributes:
        url: the broker's URL; None for ``OUTBOX_URL`` in the environment.
        store: the alias of the database whose table takes the events; None holds them in memory
            until the commit.
        outside_atomic: what to do with an event that is stored outside of ``atomic()``.
        overrides: the other settings of the publisher, by their names in lower case.
    """

    url: str | None
    store: str | None
    outside_atomic: OutsideAtomic
    overrides: dict[str, Any]


@functools.cache
def current() -> Project:
    """Return what the setting ``OUTBOX`` says at present.

    Raises:
        UsageError: it is not a dict, a key is unknown, or a value is not one of those allowed.
    """
    given = getattr(django_settings, "OUTBOX", {})
    if not isinstance(given, dict):
        raise UsageError(f"the setting OUTBOX is {given!r:.80}, not a dict")
    for key in given:
        if key not in NAMES:
            raise UsageError(f"the setting OUTBOX has an unknown key {misspelled(key)}")
    outside = given.get("OUTSIDE_ATOMIC", "store")
    if outside not in get_args(OutsideAtomic):
        raise UsageError(
            f"OUTBOX['OUTSIDE_ATOMIC'] is {outside!r}, not one of "
            f"{', '.join(map(repr, get_args(OutsideAtomic)))}"
        )
    store = given.get("STORE", "default")
    if store is not None and store not in django_settings.DATABASES:
        raise UsageError(
            f"OUTBOX['STORE'] is {store!r}, which is not in DATABASES "
            f"({', '.join(map(repr, django_settings.DATABASES))})"
        )
    overrides = {key.lower(): value for key, value in given.items() if key not in _OWN}
    return Project(given.get("URL") or None, store, outside, overrides)


def misspelled(key: object) -> str:
    """Return ``key`` with the key of ``OUTBOX`` that was probably meant."""
    return f"{key!r}; {suggestion(str(key).upper(), NAMES)}"


def settings_of(project: Project) -> dict[str, Any]:
    """Return the settings of the project's publisher, by their names in lower case.

    Results may be kept in a database of the project. While a test runs, it keeps them itself.

    Raises:
        UsageError: outbox can't reach that database besides Django.
        MissingExtra: SQLAlchemy is not installed.
    """
    alias = project.overrides.get("results")
    if not isinstance(alias, str) or alias not in django_settings.DATABASES:
        return project.overrides
    results = "off" if is_test_environment() else engine_of(alias)
    return {**project.overrides, "results": results}


_publishers: dict[tuple[str, str], Publisher] = {}
_lock = threading.Lock()


def publisher() -> Publisher | None:
    """Return the publisher that ``OUTBOX`` describes, made at the first call; thread-safe.

    None if the process has configured another one, or if neither ``OUTBOX`` nor the environment
    names a URL. In Django's test environment it is an in-memory one in any case, unless a test
    observes events.
    """
    is_in_memory = is_test_environment() and seam.observer is None
    if not is_in_memory and configured_publisher() is not None:
        return None
    project = current()
    url = "memory://" if is_in_memory else overriding_url() or project.url
    key = str(url), repr(project.overrides)
    found = _publishers.get(key)
    if found is not None:
        return found
    if not url and not os.environ.get("OUTBOX_URL", "").strip():  # as the settings read it
        if seam.observer is None:
            return None
        url = "memory://"
    with _lock:
        if key not in _publishers:
            _publishers[key] = Publisher(url, **settings_of(project))
        return _publishers[key]


@functools.cache
def settings_to_store() -> Settings:
    """Return the settings of events that are stored without a publisher."""
    return Settings.load(None, settings_of(current()))


def forget() -> None:
    """Read the setting anew: a test has overridden it, or has ended."""
    current.cache_clear()
    settings_to_store.cache_clear()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


process.after_fork(_renew_lock)
