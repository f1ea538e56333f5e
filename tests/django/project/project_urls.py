"""The project's URLs: each ending as a view."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.urls import path

from tests.django.project.endings import ENDINGS, Ending, respond, respond_async


def view_of(name: str, ending: Ending) -> Any:
    if name.startswith("async"):

        async def async_view(request: Any, number: int) -> Any:
            return await respond_async(ending, request, number)

        # Django has no transactions on an event loop.
        return non_atomic(async_view)

    def view(request: Any, number: int) -> Any:
        return respond(ending, request, number)

    return non_atomic(view) if name == "manual_transactions" else view


def non_atomic(view: Any) -> Any:
    for alias in ("default", "other"):
        view = transaction.non_atomic_requests(alias)(view)
    return view


urlpatterns = [
    path(f"{name}/<int:number>", view_of(name, ending)) for name, ending in ENDINGS.items()
]
