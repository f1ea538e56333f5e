"""The shop's orders."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    item = models.CharField(max_length=100)
    amount = models.CharField(max_length=20)
