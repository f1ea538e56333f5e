"""``OutboxMiddleware`` with ``STORE = None``, in synchronous and asynchronous requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

import outbox.sql
from outbox import enqueue_event
from tests.amqp import Inspector

OUTBOX = "outbox.django.OutboxMiddleware"


def enqueue(number: int) -> None:
    enqueue_event({"n": number}, "order.placed")


def sync_view(request: HttpRequest, status: int) -> HttpResponse:
    enqueue(1)
    with transaction.atomic():
        enqueue(2)
    if status == 500:
        raise KeyError
    return HttpResponse(status=status)


def in_transaction() -> None:
    with transaction.atomic():
        enqueue(2)


async def async_view(request: HttpRequest, status: int) -> HttpResponse:
    enqueue(1)
    await sync_to_async(in_transaction)()
    if status == 500:
        raise KeyError
    return HttpResponse(status=status)


urlpatterns = [path("sync/<int:status>", sync_view), path("async/<int:status>", async_view)]


@pytest.fixture
def queue(
    databases: str, amqp_url: str, inspector: Inspector, name: str, outbox_setting: Any
) -> Iterator[str]:
    outbox_setting(URL=amqp_url, EXCHANGE=name, STORE=None)
    with override_settings(
        ROOT_URLCONF=__name__, MIDDLEWARE=[OUTBOX], ALLOWED_HOSTS=["testserver"], DEBUG=False
    ):
        yield inspector.queue(f"{name}.all", name)
    outbox.sql.drain()


def get_sync(url: str) -> int:
    return int(Client(raise_request_exception=False).get(url).status_code)


def get_async(url: str) -> int:
    async def get() -> int:
        return int((await AsyncClient(raise_request_exception=False).get(url)).status_code)

    return asyncio.run(get())


@pytest.mark.parametrize("get", [get_sync, get_async])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_request_that_fails_drops_what_was_enqueued_outside_of_a_transaction(
    queue: str, inspector: Inspector, get: Callable[[str], int], kind: str, status: int
) -> None:
    assert get(f"/{kind}/{status}") == status
    found = sorted(
        each.payload["n"] for each in inspector.messages(queue, 1 if status > 200 else 2)
    )
    found += [each.payload["n"] for each in inspector.all(queue)]
    assert found == ([1, 2] if status == 200 else [2])
