"""Runs the command ``outbox`` as its users do: a process, its output, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Done", "Run", "outbox_command", "run_outbox"]

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def outbox_command(*arguments: str) -> list[str]:
    """Return the command line of ``outbox``."""
    return [sys.executable, "-m", "outbox", *arguments]


def run_outbox(*arguments: str, variables: dict[str, str] | None = None, **options: Any) -> Done:
    """Run ``outbox`` to completion, without a terminal, with ``variables`` in its environment."""
    return subprocess.run(
        outbox_command(*arguments),
        env={**os.environ, **(variables or {})},
        stdin=options.pop("stdin", subprocess.DEVNULL),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
