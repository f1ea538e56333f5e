"""A worker process that kills itself at a chosen point of a message's life."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from typing import Any

from sqlalchemy import Engine, create_engine, insert, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from outbox import EventCollector, Publisher, enqueue_event, publish, publish_async
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy, Worker
from outbox.consumers.message import message
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import Ack
from outbox.sql import Inbox, inbox
from outbox.transports.database.subscription import DatabaseSubscription
from outbox.transports.rabbitmq.subscription import RabbitMQSubscription
from tests.databases import Effect

__all__ = ["POINTS", "Job", "running"]


@dataclass(frozen=True)
class Job:
    """A job for a worker.

    Attributes:
        url, exchange, queue: the place of its messages; follow-ons go to ``<queue>-next``.
        database: the URL of the database with the effects and the inbox.
        is_async: whether its consumer is a coroutine.
        deduplicate: whether it uses the inbox.
        point: the point at which it kills itself, a key of ``POINTS``; empty for none.
        on_connection: whether its handler uses a connection instead of a session.
    """

    url: str
    exchange: str
    queue: str
    database: str
    is_async: bool
    deduplicate: bool
    point: str
    on_connection: bool = False


@contextmanager
def running(job: Job) -> Iterator[ForkServerProcess]:
    """Run the worker; at the end stop it, and check that it exits cleanly or was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # otherwise each process imports everything again
    stop = context.Event()
    process = context.Process(target=_work, args=(job, stop))
    process.start()
    try:
        yield process
    finally:
        if process.exitcode is None:  # a killed process may have held the event's lock
            stop.set()
        process.join(15)
        if process.is_alive():
            process.kill()
            process.join(5)
    assert process.exitcode in (0, -signal.SIGKILL)


def _work(job: Job, stop: Any) -> None:
    if job.point:
        POINTS[job.point]()
    engine = create_engine(job.database, poolclass=NullPool)
    consumer = _coroutine(job) if job.is_async else _function(job, engine)
    with Publisher(job.url, exchange=job.exchange) as publisher:
        worker = Worker([consumer], publisher=publisher, threads=2, inbox=Inbox(engine))
        worker.start()
        stop.wait()
        assert worker.stop(10)


_RETRY = RetryPolicy(max_attempts=3, delay=0)


def _function(job: Job, engine: Engine) -> type[Consumer]:
    class Plain(Consumer):
        queue = job.queue
        deduplicate = job.deduplicate
        auto_publish = not job.deduplicate
        retry = _RETRY

        def process(self, event: ReceivedEvent) -> None:
            if job.on_connection:
                with engine.begin() as connection:
                    connection.execute(insert(Effect), {"of": event.id})
                    enqueue_event({"of": event.id}, f"{job.queue}-next")
                    _fail_at_first(event)
                    publish()
                return
            with Session(engine) as session:
                session.add(Effect(of=event.id))
                enqueue_event({"of": event.id}, f"{job.queue}-next")
                _fail_at_first(event)
                if job.deduplicate:
                    publish()
                session.commit()

    return Plain


def _coroutine(job: Job) -> type[Consumer]:
    url = make_url(job.database)
    driver = "postgresql+asyncpg" if url.get_backend_name() == "postgresql" else "sqlite+aiosqlite"
    engine = create_async_engine(url.set(drivername=driver), poolclass=NullPool)

    class Asynchronous(Consumer):
        queue = job.queue
        deduplicate = job.deduplicate
        retry = _RETRY

        async def process(self, event: ReceivedEvent) -> None:
            if job.on_connection:
                async with engine.begin() as connection:
                    await connection.execute(insert(Effect), {"of": event.id})
                    enqueue_event({"of": event.id}, f"{job.queue}-next")
                    _fail_at_first(event)
                    await publish_async()
                return
            async with AsyncSession(engine) as session:
                session.add(Effect(of=event.id))
                enqueue_event({"of": event.id}, f"{job.queue}-next")
                _fail_at_first(event)
                await publish_async()
                await session.commit()

    return Asynchronous


def _fail_at_first(event: ReceivedEvent) -> None:
    if event.payload["n"] == 0 and event.attempt == 1:
        raise ValueError("at first")


# ------------------------------------------------------------------------------- where it dies


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            _die()
        return original(*arguments, **options)

    setattr(owner, name, call)


def _after(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if asyncio.iscoroutine(result):
            return _await_and_die(result)
        _die()
        return result

    setattr(owner, name, call)


async def _await_and_die(coroutine: Any) -> Any:
    await coroutine
    _die()


def _is_done(_: Any, outcome: object) -> bool:
    return isinstance(outcome, Ack)


def _when_acked() -> None:
    for subscription in (RabbitMQSubscription, DatabaseSubscription):
        _after(subscription, "ack")  # the transport sends the ack later


def _when_a_copy_is_confirmed() -> None:
    original: Any = Message._send_on

    def send_on(*arguments: Any) -> Any:
        yield next(original(*arguments))  # the step that waits for the confirm
        _die()

    Message._send_on = send_on  # type: ignore[method-assign, assignment]


POINTS: dict[str, Callable[[], None]] = {
    "when it is decoded": lambda: _after(message, "decode"),
    "when the inbox knows nothing of it": lambda: _after(inbox._Entry, "is_done"),
    "when its follow-on is collected": lambda: _after(EventCollector, "enqueue_event"),
    "when what follows from it is on its way": lambda: _after(Publisher, "submit_chunk"),
    "when its follow-on is confirmed": lambda: _before(inbox._Entry, "add_to"),
    "when its note is in the transaction": lambda: _after(inbox._Entry, "add_to"),
    "right after its commit": lambda: _before(inbox._Entry, "note"),
    "when it is done": lambda: _before(Message, "settle", _is_done),
    "when it is acked": _when_acked,
    "when its copy for a retry is made": lambda: _after(message, "retry_copy"),
    "when its copy for a retry is confirmed": _when_a_copy_is_confirmed,
}
