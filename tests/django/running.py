"""Processes of the project in ``tests/django/project``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from django.db import connections

__all__ = ["environment_of", "python_path", "run_script"]

ROOT = Path(__file__).parents[2]


def python_path() -> str:
    """Return ``PYTHONPATH`` for a child process, which may lead to another version of Django."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def environment_of(outbox: dict[str, Any], **of_databases: Any) -> dict[str, str]:
    """Return the environment of a process with the databases of the test.

    Args:
        outbox: the setting ``OUTBOX``.
        **of_databases: what to add to the settings of each database.
    """
    databases = {
        alias: {
            **{key: its[key] for key in ("ENGINE", "NAME", "USER", "HOST", "PORT", "OPTIONS")},
            **of_databases,
        }
        for alias, its in ((each.alias, each.settings_dict) for each in connections.all())
    }
    return {
        **{name: os.environ[name] for name in os.environ if not name.startswith("OUTBOX_")},
        "DJANGO_SETTINGS_MODULE": "tests.django.project.project_settings",
        "PROJECT_DATABASES": json.dumps(databases),
        "PROJECT_OUTBOX": json.dumps(outbox),
        "PYTHONPATH": python_path(),
    }


def run_script(
    text: str, outbox: dict[str, Any], **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program in which Django is set up first."""
    preamble = options.pop("preamble", "")
    program = f"{preamble}\nimport django\ndjango.setup()\n{text}"
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment_of(outbox, **options),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
