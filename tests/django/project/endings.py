"""The ways in which a unit of work may end in a Django project.

Each is a function of a first number: it places orders with numbers from that one on, each with an
event of the same number, and some of them are rolled back. They run as views, in commands, in
scripts and in tasks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

from outbox.django import aenqueue_event, enqueue_event
from tests.django.shop.models import Order

# Its name before Django 6.1.
savepoint_create = getattr(transaction, "savepoint_create", None) or transaction.savepoint

__all__ = ["ENDINGS", "Ending", "order", "run"]


class Failed(Exception):
    """A unit of work fails on purpose."""


def order(number: int, using: str | None = None) -> None:
    """Place an order: a row, and an event."""
    Order.objects.using(using or "default").create(number=number)
    if using is None:
        enqueue_event({"n": number}, "order.placed")
    else:
        enqueue_event({"n": number}, "order.placed", using=using)


@dataclass(frozen=True)
class Ending:
    """One of the ways.

    Attributes:
        act: the function.
        kept: which of the orders are committed, counted from the first.
        in_request: the same in a view with ATOMIC_REQUESTS; None if it is the same.
        status: the status of the response, if it is a view.
        anywhere: whether it runs outside of requests too.
    """

    act: Callable[[int], Any]
    kept: tuple[int, ...]
    in_request: tuple[int, ...] | None = None
    status: int = 200
    anywhere: bool = True


ENDINGS: dict[str, Ending] = {}


def ending(*kept: int, **options: Any) -> Callable[[Callable[[int], Any]], Callable[[int], Any]]:
    def add(function: Callable[[int], Any]) -> Callable[[int], Any]:
        ENDINGS[function.__name__] = Ending(function, kept, **options)
        return function

    return add


@ending(0, 1)
def commit(n: int) -> None:
    with transaction.atomic():
        order(n)
        order(n + 1)


@ending(0)
def autocommit(n: int) -> None:
    order(n)


@ending(0, in_request=(), status=500)
def exception_after_commit(n: int) -> None:
    with transaction.atomic():
        order(n)
    raise Failed


@ending(status=500)
def exception(n: int) -> None:
    with transaction.atomic():
        order(n)
        raise Failed


@ending(1)
def caught_exception(n: int) -> None:
    with contextlib.suppress(Failed), transaction.atomic():
        order(n)
        raise Failed
    order(n + 1)


@ending(0, 2)
def savepoint_rolled_back(n: int) -> None:
    with transaction.atomic():
        order(n)
        with contextlib.suppress(Failed), transaction.atomic():
            order(n + 1)
            raise Failed
        order(n + 2)


@ending(0, 2)
def savepoint_rolled_back_by_hand(n: int) -> None:
    with transaction.atomic():
        order(n)
        savepoint = savepoint_create()
        order(n + 1)
        transaction.savepoint_rollback(savepoint)
        order(n + 2)


@ending()
def set_rollback(n: int) -> None:
    with transaction.atomic():
        order(n)
        transaction.set_rollback(True)


@ending(0, status=409)
def client_error_with_a_commit(n: int) -> HttpResponse:
    with transaction.atomic():
        order(n)
    return HttpResponse(status=409)


@ending(0, status=503)
def server_error_with_a_commit(n: int) -> HttpResponse:
    order(n)
    return HttpResponse(status=503)


@ending(0, 1, anywhere=False)
def streamed_response(n: int) -> StreamingHttpResponse:
    def body() -> Iterator[bytes]:
        with transaction.atomic():
            order(n + 1)
        yield b"a"
        with contextlib.suppress(Failed), transaction.atomic():
            order(n + 2)
            raise Failed
        yield b"b"
        connection.close()

    order(n)
    return StreamingHttpResponse(body())


@ending(0, 1, anywhere=False)
def task_after_the_response(n: int) -> HttpResponse:
    order(n)
    response = HttpResponse()

    def work() -> None:
        with transaction.atomic():
            order(n + 1)

    response._resource_closers.append(work)
    return response


@ending(0, 2)
def background_thread(n: int) -> None:
    def work() -> None:
        try:
            with transaction.atomic():
                order(n)
            with contextlib.suppress(Failed), transaction.atomic():
                order(n + 1)
                raise Failed
            order(n + 2)
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    if not connection.in_atomic_block:  # or on SQLite it would wait for this transaction
        thread.join()


@ending(1, 2)
def two_databases(n: int) -> None:
    with contextlib.suppress(Failed), transaction.atomic(using="other"):
        order(n, using="other")
        raise Failed
    with transaction.atomic(using="other"):
        order(n + 1, using="other")
    with transaction.atomic(), transaction.atomic(using="other"):
        order(n + 2)


@ending(0, status=500)
def on_commit_of_another_app_raises(n: int) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: 1 // 0)
        order(n)


@ending(0, 1)
def on_commit_enqueues(n: int) -> None:
    with transaction.atomic():
        # With ATOMIC_REQUESTS the transaction of the other database may still be open then.
        transaction.on_commit(lambda: order(n + 1, using="default"))
        order(n)


@ending(1)
def manual_transactions(n: int) -> None:
    transaction.set_autocommit(False)
    try:
        order(n)
        transaction.rollback()
        order(n + 1)
        transaction.commit()
        order(n + 2)
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)


@ending(0, 1, 3, anywhere=False)
async def async_view(n: int) -> None:
    await sync_to_async(commit)(n)
    await sync_to_async(exception_quietly)(n + 2)
    await Order.objects.acreate(number=n + 3)
    await aenqueue_event({"n": n + 3}, "order.placed")


@ending(0, status=500, anywhere=False)
async def async_view_that_fails(n: int) -> None:
    await sync_to_async(order)(n)
    raise Failed


def exception_quietly(n: int) -> None:
    with contextlib.suppress(Failed):
        exception(n)


def run(first: int) -> None:
    """Run each that makes sense outside of a request, with its numbers from ``first`` on."""
    for index, (name, each) in enumerate(ENDINGS.items()):
        if each.anywhere:
            with contextlib.suppress(Failed, ZeroDivisionError):
                each.act(first + 10 * index)
            assert not connection.in_atomic_block, name


def respond(each: Ending, request: HttpRequest, number: int) -> HttpResponse:
    return each.act(number) or HttpResponse()


async def respond_async(each: Ending, request: HttpRequest, number: int) -> HttpResponse:
    return await each.act(number) or HttpResponse()
