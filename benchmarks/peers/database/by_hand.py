"""psycopg alone, on outbox's table: what a loop without any library gets from the server."""

from __future__ import annotations

import time

import psycopg
from sqlalchemy import make_url

from benchmarks.peers import BODY, EXCHANGE
from benchmarks.peers.consuming import QUEUE
from outbox import Event
from outbox.messages.rows import values_of

_BATCH = 100

_CLAIM = """
    WITH due AS MATERIALIZED (
        SELECT seq FROM outbox_events
        WHERE queue = %s AND rank = 0 AND dead_at IS NULL
        AND available_at <= statement_timestamp()
        ORDER BY available_at, seq LIMIT %s FOR UPDATE SKIP LOCKED
    )
    UPDATE outbox_events SET available_at = statement_timestamp() + interval '60 seconds',
    lease_token = %s, deliveries = deliveries + 1
    FROM due WHERE outbox_events.seq = due.seq
    RETURNING outbox_events.*
"""


def publish(url: str, chunk: int, count: int) -> float:
    event = Event(id="1", target=QUEUE, exchange=EXCHANGE, body=BODY)
    row = values_of(event, queue=QUEUE)
    names = list(row)
    statement = (
        f"INSERT INTO outbox_events ({', '.join(names)}, stored_at, available_at) VALUES "
        f"({', '.join(['%s'] * len(names))}, statement_timestamp(), statement_timestamp())"
    )
    rows = [tuple(row.values())] * chunk
    with _connect(url) as connection, connection.cursor() as cursor:
        begin = time.perf_counter()
        for _ in range(count // chunk):
            cursor.executemany(statement, rows)
            connection.commit()
        return count / (time.perf_counter() - begin)


def consume(url: str, count: int) -> float:
    publish(url, 1000, count)
    handled = 0
    with _connect(url) as connection, connection.cursor() as cursor:
        begin = time.perf_counter()
        while handled < count:
            cursor.execute("SET LOCAL synchronous_commit TO OFF")
            rows = cursor.execute(_CLAIM, (QUEUE, _BATCH, "token")).fetchall()
            connection.commit()
            cursor.execute("SET LOCAL synchronous_commit TO OFF")
            cursor.execute(
                "DELETE FROM outbox_events WHERE seq = ANY(%s)", ([row[0] for row in rows],)
            )
            connection.commit()
            handled += len(rows)
        return count / (time.perf_counter() - begin)


def _connect(url: str) -> psycopg.Connection:
    return psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string())
