"""An application beside outbox."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["ShopConfig"]


class ShopConfig(AppConfig):
    name = "tests.django.shop"
    label = "shop"
    default_auto_field = "django.db.models.BigAutoField"
