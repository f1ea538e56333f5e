"""The tables of outbox as Django models, for reading: ``enqueue_event()`` writes them."""

from __future__ import annotations

from typing import Any

from django.db import models

from outbox.django.moments import MomentField

__all__ = ["ProcessedMessage", "StoredEvent"]


class StoredEvent(models.Model):
    """An event that waits to be published, or is dead.

    A published event is deleted. Only relays and ``manage.py outbox`` change rows.
    """

    seq = models.BigAutoField(primary_key=True)
    id = models.CharField(max_length=255)
    aggregatetype = models.CharField(max_length=255)
    aggregateid = models.CharField(max_length=255)
    target = models.CharField(max_length=255, db_column="type")
    payload = models.BinaryField()
    queue = models.CharField(max_length=255, default="")
    exchange = models.CharField(max_length=255)
    content_type = models.CharField(max_length=255)
    headers = models.TextField(null=True)
    key = models.CharField(max_length=255, null=True)
    priority = models.SmallIntegerField(null=True)
    rank = models.SmallIntegerField(default=0)
    unroutable = models.CharField(max_length=10, null=True)
    occurred_at = MomentField()
    stored_at = MomentField()
    available_at = MomentField()
    lease_token = models.CharField(max_length=36, null=True)
    deliveries = models.IntegerField(default=0)
    attempts = models.IntegerField(default=0)
    dead_at = MomentField(null=True)
    reason = models.TextField(null=True)

    class Meta:  # noqa: D106
        db_table = "outbox_events"
        verbose_name = "stored event"
        ordering = ("seq",)
        default_permissions = ("view", "delete", "change")
        permissions = (("view_body", "Can view the body of a stored event"),)

    def __str__(self) -> str:
        return f"{self.target} {self.id}"

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse: ``enqueue_event()`` writes events."""
        raise TypeError("stored events can't be saved; use enqueue_event()")


class ProcessedMessage(models.Model):
    """A message that a consumer which deduplicates has processed."""

    # Django before 5.2 has no composite keys; nothing writes or deletes through this model.
    consumer = models.CharField(max_length=255, primary_key=True)
    message_id = models.CharField(max_length=255)
    done_at = MomentField()

    class Meta:  # noqa: D106
        db_table = "outbox_inbox"
        verbose_name = "processed message"
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.message_id} of {self.consumer}"

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse: consumers write these rows."""
        raise TypeError("processed messages can't be saved; consumers note them")
