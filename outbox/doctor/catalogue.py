"""All checks, in the order of their codes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

from outbox.doctor import (
    code_checks,
    connection_checks,
    machine_checks,
    management_checks,
    queue_checks,
    settings_checks,
)
from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotChecked, Problem

__all__ = ["all_checks"]

_NEED_SQLALCHEMY = ("OBX201", "OBX202", "OBX203", "OBX204", "OBX205", "OBX206", "OBX207")


def all_checks() -> Sequence[Check]:
    """Return the checks; without SQLAlchemy, those of databases can't look."""
    modules = (
        settings_checks,
        connection_checks,
        queue_checks,
        management_checks,
        code_checks,
        machine_checks,
    )
    checks = [check for module in modules for check in module.CHECKS]
    if importlib.util.find_spec("sqlalchemy") is None:
        checks += [Check(code, "a database", "", _without_sqlalchemy) for code in _NEED_SQLALCHEMY]
    else:
        from outbox.doctor import broker_database_checks, database_checks

        checks += [*database_checks.CHECKS, *broker_database_checks.CHECKS]
    return sorted(checks, key=lambda check: check.code)


def _without_sqlalchemy(_: Examined) -> Iterator[Problem]:
    raise NotChecked("SQLAlchemy is not installed: pip install 'outbox-events[sql]'")
