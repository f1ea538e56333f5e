"""Each ending as a Celery task, in a worker thread of this process: ``task_worker NUMBER``."""

from __future__ import annotations

import sys

import django
from celery import Celery
from celery.contrib.testing.worker import start_worker

django.setup()

from tests.django.project.endings import run  # noqa: E402

app = Celery("project", broker="memory://", backend="cache+memory://")
app.conf.worker_hijack_root_logger = False
task = app.task(run, name="run")

if __name__ == "__main__":
    with start_worker(app, pool="solo", perform_ping_check=False):
        task.delay(int(sys.argv[1])).get(timeout=30)
