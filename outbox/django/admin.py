"""Stored events in Django's admin: to look at, and the dead ones to retry or purge.

Everything goes to the database ``STORE``: a router may send the admin's queries to a replica, where
an action would act on rows that are gone. Ages are by the database's clock. Parked events aren't
here: they are in the broker, where a look counts as a delivery (``manage.py outbox parked``).
"""

from __future__ import annotations

import functools
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.paginator import Paginator
from django.db import DEFAULT_DB_ALIAS
from django.db.models import FloatField, QuerySet
from django.db.models.expressions import RawSQL
from django.template.response import TemplateResponse

from outbox.django import project
from outbox.django.connecting import vendor_of
from outbox.django.models import StoredEvent
from outbox.django.moments import NOW, seconds_since

__all__ = ["StoredEventAdmin"]

_MOST = 1000  # rows that are paged through: the rest is in the reach of filters and the search
_SHOWN = 10_000  # bytes of a body


class _Pages(Paginator):
    """Pages of the first rows, which counts no others: the table may have millions."""

    @functools.cached_property
    def count(self) -> int:
        """The number of rows, 1,000 at most."""
        return len(self.object_list.values_list("pk", flat=True)[:_MOST])


class _State(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        """Return the states."""
        return [(name, name) for name in ("waiting", "scheduled", "in flight", "dead")]

    def queryset(self, request: Any, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the rows in the chosen state."""
        if self.value() == "dead":
            return queryset.filter(dead_at__isnull=False)
        if self.value() is None:
            return queryset
        alive = queryset.filter(dead_at__isnull=True)
        now = RawSQL(NOW[vendor_of(_alias())], [])
        if self.value() == "waiting":
            return alive.filter(available_at__lte=now)
        return alive.filter(available_at__gt=now, lease_token__isnull=self.value() == "scheduled")


@admin.register(StoredEvent)
class StoredEventAdmin(admin.ModelAdmin):
    """The rows of the table.

    Permissions: ``view`` for all of it, except that bodies and headers need ``view_body``;
    ``change`` to make dead events due again; ``delete`` to purge them.
    """

    list_display = ("target", "id", "key", "state", "age", "attempts", "reason")
    list_display_links = ("target", "id")
    list_filter = (_State,)
    search_fields = ("id__exact", "target__exact", "key__exact")
    search_help_text = "The whole id, target or key"
    ordering = ("seq",)
    sortable_by = ()
    actions = ("retry", "purge")
    paginator = _Pages
    show_full_result_count = False
    list_max_show_all = 0

    def get_queryset(self, request: Any) -> QuerySet[Any]:
        """Return the rows, without their bodies."""
        alias = _alias()
        vendor = vendor_of(alias)
        return (
            StoredEvent.objects.using(alias)
            .defer("payload", "headers")
            .annotate(
                stored_for=RawSQL(seconds_since("stored_at", vendor), [], FloatField()),
                due_for=RawSQL(seconds_since("available_at", vendor), [], FloatField()),
            )
            .order_by("seq")
        )

    def get_object(self, request: Any, object_id: str, from_field: str | None = None) -> Any:
        """Return a row with its body."""
        row = super().get_object(request, object_id, from_field)
        if row is not None:
            row.refresh_from_db(using=_alias(), fields=["payload", "headers"])
        return row

    def get_fields(self, request: Any, obj: Any = None) -> list[str]:
        """Return what a row's page shows."""
        shown = ["id", "target", "key", "state", "age", "due", "attempts", "reason", "exchange"]
        shown += ["content_type", "priority", "occurred_at", "stored_at", "available_at"]
        if request.user.has_perm("outbox_events.view_body"):
            shown += ["headers", "body"]
        return shown

    def get_readonly_fields(self, request: Any, obj: Any = None) -> list[str]:
        """Return all fields."""
        return self.get_fields(request, obj)

    @admin.display(description="state")
    def state(self, row: Any) -> str:
        """Return what it waits for."""
        if row.dead_at is not None:
            return "dead"
        if row.due_for >= 0:
            return "waiting"
        return "scheduled" if row.lease_token is None else "in flight"

    @admin.display(description="stored for")
    def age(self, row: Any) -> str:
        """Return how long ago it was stored."""
        return _duration(float(row.stored_for))

    @admin.display(description="due")
    def due(self, row: Any) -> str:
        """Return how long it has been due, or will not yet be."""
        seconds = float(row.due_for)
        return f"for {_duration(seconds)}" if seconds >= 0 else f"in {_duration(-seconds)}"

    @admin.display(description="body")
    def body(self, row: Any) -> str:
        """Return the beginning of the body as text."""
        return bytes(row.payload)[:_SHOWN].decode("utf-8", "backslashreplace")

    def has_add_permission(self, request: Any) -> bool:
        """Refuse: ``enqueue_event()`` writes events."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Refuse: only relays change rows."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Refuse: an event that waits is not to be deleted; the action purges dead ones."""
        return False

    def has_view_permission(self, request: Any, obj: Any = None) -> bool:
        """Return whether the user may look at rows."""
        return bool(request.user.has_perm("outbox_events.view_storedevent"))

    def has_retry_permission(self, request: Any) -> bool:
        """Return whether the user may make dead rows due again."""
        return bool(request.user.has_perm("outbox_events.change_storedevent"))

    def has_purge_permission(self, request: Any) -> bool:
        """Return whether the user may delete dead rows."""
        return bool(request.user.has_perm("outbox_events.delete_storedevent"))

    @admin.action(description="Publish dead events again", permissions=["retry"])
    def retry(self, request: Any, queryset: QuerySet[Any]) -> Any:
        """Make the selected dead rows due again, once that is confirmed."""
        if "confirmed" not in request.POST:
            return self._confirm(request, queryset, "retry", "Publish {} again?", "Publish again")
        now = RawSQL(NOW[vendor_of(_alias())], [])
        count = _dead(queryset).update(dead_at=None, available_at=now, attempts=0, deliveries=0)
        self.message_user(request, f"{_events(count)} due again.", messages.SUCCESS)
        return None

    @admin.action(description="Delete dead events permanently", permissions=["purge"])
    def purge(self, request: Any, queryset: QuerySet[Any]) -> Any:
        """Delete the selected dead rows, once that is confirmed."""
        if "confirmed" not in request.POST:
            question = "Delete {} permanently? Nothing publishes them later."
            return self._confirm(request, queryset, "purge", question, "Delete")
        count, _ = _dead(queryset).delete()
        self.message_user(request, f"{_events(count)} deleted.", messages.SUCCESS)
        return None

    def _confirm(
        self, request: Any, queryset: QuerySet[Any], action: str, question: str, button: str
    ) -> TemplateResponse | None:
        """Return the page that asks, or None if no dead row is selected."""
        events = list(queryset.filter(dead_at__isnull=False))
        if not events:
            self.message_user(request, "None of these events is dead.", messages.WARNING)
            return None
        context = {
            **self.admin_site.each_context(request),
            "title": button,
            "question": question.format(_events(len(events))),
            "button": button,
            "action": action,
            "events": events,
            "opts": self.model._meta,
            "checkbox_name": ACTION_CHECKBOX_NAME,
        }
        return TemplateResponse(request, "admin/outbox_events/confirm.html", context)


def _alias() -> str:
    return project.current().store or DEFAULT_DB_ALIAS


def _dead(queryset: QuerySet[Any]) -> QuerySet[Any]:
    """Return the dead rows among those selected, without what the list shows besides."""
    numbers = list(queryset.values_list("pk", flat=True))
    return StoredEvent.objects.using(_alias()).filter(pk__in=numbers, dead_at__isnull=False)


def _events(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
