"""The application's data in tests of outbox.django."""

from __future__ import annotations

import uuid
from typing import Any

import django
from django.db import connections, models

from outbox import enqueue_event

__all__ = ["Order", "Parcel", "Visible", "label", "noted"]

noted: list[Any] = []
"""What methods that were called later have noted."""


class Order(models.Model):
    number = models.IntegerField()

    class Meta:
        app_label = "shop"

    def ship(self, parcel: Parcel | None = None, *, fast: bool = False) -> None:
        self.number += 1
        self.save()
        enqueue_event({}, "order.shipped", using=self._state.db)
        in_atomic = connections[self._state.db].in_atomic_block
        noted.append((self.pk, self._state.db, in_atomic, parcel and parcel.pk, fast))

    def count_up(self, kind: str) -> Any:
        self.number += 1
        self.save()
        return self.number if kind == "number" else object()

    def lose(self) -> None:
        self.number = -1
        self.save()
        raise LookupError("lost")

    async def wait(self, other: Order) -> None:
        self.number = other.number
        await self.asave()
        noted.append((self.pk, other.pk))


class Visible(models.Manager):
    def get_queryset(self) -> Any:
        return super().get_queryset().filter(hidden=False)


class Parcel(models.Model):
    """A row whose key is there before the row is, and that its manager may hide."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    hidden = models.BooleanField(default=False)
    objects = Visible()

    class Meta:
        app_label = "shop"

    def send(self) -> None:
        noted.append(self.id)


def label(parcel, text):  # type: ignore[no-untyped-def]  # as applications write them
    noted.append((parcel.pk, text))
    return f"{text} {parcel.pk}"


if django.VERSION >= (5, 2):
    __all__ += ["Line"]

    class Line(models.Model):
        pk = models.CompositePrimaryKey("order_id", "day")
        order = models.ForeignKey(Order, models.CASCADE, db_constraint=False)
        day = models.DateField()

        class Meta:
            app_label = "shop"

        def count(self) -> None:
            noted.append(self.pk)
