"""Celery's worker with its thread pool; like the others, it acks when a task is done."""

from __future__ import annotations

import logging
import os
from typing import Any

import celery
import celery.worker.state

from benchmarks.peers.consuming import CELERY_QUEUE, PREFETCH, THREADS, Countdown

_PADDING = "x" * 40


def fill(url: str, messages: int) -> None:
    app = _app(url)

    @app.task(name="task")
    def task(padding: str) -> None:
        """Do nothing here; another process runs the task."""

    for _ in range(messages):
        task.delay(_PADDING)
    app.close()


def consume(url: str, messages: int) -> float:
    logging.basicConfig(level=logging.WARNING)  # else it logs two lines per task
    app = _app(url)
    countdown = Countdown(messages, _stop)

    @app.task(name="task")
    def task(padding: str) -> None:
        countdown.handle()

    worker = app.WorkController(
        app=app,
        pool="threads",
        concurrency=THREADS,
        queues=[CELERY_QUEUE],
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()  # blocks until it is stopped
    countdown.wait()
    return countdown.rate


def _stop() -> None:
    celery.worker.state.should_stop = True


def _app(url: str) -> Any:
    app = celery.Celery("bench", broker=url, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        task_acks_late=True,
        task_default_queue=CELERY_QUEUE,
        task_ignore_result=True,
        worker_prefetch_multiplier=PREFETCH // THREADS,
    )
    if database := os.environ.get("BENCHMARK_RESULTS"):
        app.conf.update(task_ignore_result=False, result_backend=f"db+{database}")
    return app
