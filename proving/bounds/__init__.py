"""Bounds in numbers, each shown by a program that runs alone: ``./scripts/prove --bounds``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

__all__ = ["BOUNDS", "keep_all"]

BOUNDS: Sequence[Sequence[str]] = (
    ("benchmarks.late",),
    ("proving.bounds.interruptions",),
    ("proving.bounds.rotation",),
    ("proving.bounds.serializable",),
    ("benchmarks.misaddressed", "--rounds", "1", "--check"),
    ("proving.bounds.take_over", "--rounds", "8"),
    ("proving.bounds.take_over", "--rounds", "8", "--kills"),
    ("proving.bounds.ticks",),
)
"""Modules to run, with their arguments; the exit code of each is 0 if its bound is kept."""


def keep_all() -> bool:
    """Run all of them, and return whether every bound is kept."""
    kept = True
    for module, *arguments in BOUNDS:
        print(f"== {module}", flush=True)
        kept &= subprocess.run([sys.executable, "-m", module, *arguments]).returncode == 0
    return kept
