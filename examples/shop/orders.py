"""The shop's orders: rows in SQLite, and an event for each."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from outbox import enqueue_event


class PaymentRefused(Exception):
    pass


@contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    """Commit at the end of the ``with`` block, or roll back if it raises."""
    with closing(sqlite3.connect(os.environ.get("SHOP_DATABASE", "shop.db"))) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, item TEXT, amount TEXT)"
        )
        with connection:
            yield connection


def place_order(item: str, amount: str) -> int:
    """Store an order and enqueue its event: both succeed, or neither."""
    with transaction() as connection:
        cursor = connection.execute(
            "INSERT INTO orders (item, amount) VALUES (?, ?)", (item, amount)
        )
        order_id = cursor.lastrowid or 0
        enqueue_event({"order_id": order_id, "item": item, "amount": amount}, "order.placed")
        charge(amount)
    return order_id


def charge(amount: str) -> None:
    if float(amount) > 1000:
        raise PaymentRefused(f"{amount} is more than this card allows")
