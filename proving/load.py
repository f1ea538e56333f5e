"""The load on the programs: requests, tasks, and the pace at which they are served."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from proving.database import Database
from proving.pace import Pace
from proving.programs.task_queue import TASK, task_queue
from proving.queues import Queues

__all__ = ["WRITERS", "Load"]

WRITERS = ("script", "spooled", "wsgi", "asgi", "prefork", "durable", "django", "caller")
"""The kinds of programs that enqueue events which no message has caused."""
_PAUSE = 0.05  # seconds between two requests
_TASK_PAUSE = 0.15  # seconds between two tasks
_MOST_STORED = 300  # events in the database above which writers slow down
_MOST_CONSUMED = 1_500  # messages in the worker's queues above which writers slow down
_LOOK = 0.5  # seconds between two looks at these numbers


class Load:
    """Threads that send requests and tasks, and slow writers down. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        queues: Queues,
        consumed: Collection[str],
        database: Database | None,
        ports: Mapping[str, int],
        *,
        tasks: bool,
        seed: int,
    ) -> None:
        """Prepare it.

        Args:
            folder: the folder of the history.
            queues: the queues of the broker.
            consumed: the queues of the workers, if there are any.
            database: the database with stored events, if there is one.
            ports: the kinds of servers to send requests to, and their ports.
            tasks: whether to give tasks to the prefork worker.
            seed: the seed of everything random.
        """
        self._folder = folder
        self._queues = queues
        self._consumed = consumed
        self._database = database
        self._paces = {kind: Pace(folder, kind) for kind in WRITERS}
        self._chance = random.Random(seed)
        self._stopping = threading.Event()
        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(self._keep_pace, ())]
        work += [(self._request, each) for each in ports.items()]
        if tasks:
            work.append((self._give_tasks, ()))
        self._threads = [
            threading.Thread(target=target, args=arguments, name="load")
            for target, arguments in work
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop them. Stopping twice is harmless."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(15)

    def _keep_pace(self) -> None:
        """Slow writers down while too much waits; keep the pace while the numbers are unknown."""
        while not self._stopping.wait(_LOOK):
            try:
                waiting = sum(self._queues.waiting(queue, tries=1) for queue in self._consumed)
                stored = self._database.waiting() if self._database is not None else 0
            except Exception:  # one is unavailable; pika also raises exceptions outside its tree
                continue
            for kind, pace in self._paces.items():
                is_late = kind in ("durable", "django", "caller") and stored > _MOST_STORED
                pace.set(slow=is_late or waiting > _MOST_CONSUMED)

    def _request(self, kind: str, port: int) -> None:
        """Send requests, and abort one in ten in the middle of the response."""
        while not self._stopping.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                response = connection.getresponse()
                response.read(10 if self._chance.random() < 0.1 else None)
            connection.close()
            self._stopping.wait(_PAUSE * self._paces[kind].factor)

    def _give_tasks(self) -> None:
        app = task_queue(self._folder)
        while not self._stopping.wait(_TASK_PAUSE * self._paces["prefork"].factor):
            app.send_task(TASK)
