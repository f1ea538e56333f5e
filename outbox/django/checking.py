"""System checks: what is wrong, or slower than it need be, before it is noticed in production."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from django.conf import settings as django_settings
from django.core import checks
from django.db import DatabaseError, connections

from outbox import UsageError
from outbox.django import project
from outbox.django.connecting import can_hand_over, vendor_of
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["register"]

_MIDDLEWARE = "outbox.django.OutboxMiddleware"


def register() -> None:
    """Register the checks; further calls do nothing."""
    checks.register(check_settings)
    checks.register(check_table, checks.Tags.database)


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Check the setting ``OUTBOX`` and what belongs to it; opens no connection."""
    found = [*_wrong_keys(), *_wrong_apps()]
    try:
        present = project.current()
    except UsageError:
        return found  # a check above names it
    return [*found, *_wrong_values(present), *_warnings(present)]


def check_table(databases: Sequence[str] | None = None, **_: Any) -> list[checks.CheckMessage]:
    """Check that the table is there; a warning, since an error would stop ``migrate`` itself."""
    try:
        store = project.current().store
    except UsageError:
        return []
    if store is None or store not in (databases or ()):
        return []
    connection = connections[store]
    try:
        with connection.cursor() as cursor:
            if "outbox_events" in connection.introspection.table_names(cursor):
                return []
    except DatabaseError:
        return []  # Django's own checks and commands say so
    return [
        checks.Warning(
            f"The table outbox_events is not in the database {store!r} yet; enqueue_event() needs "
            "it.",
            hint=f"`manage.py migrate --database {store}` creates it, also if this is its output.",
            id="outbox.W001",
        )
    ]


def _wrong_keys() -> Iterator[checks.CheckMessage]:
    given = getattr(django_settings, "OUTBOX", {})
    if not isinstance(given, dict):
        yield checks.Error(f"OUTBOX is {given!r:.80}, not a dict.", id="outbox.E001")
        return
    for key in given:
        if key not in project.NAMES:
            yield checks.Error(
                f"OUTBOX has an unknown key {project.misspelled(key)}.", id="outbox.E002"
            )
    store = given.get("STORE")
    if store is not None and store not in django_settings.DATABASES:
        known = ", ".join(map(repr, django_settings.DATABASES))
        yield checks.Error(
            f"OUTBOX['STORE'] is {store!r}, which is not in DATABASES ({known}).",
            hint="It is the alias of a database, or None to hold events in memory.",
            id="outbox.E003",
        )
    known_keys = {key: given[key] for key in given if key in project.NAMES}
    yield from _wrong_overrides(known_keys)


def _wrong_overrides(given: dict[str, Any]) -> Iterator[checks.CheckMessage]:
    outside = given.get("OUTSIDE_ATOMIC", "store")
    if outside not in ("store", "warn", "error"):
        yield checks.Error(
            f"OUTBOX['OUTSIDE_ATOMIC'] is {outside!r}, not 'store', 'warn' or 'error'.",
            id="outbox.E004",
        )
    for key, value in given.items():
        if key in ("URL", "STORE", "OUTSIDE_ATOMIC"):
            continue
        if key == "RESULTS" and value in django_settings.DATABASES:
            continue
        try:
            Settings.load(None, {key.lower(): value}, {})
        except UsageError as error:
            yield checks.Error(f"OUTBOX[{key!r}] is wrong: {error}.", id="outbox.E004")
    url = given.get("URL")
    if url:
        try:
            BrokerURL.parse(url)
        except UsageError as error:
            yield checks.Error(f"OUTBOX['URL'] is wrong: {error}.", id="outbox.E005")


def _wrong_apps() -> Iterator[checks.CheckMessage]:
    tenants = getattr(django_settings, "TENANT_APPS", ())
    if any(str(app).startswith("outbox.django") for app in tenants):
        yield checks.Error(
            "outbox.django is in TENANT_APPS: each schema would have its own table, and a relay "
            "sees one of them.",
            hint="Move it to SHARED_APPS.",
            id="outbox.E006",
        )


def _wrong_values(present: project.Project) -> Iterator[checks.CheckMessage]:
    if present.store is None:
        return
    try:
        vendor_of(present.store)
    except UsageError as error:
        yield checks.Error(
            f"OUTBOX['STORE'] is wrong: {error}.",
            hint="Name another alias, or None to hold events in memory.",
            id="outbox.E007",
        )


def _warnings(present: project.Project) -> Iterator[checks.CheckMessage]:
    store = present.store
    if store is None:
        return
    if _MIDDLEWARE in getattr(django_settings, "MIDDLEWARE", ()):
        yield checks.Warning(
            f"{_MIDDLEWARE} has nothing to do: events are stored in the database {store!r}.",
            hint="Remove it from MIDDLEWARE; it is for OUTBOX['STORE'] = None.",
            id="outbox.W002",
        )
    if importlib.util.find_spec("sqlalchemy") is None:
        yield checks.Warning(
            "SQLAlchemy isn't installed: processes store events, and a relay elsewhere must "
            "publish them.",
            hint="pip install 'outbox-events[django]'",
            id="outbox.W004",
        )
    elif (
        connections[store].vendor == "sqlite"
        and not _is_in_memory(store)
        and present.overrides.get("after_commit") != "nothing"
        and not can_hand_over(store)
    ):
        yield checks.Warning(
            f"Events stored in the SQLite database {store!r} are published by a relay alone, not "
            "right after the commit: the application's own transactions could fail with "
            '"database is locked" meanwhile.',
            hint=(
                f'Set DATABASES[{store!r}]["OPTIONS"] = {{"transaction_mode": "IMMEDIATE"}} '
                "(Django 5.1), or run `manage.py outbox consume` or `relay` and silence this."
            ),
            id="outbox.W003",
        )


def _is_in_memory(alias: str) -> bool:
    return bool(connections[alias].is_in_memory_db())
