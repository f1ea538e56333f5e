"""The application's data in tests of outbox.django."""

from __future__ import annotations

from django.db import models

__all__ = ["Order"]


class Order(models.Model):
    number = models.IntegerField()

    class Meta:
        app_label = "shop"
