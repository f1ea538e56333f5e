"""The Celery application of the prefork worker, whose queue is a folder of the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery

__all__ = ["TASK", "task_queue"]

TASK = "proving.unit"


def task_queue(history: Path) -> Any:
    """Return the application, for the worker and for those who give it tasks."""
    queue, done, control = history / "tasks", history / "tasks-done", history / "tasks-control"
    for folder in (queue, done, control):
        folder.mkdir(exist_ok=True)
    app = Celery("proving", broker="filesystem://", broker_connection_retry_on_startup=True)
    app.conf.update(
        broker_transport_options={
            "data_folder_in": str(queue),
            "data_folder_out": str(queue),
            "processed_folder": str(done),
            "control_folder": str(control),
            "polling_interval": 0.1,
        },
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
    )
    return app
