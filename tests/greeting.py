"""Another module of tasks, for workers that don't know those of ``tests.shipping``."""

from __future__ import annotations

from outbox.tasks import task

__all__ = ["goodbye"]


@task
def goodbye() -> None:
    """Do nothing."""
