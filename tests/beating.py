"""A module with a recurring task, as applications write them."""

from __future__ import annotations

import threading
import time

from outbox.tasks import TaskRun, current_task, task

__all__ = ["beat", "may_end", "runs"]

runs: list[tuple[float, TaskRun]] = []
may_end = threading.Event()
may_end.set()


@task(every=1, name="beat")
def beat() -> None:
    run = current_task()
    if run is not None:
        runs.append((time.time(), run))
    may_end.wait(20)
