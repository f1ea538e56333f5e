"""A module of tasks, as applications write them: functions, methods of models, class methods."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import threading
import uuid
from subprocess import run
from typing import Any, NamedTuple

from sqlalchemy import Dialect, ForeignKey, String, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Reject, RetryPolicy, around
from outbox.tasks import TaskRun, current_task, task

__all__ = [
    "Audited",
    "Base",
    "Box",
    "Colour",
    "Customer",
    "Newsletter",
    "Order",
    "Parcel",
    "Serial",
    "Special",
    "audited",
    "carry",
    "doubtful",
    "fails",
    "follow",
    "greet",
    "keep",
    "log",
    "loose",
    "plain",
    "run",
    "slow",
    "wait",
    "weigh",
]

log: list[Any] = []
"""What the tasks have noted."""
runs: list[TaskRun | None] = []


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str]


class Order(Base):
    __tablename__ = "orders"
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_on": "kind",
        "polymorphic_identity": "order",
    }

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(default="order")
    state: Mapped[str] = mapped_column(default="new")
    customer_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("customers.id"))

    def ship(self, customer: Customer | None = None, *, fast: bool = False) -> None:
        self.state = "shipped"
        log.append((type(self).__name__, self.id, customer and customer.name, fast))

    def lose(self) -> None:
        self.state = "lost"
        raise LookupError("lost")

    def announce(self) -> None:
        self.state = "announced"
        enqueue_event({"order": self.id}, "order.announced")

    async def ship_async(self) -> None:
        await asyncio.sleep(0)
        log.append(("async", self.id))

    def _secret(self) -> None:
        log.append("secret")

    @property
    def is_open(self) -> bool:
        return self.state == "new"


class Special(Order):
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_identity": "special"
    }

    def ship(self, customer: Customer | None = None, *, fast: bool = False) -> None:
        super().ship(customer, fast=True)


class GUID(TypeDecorator[uuid.UUID]):
    """A UUID as text in the database, which takes nothing but UUIDs."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: uuid.UUID | None, dialect: Dialect) -> str | None:
        return None if value is None else value.hex

    def process_result_value(self, value: str | None, dialect: Dialect) -> uuid.UUID | None:
        return None if value is None else uuid.UUID(value)


class Serial(NamedTuple):
    place: str
    number: int


class SerialText(TypeDecorator[Serial]):
    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: Serial | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.place}-{value.number}"

    def process_result_value(self, value: str | None, dialect: Dialect) -> Serial | None:
        if value is None:
            return None
        place, number = value.split("-")
        return Serial(place, int(number))


class Parcel(Base):
    __tablename__ = "parcels"

    id: Mapped[uuid.UUID] = mapped_column(GUID, primary_key=True)
    serial: Mapped[Serial] = mapped_column(SerialText, primary_key=True)
    state: Mapped[str]

    def send(self) -> None:
        log.append(("sent", self.id, self.serial))


class Newsletter:
    @classmethod
    def deliver_all(cls, at: str, delay: int = 0) -> None:
        log.append((cls.__name__, at, delay))

    @staticmethod
    def render(text: str) -> str:
        log.append(text)
        return text

    def personal(self) -> None:
        """Belong to an object that no worker could find."""


class Weekly(Newsletter):
    pass


class Colour(enum.Enum):
    RED = (255, 0, 0)
    BLUE = (0, 0, 255)


@dataclasses.dataclass
class Box:
    weight: decimal.Decimal
    packed: datetime.datetime
    inner: Box | None = None


@task
def greet(number: int, text: str = "hello") -> str:
    log.append((number, text))
    runs.append(current_task())
    return text


@task
def carry(
    day: datetime.date,
    boxes: list[Box],
    colour: Colour = Colour.RED,
    *rest: datetime.timedelta,
    tags: frozenset[str] | None = None,
    by_number: dict[int, tuple[str, bytes]] | None = None,
) -> None:
    log.append((day, boxes, colour, rest, tags, by_number))


@task
def weigh(order: Order, gram: int) -> None:
    log.append((order.id, gram))


def plain(number: int) -> None:
    log.append(("plain", number))


def loose(value, other=None):  # type: ignore[no-untyped-def]
    log.append((value, other))


@task
def doubtful(value: str | datetime.date) -> None:
    log.append(value)


@task(name="shipping.keep", aliases=["old.module:keep"], priority=7)
def keep(number: int) -> None:
    log.append(("keep", number))


@task
async def wait(number: int) -> None:
    await asyncio.sleep(0.01)
    log.append(("waited", number, threading.current_thread().name, current_task()))


@task(retry=RetryPolicy(max_attempts=2, delay=0.01))
def fails(kind: str) -> None:
    run_here = current_task()
    log.append((kind, run_here and run_here.attempt))
    if kind == "reject":
        raise Reject("not wanted")
    raise LookupError(kind)


@task(timeout=0.1)
async def slow() -> None:
    await asyncio.sleep(30)


@task
def follow(number: int) -> None:
    greet.later(number)


class Audited(Consumer):
    @around
    def note(self, event: ReceivedEvent) -> Any:
        here = current_task()
        log.append(("before", here and here.name, event.task))
        yield
        log.append("after")

    def on_success(self, event: ReceivedEvent) -> None:
        here = current_task()
        log.append(("succeeded", here and here.id == event.id))

    def on_dead(self, event: ReceivedEvent, reason: str) -> None:
        log.append(("dead", reason))


@task(consumer=Audited)
def audited(fails: bool) -> None:
    log.append("running")
    if fails:
        raise ValueError("no")
