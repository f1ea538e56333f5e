"""Commits of SERIALIZABLE transactions beside a relay: nothing is published twice.

python -m proving.bounds.serializable [commits]
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from typing import Any, cast

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import configure, enqueue_event
from outbox.sql import Relay, Store, drain
from outbox.testing.databases.postgresql import PrivatePostgreSQL

__all__: list[str] = []

_THREADS = 6
_ARRIVE = 30.0  # seconds at most


def _stored(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM outbox_events")).scalar_one())


def main() -> None:
    """Commit, and print what became of the events."""
    commits = int(sys.argv[1]) if len(sys.argv) > 1 else 900
    logging.getLogger("outbox").setLevel(logging.ERROR)
    publisher = configure("memory://")
    committed: list[str] = []
    failed: list[DBAPIError] = []
    began = time.monotonic()
    with PrivatePostgreSQL() as server:
        engine = create_engine(server.url, isolation_level="SERIALIZABLE", pool_size=20)
        store = Store(engine)
        store.create()
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE orders (id text PRIMARY KEY)"))

        def place_orders(thread: int) -> None:
            for number in range(commits // _THREADS):
                name = f"{thread}-{number}"
                with Session(engine) as session:
                    session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": name})
                    enqueue_event({}, "order.placed", session=session, id=name)
                    try:
                        session.commit()
                    except DBAPIError as error:
                        failed.append(error)
                    else:
                        committed.append(name)

        relay = Relay(engine, publisher)
        relay.start()
        threads = [threading.Thread(target=place_orders, args=(each,)) for each in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        drain(10)
        deadline = time.monotonic() + _ARRIVE
        while _stored(engine) and time.monotonic() < deadline:
            time.sleep(0.1)
        relay.stop(10)
        engine.dispose()
    published = Counter(event.id for event in cast("Any", publisher)._own.published)
    lost = set(committed) - published.keys()
    twice = sum(times > 1 for times in published.values())
    print(
        f"{len(committed)} SERIALIZABLE commits beside a relay, {time.monotonic() - began:.1f} s: "
        f"{len(failed)} failed, {len(lost)} lost, {twice} published twice"
    )
    sys.exit(1 if lost or twice else 0)


if __name__ == "__main__":
    main()
