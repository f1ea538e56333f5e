"""The Django app: it has every ``enqueue_event()`` of the process store through Django."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core.signals import setting_changed

from outbox import configuration, sinks
from outbox.django import checking, project, storing
from outbox.django.tasks.project_tasks import PROJECT_TASKS

__all__ = ["OutboxConfig"]


class OutboxConfig(AppConfig):
    """The app ``outbox.django``, labelled ``outbox_events``.

    ``ready()`` opens nothing and starts nothing: it runs in every command, also where there is no
    database, and in processes that fork later.
    """

    name = "outbox.django"
    label = "outbox_events"
    verbose_name = "Outbox"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Set up the process."""
        configuration.provide(project.publisher, project.settings_to_store)
        sinks.sink_using = storing.sink_using
        sinks.inbox = _inbox
        sinks.framework = PROJECT_TASKS
        checking.register()
        setting_changed.connect(_on_setting_changed, dispatch_uid="outbox.django")


def _inbox() -> Any:
    from outbox.django import noting  # a web process needs none

    return noting.open_inbox()


def _on_setting_changed(*, setting: str, **_: Any) -> None:
    if setting == "OUTBOX":
        project.forget()
