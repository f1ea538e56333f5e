"""A module with a recurring task, as applications write them."""

from __future__ import annotations

import time

from outbox.tasks import TaskRun, current_task, task

__all__ = ["beat", "runs"]

runs: list[tuple[float, TaskRun]] = []


@task(every=1, name="beat")
def beat() -> None:
    run = current_task()
    if run is not None:
        runs.append((time.time(), run))
