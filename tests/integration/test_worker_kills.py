"""A worker is killed at every point of a message's life."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import outbox.sql
from outbox.messages.delivery import dead_letter_queue
from tests.databases import Base, Effect
from tests.mortal import POINTS, Job, running
from tests.places import Place, SQLitePlace, events_for, made, reading
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

MESSAGES = 3
OF_A_TRANSACTION = ("when its note is in the transaction", "right after its commit")
WITHOUT_INBOX = (
    "when what follows from it is on its way",
    "when its copy for a retry is confirmed",
)


@pytest.fixture
def database(place: Place, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file for what comes over a file, a server for what comes over one."""
    if isinstance(place, SQLitePlace):
        return f"sqlite:///{tmp_path}/shop.db"
    found: str = request.getfixturevalue("postgresql_url")
    return found


@pytest.fixture
def engine(database: str) -> Engine:
    engine = create_engine(database, poolclass=NullPool)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    return engine


def let_leases_end(place: Place) -> None:
    if isinstance(place, SQLitePlace):
        place.execute("UPDATE outbox_events SET available_at = 0 WHERE lease_token IS NOT NULL")


def effects(engine: Engine) -> dict[str, int]:
    with Session(engine) as session:
        found = session.execute(select(Effect.of, func.count()).group_by(Effect.of))
        return {row[0]: row[1] for row in found}


@pytest.mark.hazard("B11", "G1", "G8")
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("point", "deduplicate", "on_connection"),
    [
        *((point, True, False) for point in POINTS),
        *((point, True, True) for point in OF_A_TRANSACTION),
        *((point, False, False) for point in WITHOUT_INBOX),
    ],
)
def test_a_message_whose_worker_is_killed_is_handled_and_with_the_inbox_only_once(
    place: Place, database: str, engine: Engine, name: str, is_async: bool,
    point: str, deduplicate: bool, on_connection: bool,
) -> None:  # fmt: skip
    job = Job(
        place.url, place.exchange, made(place, name), database, is_async, deduplicate, point,
        on_connection,
    )  # fmt: skip
    next_queue = made(place, f"{name}-all", f"{name}-next")
    with place.publisher() as publisher:
        sent = events_for(publisher, [name] * MESSAGES, exchange="")
        assert publisher.publish(sent).ok
    ids = {event.id for event in sent}
    with running(job) as first:
        first.join(20)
        assert first.exitcode == -signal.SIGKILL
    let_leases_end(place)
    for _ in range(1 if deduplicate else 3):
        with running(dataclasses.replace(job, point="")):
            wait_until(lambda: effects(engine).keys() == ids, 20)
            wait_until(lambda: place.count(name) == 0)
        if place.count(name) == 0:
            break  # else the stop came before a copy for a retry, which is one message more
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0  # nor given back
    counts = effects(engine)
    if deduplicate:
        assert set(counts.values()) == {1}
        with engine.connect() as connection:
            found = connection.scalars(text("SELECT message_id FROM outbox_inbox"))
            assert set(found) == ids
    count = place.count(next_queue)  # what a reader has been given is no longer counted
    with reading(place, next_queue, again=True) as reader:
        follow_ons = reader.get(count)
    assert len(follow_ons) >= MESSAGES
    assert len({one.message_id for one in follow_ons}) == MESSAGES
