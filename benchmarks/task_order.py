"""The order in which one thread begins scheduled tasks: by priority, then by time.

python -m benchmarks.task_order URL [tasks] [seconds] [milliseconds]

``tasks`` with priorities from 0 to 9 become due at random times within ``seconds``, and each takes
``milliseconds``. A task is *passed over* if another one begins that is less urgent, or due later,
while it has been due for over 100 ms.
"""

from __future__ import annotations

import datetime
import random
import sys
import time
from dataclasses import dataclass

from benchmarks import called_tasks
from outbox import Publisher, auto_publishing, configure
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.tasks import options

__all__ = ["Order", "run"]

_ALLOWED = 0.1


@dataclass(frozen=True)
class Order:
    """What was seen.

    Attributes:
        begun: the number of tasks that began.
        early: the number that began before their time.
        passing: the number that began while another one was passed over.
        seconds: the seconds from the first to the last.
    """

    begun: int
    early: int
    passing: int
    seconds: float


def run(url: str, *, tasks: int, seconds: float, each: float, threads: int = 1) -> Order:
    """Schedule ``tasks``, and run them with one worker."""
    called_tasks.begun.clear()
    publisher = configure(url, exchange="task-order", tasks_queue="task-order")
    try:
        return _run(publisher, tasks, seconds, each, threads)
    finally:
        publisher.close()


def _run(publisher: Publisher, tasks: int, seconds: float, each: float, threads: int) -> Order:
    chosen = random.Random(7)
    start = time.time() + 1.0 + tasks / 2000
    with auto_publishing():
        for _ in range(tasks):
            priority = chosen.randrange(10)
            due = start + chosen.uniform(0, seconds)
            at = datetime.datetime.fromtimestamp(due, datetime.UTC)
            options(at=at, priority=priority).later(called_tasks.begin, priority, due, each)
    worker = Worker(load(["benchmarks.called_tasks"]), publisher=publisher, threads=threads)
    worker.start()
    deadline = start + seconds + 2 * tasks * each + 60
    while len(called_tasks.begun) < tasks and time.time() < deadline:
        time.sleep(0.05)
    worker.stop()
    return order_of(called_tasks.begun)


def order_of(begun: list[tuple[float, int, float]]) -> Order:
    """Judge when tasks began: the time, the priority and the due time of each."""
    # From the end: of what begins later, the earliest due time of each priority.
    earliest = [float("inf")] * 10
    passing = 0
    for at, priority, due in sorted(begun, reverse=True):
        better = min(earliest[priority + 1 :], default=float("inf"))
        passing += better < at - _ALLOWED
        passing += better >= at - _ALLOWED and earliest[priority] < min(due, at - _ALLOWED)
        earliest[priority] = min(earliest[priority], due)
    # The times of tasks are microseconds.
    early = sum(at < due - 0.000_001 for at, _, due in begun)
    times = [at for at, _, _ in begun]
    return Order(len(begun), early, passing, max(times) - min(times))


if __name__ == "__main__":
    url, *numbers = sys.argv[1:]
    given = [float(number) for number in numbers]
    tasks, seconds, milliseconds = given + [10_000.0, 60.0, 10.0][len(given) :]
    print(run(url, tasks=int(tasks), seconds=seconds, each=milliseconds / 1000))
