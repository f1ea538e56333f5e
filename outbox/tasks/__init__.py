"""Tasks: functions and methods that are called later, in a worker."""

from outbox.errors import (
    NoResults,
    ResultLost,
    ResultTimeout,
    TaskCancelled,
    TaskError,
    TaskFailed,
)
from outbox.tasks.call_options import TaskOptions
from outbox.tasks.decorator import Task, TaskCall, later, options, schedule, task
from outbox.tasks.task_handle import TaskHandle
from outbox.tasks.task_run import TaskRun, current_task

__all__ = [
    "NoResults",
    "ResultLost",
    "ResultTimeout",
    "Task",
    "TaskCall",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskOptions",
    "TaskRun",
    "current_task",
    "later",
    "options",
    "schedule",
    "task",
]
