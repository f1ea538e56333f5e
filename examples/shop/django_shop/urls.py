"""The project's URLs."""

from __future__ import annotations

from django.urls import path

from examples.shop.django_shop.views import orders

urlpatterns = [path("orders", orders)]
