"""A worker process under a supervisor: reports to it, and stops if it dies."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outbox.consumers.command import worker_main
from outbox.consumers.command.framework import Framework
from outbox.consumers.command.limits import Recycling
from outbox.consumers.losses.begun_table import BegunTable
from outbox.consumers.worker.worker import Worker
from outbox.service.http_options import http_address
from outbox.service.supervised import (
    LEAVING,
    MARGIN,
    READY,
    STOPPING,
    Supervised,
    SupervisedSignals,
)
from outbox.system.child_process import Parent
from outbox.telemetry.row_gauges import RowGauges
from outbox.transports.registry import open_store

if TYPE_CHECKING:
    from outbox.storage.store import Status

__all__ = ["run"]

logger = logging.getLogger("outbox.consumer")


def run(options: argparse.Namespace, parent: Parent, framework: Framework | None = None) -> int:
    """Run a worker process; return its exit code.

    A repeated signal has no effect on it: a terminal or systemd may signal both the parent and its
    children, to which the parent sends a signal as well. Only the parent kills a worker at once.
    """
    supervised = Supervised(parent, logger)
    stop = SupervisedSignals(supervised)
    workers: list[Worker] = []
    gauges: list[RowGauges] = []

    def log_tasks() -> None:
        for worker in workers:
            worker.log_tasks()

    supervised.stop_with_parent(stop, options.shutdown_timeout + MARGIN, log_tasks)
    begun = BegunTable.inherited()

    def on_start(worker: Worker, recycling: Recycling) -> None:
        workers.append(worker)
        if options.stuck_after != 0:
            _name_unbounded(worker)
        vitals = worker.vitals()

        def report(seconds: float) -> dict[str, Any]:
            return {
                **vitals.look(seconds),
                "links": {
                    "consumer": worker.is_consuming,
                    "publisher": worker.publisher.connected,
                },
                "limits": recycling.values(time.monotonic()),
            }

        supervised.report_each_second(report)

    def on_ready() -> None:
        supervised.say(READY)
        # Not before: a new file has no tables yet.
        if supervised.is_first and http_address(options):
            gauges.extend(_started_gauges(workers[-1]))

    def work() -> int:
        try:
            return worker_main.run(
                options,
                stop,
                on_start=on_start,
                on_ready=on_ready,
                on_leaving=lambda: supervised.say(LEAVING),
                on_stopping=lambda: supervised.say(STOPPING),
                begun=begun,
                framework=framework,
            )
        finally:
            for each in gauges:
                each.stop()

    if not options.reload:
        return work()
    from outbox.consumers.command.autoreload import run_reloading

    return run_reloading(work, stop, options.shutdown_timeout + MARGIN)


def _started_gauges(worker: Worker) -> Sequence[RowGauges]:
    """Start to count what waits, if the broker is a database."""
    store = open_store(worker.publisher.settings)
    if store is None:
        return ()

    def count() -> Status:
        try:
            return store.status()
        finally:
            store.engine.dispose()  # no connection stays open meanwhile, and none is inherited

    gauges = RowGauges(count, worker.consumers)
    gauges.start()
    return (gauges,)


def _name_unbounded(worker: Worker) -> None:
    """Log which consumers no handler of which is ever late, and so none is taken to be stuck."""
    unbounded = [repr(each.queue) for each in worker.consumers.values() if each.timeout is None]
    if unbounded:
        logger.info(
            "handlers without a timeout, which may run for any time and are never taken to be "
            "stuck: %s",
            ", ".join(unbounded),
        )
