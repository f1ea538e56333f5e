"""Gauges of what waits in a database: counted now and then by a thread, not when they are read."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from outbox.telemetry import sources
from outbox.telemetry.sources import Samples

if TYPE_CHECKING:
    from outbox.storage.store import Status

__all__ = ["RowGauges"]

logger = logging.getLogger("outbox.metrics")

_EVERY = 15.0
"""Seconds between two counts, on average: as often as most are scraped."""
_SHARE = 50
"""The least multiple of the time that a count took, for a database to which that is much."""


class RowGauges:
    """Counts the rows of each queue, and has them read with what this process counts.

    While the database can't be counted, it shows no gauges: old ones would hide that.
    """

    def __init__(self, count: Callable[[], Status], queues: Iterable[str]) -> None:
        """Count nothing yet.

        Args:
            count: returns the numbers of rows; called on a thread.
            queues: the queues that are shown also while they are empty; further ones are once they
                have been seen.
        """
        self._count = count
        self._queues = set(queues)
        self._status: Status | None = None
        self._refusal = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-backlog", daemon=True)
        sources.register(self, dict, RowGauges._samples)

    def start(self) -> None:
        """Count at once, and then every 15 seconds, until :meth:`stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Count no more, and show no gauges soon; don't wait for a count that runs."""
        self._stopping.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            began = time.monotonic()
            try:
                status = self._count()
                self._queues.update(status.by_queue)
                self._status, self._refusal = status, ""
            except Exception as error:  # whatever a driver raises, the process works without
                self._status = None
                self._log(f"{type(error).__name__}: {error}".partition("\n")[0])
            pause = max(_EVERY * random.uniform(0.8, 1.2), _SHARE * (time.monotonic() - began))
        self._status = None

    def _log(self, refusal: str) -> None:
        level = logging.DEBUG if refusal == self._refusal else logging.INFO
        self._refusal = refusal
        logger.log(level, "cannot count the rows for the metrics: %s", refusal)

    def _samples(self) -> Samples:
        status = self._status
        if status is None:
            return {}
        samples: Samples = {"outbox_backlog_messages": {}, "outbox_backlog_age_seconds": {}}
        messages, ages = samples.values()
        for queue in sorted(self._queues):
            rows = status.by_queue.get(queue)
            messages[queue, "waiting"] = 0 if rows is None else rows.waiting
            messages[queue, "scheduled"] = 0 if rows is None else rows.scheduled
            messages[queue, "in_flight"] = 0 if rows is None else rows.leased
            ages[queue,] = 0 if rows is None else rows.oldest or 0
        messages["", "dead"] = sum(status.dead.values())
        return samples
