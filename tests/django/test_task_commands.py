"""``manage.py outbox consume`` runs the tasks of apps, and methods of their models."""

from __future__ import annotations

from pathlib import Path

import django

from tests.django.project_folder import ProjectFolder
from tests.waiting import wait_until

_MODELS = """\
from django.db import models

from mail.noting import note


class Order(models.Model):
    number = models.IntegerField()

    def confirm(self):
        self.number += 1
        self.save()
        note(f"order {self.pk} is {self.number}")
"""

_NOTING = """\
from pathlib import Path

from django.conf import settings


def note(text):
    with open(Path(settings.BASE) / "mails.txt", "a") as mails:
        mails.write(f"{text}\\n")
"""

_TASKS = """\
from mail.noting import note
from outbox.tasks import task


@task
def remind(name):
    note(f"remind {name}")
"""

_DJANGOS_TASKS = """\
from django.tasks import task


@task
def send(name):
    note(f"send {name}")
"""

_SETTINGS = """\
TASKS = {"default": {"BACKEND": "outbox.django.TaskBackend"}}
"""

_CALLS = """\
from django.db import transaction

from mail.models import Order
from mail.tasks import remind
from outbox.tasks import later

with transaction.atomic():
    later(Order.objects.create(number=1).confirm)
    remind.later("Ann")
"""

_MORE_CALLS = """\
from mail.tasks import send

send.enqueue("Bob")
"""


def test_consume_runs_the_apps_tasks_and_the_methods_of_their_models(tmp_path: Path) -> None:
    has_tasks = django.VERSION >= (6, 0)
    project = ProjectFolder(
        tmp_path,
        settings=_SETTINGS,
        models=_MODELS,
        noting=_NOTING,
        tasks=_TASKS + (_DJANGOS_TASKS if has_tasks else ""),
        consumers="",
    )
    project.shell(_CALLS + (_MORE_CALLS if has_tasks else ""))
    listed = project.run("outbox", "tasks", "list", "--scheduled")
    assert "  mail.tasks:remind  tasks  due 20" in listed.stdout, listed.stderr
    # Those that the project's workers don't know.
    listed = project.run("outbox", "tasks", "list", "--scheduled", "--unknown")
    assert (listed.returncode, listed.stdout) == (0, ""), listed.stderr
    expected = ["order 1 is 2", "remind Ann", *(["send Bob"] if has_tasks else [])]
    with project.running("outbox", "consume") as process:
        wait_until(lambda: len(project.mails) == len(expected), 40)
    assert sorted(project.mails) == expected
    assert process.returncode == 0
