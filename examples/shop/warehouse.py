"""The shop's warehouse: consumers that fail, wait, and use a database."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from decimal import Decimal

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

import outbox.sql
from outbox import enqueue_event, publish, publish_async
from outbox.consumers import Consumer, ReceivedEvent, Reject, RetryPolicy, consumer

Session = scoped_session(sessionmaker())


def connect(database: Engine | Connection) -> None:
    """Use ``database``; the application calls this when it starts."""
    Session.configure(bind=database)
    outbox.sql.bind(Session)


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"

    item: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Reservations(Consumer):
    """Takes what was ordered from the stock, once for each order."""

    queue = "warehouse.reservations"
    topics = ("order.placed",)
    deduplicate = True

    def process(self, event: ReceivedEvent) -> None:
        product = Session.get(Product, event.payload["item"])
        if product is None:
            raise Reject(f"there is no product {event.payload['item']!r}")
        product.left -= 1
        Session.commit()


class Parcels(Consumer):
    """Books a parcel for each invoice; the carrier is often away."""

    queue = "warehouse.parcels"
    topics = ("invoice.sent",)
    retry = RetryPolicy(max_attempts=3, delay=60)
    timeout = 10.0

    def process(self, event: ReceivedEvent) -> None:
        number, postage = book_parcel(event.payload["order_id"])
        enqueue_event(
            {
                "number": number,
                "order_id": event.payload["order_id"],
                "postage": postage,
                "booked_on": datetime.datetime.now(datetime.UTC).date(),
            },
            "parcel.booked",
        )
        publish()


def book_parcel(order_id: int) -> tuple[uuid.UUID, Decimal]:
    """Ask the carrier for a parcel's number and postage; raise ConnectionError if it is away."""
    return uuid.uuid4(), Decimal("4.90")


@consumer("warehouse.tracking", topics=["parcel.booked"], timeout=2.0)
async def tracking(event: ReceivedEvent) -> None:
    """Follow a parcel until it is delivered."""
    await wait_for_delivery(event.payload["number"])
    enqueue_event({"order_id": event.payload["order_id"]}, "parcel.delivered")
    await publish_async()


async def wait_for_delivery(number: str) -> None:
    await asyncio.sleep(0)
