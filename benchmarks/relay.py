"""The relay from PostgreSQL to RabbitMQ, compared with hand-written loops.

python -m benchmarks.relay [--rows N] [--check]

One private PostgreSQL and one private RabbitMQ. Each contender starts with the same waiting rows;
afterwards the queue must hold that many events, and the table none. Then: the time of a claim when
the table also has a million dead or scheduled rows; and the time from commit to consumer at a
steady 1,000 events per second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import pika
import psycopg
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.orm import Session

import outbox.sql
from benchmarks.peers import BODY, EXCHANGE, TARGET
from benchmarks.peers.raw_socket import RawSocket
from benchmarks.publish import Broker
from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import Publisher, configure, enqueue_event
from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.sql import Relay, Store
from outbox.testing.broker import PrivateBroker
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.transports.rabbitmq.amqp.encoder import Encoder

_BATCH = 1000
_ONE_BY_ONE = 3000  # rows for the loop with a round trip per row
_STEADY, _SECONDS = 1000, 10

_CLAIM = """
WITH due AS MATERIALIZED (
    SELECT seq FROM outbox_events
    WHERE queue = '' AND rank = 0 AND dead_at IS NULL AND available_at <= statement_timestamp()
    ORDER BY available_at, seq LIMIT %s FOR UPDATE SKIP LOCKED
)
UPDATE outbox_events SET lease_token = 'mine',
    available_at = statement_timestamp() + interval '60 seconds'
FROM due WHERE outbox_events.seq = due.seq
RETURNING outbox_events.seq, id, type, exchange, payload, content_type, occurred_at
"""


def fill(engine: Engine, rows: int) -> None:
    """Fill the table with ``rows`` waiting events."""
    event = Event(id="", target=TARGET, exchange=EXCHANGE, body=BODY)
    values = values_of(event)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE outbox_events"))
        for begin in range(0, rows, 10_000):
            Store(engine).put_rows(
                [
                    {**values, "id": f"01900000-0000-7000-8000-{number:012}"}
                    for number in range(begin, min(rows, begin + 10_000))
                ],
                connection=connection,
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE outbox_events"))


def relay(database: str, broker: str) -> Callable[[], None]:
    """Return a function that runs outbox's relay once."""
    publisher = Publisher(broker, exchange=EXCHANGE)
    publisher.publish([])
    found = Relay(database, publisher)

    def run() -> None:
        found.run_once()

    return run


def by_hand(database: str, broker: str) -> Callable[[], None]:
    """Return a function that loops on psycopg and frames: claim 1,000, send, await acks, delete."""
    connection = psycopg.connect(_address(database))
    channel = RawSocket(broker)

    def run() -> None:
        encode = Encoder().encode
        while True:
            rows = connection.execute(_CLAIM, (_BATCH,)).fetchall()
            connection.commit()
            if not rows:
                return
            channel.send(
                [
                    encode(
                        Event(
                            id=row[1], target=row[2], exchange=row[3], body=row[4],
                            content_type=row[5], occurred_at=row[6],
                        )
                    )
                    for row in rows
                ]
            )  # fmt: skip
            connection.execute(
                "DELETE FROM outbox_events WHERE seq = ANY(%s)", ([row[0] for row in rows],)
            )
            connection.commit()

    return run


def one_by_one(database: str, broker: str) -> Callable[[], None]:
    """Return a function that loops over claims of 100 rows, and publishes and deletes each row."""
    connection = psycopg.connect(_address(database))
    channel = pika.BlockingConnection(pika.URLParameters(f"{broker}?heartbeat=600")).channel()
    channel.confirm_delivery()

    def run() -> None:
        while True:
            rows = connection.execute(_CLAIM, (100,)).fetchall()
            connection.commit()
            if not rows:
                return
            for seq, id, target, exchange, payload, content_type, _ in rows:
                properties = pika.BasicProperties(
                    message_id=id, content_type=content_type, delivery_mode=2
                )
                channel.basic_publish(exchange, target, payload, properties, mandatory=True)
                connection.execute("DELETE FROM outbox_events WHERE seq = %s", (seq,))
                connection.commit()

    return run


def claims(engine: Engine) -> float:
    """Return the slowdown of a claim by a million dead or scheduled rows in the table."""
    store = Store(engine)

    def milliseconds() -> float:
        taken = []
        for _ in range(50):
            store.put([Event(id="1", target=TARGET, exchange=EXCHANGE, body=BODY)] * 100)
            begin = time.perf_counter()
            rows = store.claim(100)
            taken.append(time.perf_counter() - begin)
            if len(rows) != 100:
                raise RuntimeError(f"{len(rows)} rows were claimed, not 100")
            store.complete(rows)
        return statistics.median(taken) * 1000

    with engine.begin() as connection:
        connection.execute(text("TRUNCATE outbox_events"))
    before = milliseconds()
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox_events (id, aggregatetype, aggregateid, type, payload,"
                " exchange, content_type, occurred_at, stored_at, available_at, dead_at, reason)"
                " SELECT n::text, 'a', n::text, 'a.b', 'x', 'bench', 'text/plain', now(), now(),"
                " now() + (n % 2) * interval '1 day', CASE n % 2 WHEN 0 THEN now() END, 'dead'"
                " FROM generate_series(1, 1000000) n"
            )
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE outbox_events"))
    after = milliseconds()
    print(f"claim of 100 rows: {before:.2f} ms; beside 1,000,000 others {after:.2f} ms")
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE outbox_events"))
    return after / before


def consume(broker: str, queue: str, total: int, results: Any) -> None:
    """Consume ``total`` events, and send the time at which each has arrived."""
    arrived: list[tuple[int, float]] = []
    connection = pika.BlockingConnection(pika.URLParameters(f"{broker}?heartbeat=600"))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=1000)
    results.send("ready")
    for method, _, body in channel.consume(queue, inactivity_timeout=10):
        if method is None:
            break
        arrived.append((int(body), time.monotonic()))
        channel.basic_ack(method.delivery_tag)
        if len(arrived) == total:
            break
    results.send(arrived)
    connection.close()


def relay_for_ever(database: str, broker: str) -> None:
    """Run a relay until the process is killed."""
    found = Relay(database, Publisher(broker, exchange=EXCHANGE))
    found.start()
    found.wait()


def latency(database: str, broker: str, queue: str, *, fast_path: bool) -> float:
    """Return the 99th percentile from commit to consumer in ms, at 1,000 events per second."""
    engine = create_engine(database)
    publisher = configure(
        broker, exchange=EXCHANGE, after_commit="publish" if fast_path else "nothing"
    )
    publisher.publish([])
    committed: dict[int, float] = {}
    total = _STEADY * _SECONDS
    # Separate processes, as in production; the monotonic clock is the same for all of them.
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    consumer = processes.Process(target=consume, args=(broker, queue, total, theirs), daemon=True)
    relaying = processes.Process(target=relay_for_ever, args=(database, broker), daemon=True)
    consumer.start()
    relaying.start()
    ours.recv()
    begin = time.monotonic()
    # Ten events per transaction, a hundred transactions per second.
    for number in range(total // 10):
        due = begin + number / (_STEADY / 10)
        time.sleep(max(0.0, due - time.monotonic()))
        with Session(engine) as session:
            for _ in range(10):
                enqueue_event(number, TARGET, session=session)
            session.commit()
        committed[number] = time.monotonic()
    arrived: list[tuple[int, float]] = ours.recv()
    consumer.join(30)
    relaying.kill()
    relaying.join(30)
    outbox.sql.drain()
    engine.dispose()
    if len(arrived) != total:
        raise RuntimeError(f"{len(arrived)} of {total} events arrived")
    # An event may arrive before its commit returns here, hence the max() below.
    steady = [one for one in arrived if one[0] >= _STEADY // 10]  # without the first second
    taken = sorted(max(0.0, at - committed[number]) for number, at in steady)
    found = [taken[int(len(taken) * share)] * 1000 for share in (0.5, 0.99)]
    print(
        f"fast path {'on' if fast_path else 'off'}: commit to consumer "
        f"p50 {found[0]:.1f} ms, p99 {found[1]:.1f} ms"
    )
    return found[1]


def _address(database: str) -> str:
    return make_url(database).set(drivername="postgresql").render_as_string(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="that wait (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    contenders: dict[str, Any] = {
        "outbox relay": relay,
        "by hand, psycopg and frames": by_hand,
        "one by one": one_by_one,
    }
    with PrivateBroker() as server, PrivatePostgreSQL() as postgresql:
        engine = create_engine(postgresql.url)
        Store(engine).create()
        broker = Broker(server.url)
        broker.use("quorum")
        print(machine(broker.version), flush=True)
        runs = {name: make(postgresql.url, server.url) for name, make in contenders.items()}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in runs.items():
                rows = min(options.rows, _ONE_BY_ONE) if name == "one by one" else options.rows
                fill(engine, rows)
                begin = time.perf_counter()
                run()
                rates[name].append(rows / (time.perf_counter() - begin))
                broker.take("quorum", rows)
                if Store(engine).status().queues:
                    raise RuntimeError(f"{name} left rows")
                progress(f"{name}: {rates[name][-1]:,.0f} rows per second")
        rate = {name: median(found) for name, found in rates.items()}
        print(
            table(
                ["PostgreSQL to RabbitMQ", "rows per second"],
                [[name, f"{found:,.0f}"] for name, found in rate.items()],
            )
        )
        ours = rate["outbox relay"]
        progress("claims beside a million rows")
        bounds = [
            Bound("of the loop by hand", ours / rate["by hand, psycopg and frames"], 0.75),
            Bound("of one by one", ours / rate["one by one"], 8),
            Bound("a claim beside a million others", claims(engine), 2, at_most=True),
        ]
        broker.use("quorum")
        for fast_path, bound in ((False, 50), (True, 15)):
            progress(f"latency, fast path {'on' if fast_path else 'off'}")
            found = latency(postgresql.url, server.url, "quorum", fast_path=fast_path)
            what = f"p99 of commit to consumer, fast path {'on' if fast_path else 'off'}, ms"
            bounds.append(Bound(what, found, bound, at_most=True))
        engine.dispose()
    print()
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    raise SystemExit(main())
