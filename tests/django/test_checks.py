"""The system checks of outbox.django."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from tests.django.conftest import sqlite_settings, use_database


def found(databases: Sequence[str] | None = None) -> dict[str, str]:
    """The ids of outbox's messages, with their texts."""
    return {
        str(message.id): f"{message.msg} {message.hint}"
        for message in run_checks(databases=databases)
        if str(message.id).startswith("outbox.")
    }


@pytest.mark.parametrize(
    ("setting", "id", "text"),
    [
        ([], "outbox.E001", "not a dict"),
        ({"EXCHNAGE": "shop"}, "outbox.E002", "did you mean 'EXCHANGE'?"),
        ({"url": "memory://"}, "outbox.E002", "did you mean 'URL'?"),
        ({"STORE": "orders"}, "outbox.E003", "'orders', which is not in DATABASES"),
        ({"OUTSIDE_ATOMIC": "never"}, "outbox.E004", "'store', 'warn' or 'error'"),
        ({"TIMEOUT": "soon"}, "outbox.E004", "OUTBOX['TIMEOUT'] is wrong"),
        ({"HEADERS": "shop.headers"}, "outbox.E004", "OUTBOX['HEADERS'] is wrong"),
        ({"URL": "http://broker"}, "outbox.E005", "OUTBOX['URL'] is wrong"),
    ],
)
def test_a_wrong_setting_is_an_error(setting: Any, id: str, text: str) -> None:
    with override_settings(OUTBOX=setting):
        assert list(found()) == [id]
        assert text in found()[id]


def test_all_that_is_wrong_is_named_at_once() -> None:
    with override_settings(OUTBOX={"EXCHNAGE": "shop", "STORE": "orders", "URL": "http://broker"}):
        assert sorted(found()) == ["outbox.E002", "outbox.E003", "outbox.E005"]


def test_a_right_project_has_no_messages(databases: str) -> None:
    with override_settings(OUTBOX={"URL": "amqp://localhost/", "OUTSIDE_ATOMIC": "warn"}):
        assert found(["default", "other"]) == {}


def test_the_app_belongs_to_the_shared_apps() -> None:
    with override_settings(TENANT_APPS=["shop", "outbox.django"]):
        assert "SHARED_APPS" in found()["outbox.E006"]


def test_events_cannot_be_stored_in_any_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections["default"], "vendor", "oracle")
    assert "'oracle'" in found()["outbox.E007"]


def test_a_missing_table_is_a_warning_of_its_database(databases: str) -> None:
    call_command("migrate", "outbox_events", "zero", verbosity=0)
    assert found() == {}
    assert found(["other"]) == {}
    # migrate itself shows this on an empty database, before it creates the table.
    assert "migrate --database default` creates it" in found(["default"])["outbox.W001"]
    with override_settings(OUTBOX={"STORE": "other"}):
        assert found(["default", "other"]) == {}


def test_the_middleware_is_for_projects_that_store_nothing() -> None:
    with override_settings(MIDDLEWARE=["outbox.django.OutboxMiddleware"]):
        assert list(found()) == ["outbox.W002"]
        with override_settings(OUTBOX={"STORE": None}):
            assert found() == {}


def test_sqlite_says_why_events_wait_for_a_relay(tmp_path: Path) -> None:
    before = dict(connections.settings)["default"]
    use_database("default", {**sqlite_settings(tmp_path / "shop.sqlite3"), "OPTIONS": {}})
    try:
        assert '{"transaction_mode": "IMMEDIATE"}' in found()["outbox.W003"]
        with override_settings(OUTBOX={"AFTER_COMMIT": "nothing"}):
            assert found() == {}
        with override_settings(SILENCED_SYSTEM_CHECKS=["outbox.W003"]):
            call_command("check", fail_level="WARNING")
        assert not (tmp_path / "shop.sqlite3").exists()  # no connection was opened
    finally:
        use_database("default", before)


def test_without_sqlalchemy_a_relay_must_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "outbox-events[django]" in found()["outbox.W004"]
