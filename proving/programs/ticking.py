"""A process that calls a recurring task at its times, and nothing else: a witness takes the calls.

python -m proving.programs.ticking EVERY FILE, with OUTBOX_URL. The caller writes its pid to
FILE; who takes part makes FILE-<pid>.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from outbox.settings import Settings
from outbox.tasks.decorator import task
from outbox.tasks.recurring_calls import recurring_task_of
from outbox.transports.registry import open_ticker

__all__ = ["QUEUE", "TASK"]

QUEUE, TASK = "ticking", "tick"


def tick() -> None:
    """Do nothing."""


class Note(logging.Handler):
    """Notes that this process has called the task."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the pid."""
        if "called the recurring task" in record.msg:
            Path(sys.argv[2]).write_text(str(os.getpid()))


def main() -> None:
    """Tick until the process is killed."""
    logger = logging.getLogger("outbox.ticks")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Note())
    logger.propagate = False
    settings = Settings.load(None, {"tasks_queue": QUEUE})
    recurring = recurring_task_of(task(name=TASK, every=float(sys.argv[1]))(tick), settings)
    if recurring is None:
        raise AssertionError("it has a schedule")
    ticker = open_ticker(settings, [recurring])
    ticker.start()
    while not takes_part(ticker):
        time.sleep(0.01)
    Path(f"{sys.argv[2]}-{os.getpid()}").touch()
    threading.Event().wait()


def takes_part(ticker: Any) -> bool:
    """Return whether the broker has it as a consumer."""
    return all(queue._is_consuming for queue in ticker._queues)


if __name__ == "__main__":
    main()
