"""The store of events, on PostgreSQL, MariaDB and SQLite."""

from __future__ import annotations

import dataclasses
import datetime
import os
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    Engine,
    create_engine,
    create_mock_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import UsageError, configure, enqueue_event
from outbox.event import Event, make_event
from outbox.messages.rows import headers_of, values_of
from outbox.serializer import JSONSerializer
from outbox.sql import Store, metadata_of
from outbox.storage import store as module
from outbox.storage.creating import ddl
from outbox.storage.engines import open_engine, open_sqlite
from outbox.storage.schema import events, events_with_grace
from outbox.storage.store import Claimed
from tests.relaying import opened


def an_event(payload: Any = None, target: str = "order.placed", **options: Any) -> Event:
    return make_event(JSONSerializer(), 1 << 24, None, payload, target, "shop", **options)


def payloads(rows: list[Claimed]) -> list[Any]:
    return [row.event.payload for row in rows]


def wait_until_due(store: Store) -> None:
    """Make every row due that isn't dead, as time would."""
    with store.engine.begin() as connection:
        connection.execute(
            events.update()
            .where(events.c.dead_at.is_(None))
            .values(available_at=datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1))
        )


def test_an_event_is_read_as_it_was_stored(store: Store) -> None:
    headers = {"n": 1, "b": b"\xff", "s": "\u20ac", "x": None, "t": {"l": [True, {"b": b""}]}}
    stored = an_event(
        {"a": [1, "\u20ac"]}, key="k", priority=7, headers=headers, unroutable="ignore", id="me"
    )
    store.put([stored])
    [claimed] = store.claim(10)
    assert claimed.event == stored
    assert (claimed.deliveries, claimed.attempts, claimed.queue) == (1, 0, "")


names = st.text(max_size=60)  # 255 bytes at the most
tables = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(names | st.sampled_from(["$bytes", "$table"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(names, tables, max_size=4))
def test_any_headers_are_restored_from_a_row(headers: dict[str, Any]) -> None:
    stored = Event(id="1", target="t", exchange="", body=b"", headers=headers)
    text = values_of(stored)["headers"]
    assert (headers_of(text) if text else {}) == headers


def test_rows_are_claimed_in_the_order_in_which_they_were_stored(store: Store) -> None:
    for chunk in range(3):
        store.put([an_event([chunk, n]) for n in range(4)])
    assert payloads(store.claim(5)) == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    assert payloads(store.claim(100)) == [[1, 1], [1, 2], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert store.claim(100) == []


def test_scheduled_and_unscheduled_events_of_one_chunk_are_all_stored(store: Store) -> None:
    store.put([an_event(1), an_event(2, delay=3600), an_event(3)])
    assert payloads(store.claim(10)) == [1, 3]
    assert store.status().scheduled == 1


@pytest.mark.hazard("F14")
def test_a_leased_row_cannot_be_claimed_until_its_lease_ends(store: Store) -> None:
    store.put([an_event(1)])
    [mine] = store.claim(1, lease=60)
    assert store.claim(1) == []
    wait_until_due(store)
    [theirs] = store.claim(1)
    assert theirs.deliveries == 2
    assert store.complete([mine]) == store.release([mine]) == store.bury([mine], "no") == 0
    assert store.extend([mine], 60) == 0
    assert store.complete([theirs]) == 1


def test_a_lease_can_be_extended(store: Store) -> None:
    store.put([an_event(1)])
    rows = store.claim(1, lease=0.0)
    assert store.extend(rows, 60) == 1
    assert store.claim(1) == []


def test_a_released_row_is_due_after_its_delay_and_only_failures_count_as_attempts(
    store: Store,
) -> None:
    store.put([an_event(1), an_event(2)])
    first, second = store.claim(2)
    assert store.release([first], reason="the broker was away") == 1
    assert store.release([second], 3600, failed=True) == 1
    [again] = store.claim(2)
    assert (again.event.payload, again.attempts, again.deliveries) == (1, 0, 2)
    wait_until_due(store)
    assert [(row.event.payload, row.attempts) for row in store.claim(2)] == [(1, 0), (2, 1)]


def test_a_buried_row_is_never_claimed_and_can_be_revived(store: Store) -> None:
    store.put([an_event(1, id="a"), an_event(2, id="b"), an_event(3, "other", id="c")])
    store.bury(store.claim(3), "too large for the broker")
    wait_until_due(store)
    assert store.claim(3) == []
    assert store.status().dead == {"too large for the broker": 3}
    assert [row[1] for row in store.dead()] == ["a", "b", "c"]
    assert [row[1] for row in store.dead(ids=["b"])] == ["b"]
    assert [row[1] for row in store.dead(target="other")] == ["c"]
    assert len(store.dead(reason="large", limit=2)) == 2
    assert store.dead(reason="%") == []
    [found] = store.dead(ids=["a"])
    assert store.retry([found[0]]) == 1
    [alive] = store.claim(3)
    assert (alive.event.id, alive.attempts, alive.deliveries) == ("a", 0, 1)
    assert store.purge([row[0] for row in store.dead()]) == 2
    assert store.purge([alive.seq]) == 0
    assert store.dead() == []


@pytest.mark.hazard("F23")
def test_the_bytes_of_a_claim_are_bounded_and_one_row_always_fits(store: Store) -> None:
    store.put([an_event("x" * 1000) for _ in range(10)])
    assert len(store.claim(10, max_bytes=2500)) == 3
    assert len(store.claim(10, max_bytes=1)) == 1


def test_higher_ranks_of_a_queue_are_claimed_first_and_queues_do_not_mix(store: Store) -> None:
    store.put([an_event("relay")])
    store.put_rows([values_of(an_event(n), queue="q", rank=n % 3) for n in range(6)])
    assert payloads(store.claim(3, queue="q")) == [2, 5, 1]
    assert store.status().queues == {"": 1, "q": 6}
    assert payloads(store.claim(10)) == ["relay"]


def test_named_rows_are_claimed_by_number_and_id_and_not_before_they_are_due(store: Store) -> None:
    with store.engine.begin() as connection:
        rows = [values_of(an_event(n)) for n in range(4)]
        connection.execute(insert(events_with_grace), rows)
    store.put([an_event("tomorrow", delay=86400)])
    with store.engine.connect() as connection:
        found = connection.execute(select(events.c.seq, events.c.id).order_by(events.c.seq)).all()
    ids = {row.seq: row.id for row in found}
    a, b, c, d, tomorrow = ids
    assert store.claim(10) == []  # for relays they are not due yet
    # As in another schema, which has the same numbers.
    assert store.claim(10, only={a: "another", tomorrow: ids[tomorrow]}) == []
    assert store.claim(10, only={a: ids[b], b: ids[a]}) == []
    claimed = store.claim(10, only={number: ids[number] for number in (a, b)})
    assert payloads(claimed) == [0, 1]
    assert store.claim(10, only={number: ids[number] for number in (a, b)}) == []
    store.release(claimed, 30, reason="nacked", failed=True)
    assert payloads(store.claim(10, only=ids)) == [2, 3]  # the others are backing off
    assert store.alive({**ids, d: "another"}) == {a, b, c, tomorrow}


@pytest.mark.hazard("F14")
def test_rows_of_a_key_are_claimed_only_from_its_first_row_on(store: Store) -> None:
    store.put([an_event(n, key="ab"[n % 2]) for n in range(8)])
    first = store.claim(5, ordered=True)
    assert payloads(first) == [0, 1, 2, 4, 6]  # the first of each key, and all behind one of them
    assert store.claim(10, ordered=True) == []
    store.complete(first[:1])
    store.release(first[1:], 3600)
    assert store.claim(10, ordered=True) == []
    wait_until_due(store)
    assert payloads(store.claim(10, ordered=True)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_scheduled_event_takes_its_place_in_its_key_only_when_its_time_has_come(
    store: Store,
) -> None:
    store.put([an_event(1, key="k"), an_event("later", key="k", delay=3600), an_event(3, key="k")])
    rows = store.claim(10, ordered=True)
    assert payloads(rows) == [1, 3]
    store.release(rows)
    wait_until_due(store)
    rows = store.claim(10, ordered=True)
    assert payloads(rows) == [1, "later", 3]
    store.complete(rows[:1])
    store.release(rows[1:], 3600, failed=True)  # now its time has come, and others wait for it
    store.put([an_event(4, key="k")])
    assert store.claim(10, ordered=True) == []


def test_a_scheduled_event_does_not_hold_up_those_that_are_chosen(store: Store) -> None:
    store.put([an_event("later", key="k", delay=3600), an_event(2, key="k"), an_event(3, key="k")])
    with store.engine.connect() as connection:
        rows = connection.execute(events.select().order_by(events.c.seq)).all()
    only = {row.seq: row.id for row in rows[1:]}
    assert payloads(store.claim(10, only=only, ordered=True)) == [2, 3]


def test_an_event_in_its_grace_period_keeps_its_place_in_its_key(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(insert(events_with_grace), values_of(an_event(1, key="k")))
    store.put([an_event(2, key="k")])
    assert store.claim(10, ordered=True) == []
    wait_until_due(store)
    assert payloads(store.claim(10, ordered=True)) == [1, 2]


@pytest.mark.parametrize("keys", [1, 200])
@pytest.mark.slow
def test_an_ordered_claim_takes_no_longer_however_many_rows_wait_behind_their_keys(
    store: Store, keys: int
) -> None:
    def seconds_behind(count: int) -> float:
        store.put([an_event(n, key=f"k{n % keys}") for n in range(count)])
        analyze = {"postgresql": "ANALYZE outbox_events", "mariadb": "ANALYZE TABLE outbox_events"}
        if store.engine.dialect.name in analyze:  # as the server does by itself, a bit later
            with store.engine.begin() as connection:
                connection.execute(text(analyze[store.engine.dialect.name]))
        seconds: list[float] = []
        for _ in range(7):
            store.put([an_event("free"), an_event("free", key="free")])
            began = time.perf_counter()
            rows = store.claim(20, ordered=True)
            seconds.append(time.perf_counter() - began)
            assert payloads(rows) == ["free", "free"]
            store.complete(rows)
        return min(seconds)

    store.put([an_event("head", key=f"k{n}") for n in range(keys)])
    while len(store.claim(keys, ordered=True)):  # from here on nothing of these keys is free
        pass
    few = seconds_behind(600)
    assert seconds_behind(30_000) < 4 * few + 0.005


def test_an_ordered_claim_finds_the_one_free_key_among_many(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", 10)
    store.put([an_event(n, key=f"k{n:02}") for n in range(60)])
    store.put([an_event(n, key=f"k{n % 60:02}") for n in range(60, 600)])
    held = store.claim(60, ordered=True)
    assert len(held) == 60
    for free in (57, 3, 30, 30):
        [row] = [row for row in held if row.event.key == f"k{free:02}"]
        store.release([row], in_place=True)
        found = store.claim(1, ordered=True)
        assert [row.event.key for row in found] == [f"k{free:02}"]
        held = [row for row in held if row.seq != found[0].seq] + found
        assert store.claim(1, ordered=True) == []


@pytest.mark.parametrize("queue", ["", "q"])
def test_rows_without_a_key_are_found_behind_a_waiting_key_also_when_they_are_tried_again(
    store: Store, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim() -> list[Claimed]:
        # One row of each key is what consumers ask for, the relay takes more.
        return store.claim(5, queue=queue, ordered=not queue, one_a_key=bool(queue))

    monkeypatch.setattr(module, "_WINDOW", 10)
    monkeypatch.setattr(module, "_PASSED", 10)
    store.put_rows([values_of(an_event(n, key="stuck"), queue=queue) for n in range(100)])
    store.release(store.claim(1, queue=queue), 3600)
    store.put_rows([values_of(an_event("new"), queue=queue)])
    [new] = claim()
    assert new.event.payload == "new"
    store.release([new])
    [again] = claim()
    assert again.event.payload == "new"
    assert claim() == []
    store.release([again], in_place=True)
    if store.engine.dialect.name != "mariadb":  # where an index has them all
        assert claim() == []  # a moment ago the whole backlog was searched
    store._pass_again_at = 0.0
    assert payloads(claim()) == ["new"]


def test_the_search_for_rows_without_a_key_goes_on_with_the_next_claim(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.engine.dialect.name == "mariadb":
        pytest.skip("an index has them all")
    monkeypatch.setattr(module, "_WINDOW", 10)
    monkeypatch.setattr(module, "_PASSED", 10)
    monkeypatch.setattr(module, "_SEARCH", 0.0)
    rows = [values_of(an_event(n, key="stuck"), queue="q") for n in range(100)]
    store.put_rows(rows)  # all of them due at one time
    store.release(store.claim(1, queue="q"), 3600)
    store.put_rows([values_of(an_event(n), queue="q") for n in range(3)])
    claims = [store.claim(5, queue="q", one_a_key=True) for _ in range(24)]
    found = [row.event.payload for claimed in claims for row in claimed]
    assert found == [0, 1, 2]
    assert claims[:5] == [[]] * 5


def test_two_claims_of_one_key_leave_no_gap_in_what_either_takes(postgresql_url: str) -> None:
    mine, theirs = opened(postgresql_url), opened(postgresql_url)
    mine.put([an_event("soon", key="k", delay=2), *(an_event(n, key="k") for n in range(5))])
    found: list[Claimed] = []

    @event.listens_for(mine.engine, "before_cursor_execute")
    def claim_meanwhile(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "behind" not in statement:
            return
        while theirs.status().waiting != 6:  # until the first event of the key is due
            time.sleep(0.05)
        found.extend(theirs.claim(10, ordered=True))

    rows = mine.claim(10, ordered=True)
    assert payloads(found) == ["soon"]
    assert payloads(rows) == [0, 1, 2, 3, 4]
    for store in (mine, theirs):
        store.engine.dispose()


def test_rows_behind_a_waiting_key_are_still_claimed_for_other_keys(store: Store) -> None:
    store.put([an_event(0, key="stuck")])
    store.release(store.claim(1), 3600)
    store.put([an_event(n, key="stuck") for n in range(1, 50)] + [an_event("flows", key="b")])
    assert payloads(store.claim(2, ordered=True)) == ["flows"]


@pytest.mark.hazard("F14")
def test_an_uncommitted_claim_hides_its_keys_from_others(postgresql_url: str) -> None:
    engine = open_engine(postgresql_url)
    store = Store(engine)
    store.create()
    store.put([an_event(n, key="k") for n in range(4)])
    with engine.begin() as connection:
        assert len(store.claim(2, ordered=True, connection=connection)) == 2
        assert store.claim(4, ordered=True) == []
        assert store.claim(4) != []  # not in ordered mode
    engine.dispose()


@pytest.mark.hazard("F12")
@pytest.mark.parametrize("ordered", [False, True])
def test_concurrent_claims_never_get_the_same_row(store: Store, ordered: bool) -> None:
    store.put([an_event(n, key=f"k{n % 40}") for n in range(400)])
    found: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        idle = 0
        while idle < 3:
            rows = store.claim(7, ordered=ordered)
            idle = 0 if rows else idle + 1
            with lock:
                found.extend(payloads(rows))
            assert store.complete(rows) == len(rows)

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(work) for _ in range(4)]:
            one.result(60)
    assert sorted(found) == list(range(400))


def test_nothing_is_stored_when_the_callers_transaction_is_rolled_back(store: Store) -> None:
    with store.engine.connect() as connection:
        transaction = connection.begin()
        store.put([an_event(1)], connection=connection)
        transaction.rollback()
    assert store.claim(1) == []


@pytest.mark.hazard("F17")
def test_due_rows_are_found_by_the_partial_index_however_many_are_dead_or_scheduled(
    store: Store,
) -> None:
    rows = [values_of(an_event(n)) for n in range(2000)]
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    for n, row in enumerate(rows):
        row["available_at"] = later
        row["dead_at"] = later if n % 2 else None
    store.put_rows(rows)
    store.put([an_event("due")])
    statements: list[tuple[str, Any]] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        statements.append((statement, parameters))

    if store.engine.dialect.name == "postgresql":
        with store.engine.begin() as connection:
            connection.execute(text("ANALYZE outbox_events"))
    assert payloads(store.claim(10)) == ["due"]
    statement, parameters = next(
        one for one in statements if "UPDATE" in one[0] and "outbox_events" in one[0]
    )
    prefix = "EXPLAIN QUERY PLAN " if store.engine.dialect.name == "sqlite" else "EXPLAIN "
    with store.engine.begin() as connection:
        plan = connection.exec_driver_sql(prefix + statement, parameters).all()
    assert "outbox_events_due" in str(plan)
    assert "Seq Scan on outbox_events" not in str(plan)
    assert "filesort" not in str(plan)  # MariaDB would lock all that it sorts


def test_what_others_lease_is_found_by_owner_without_reading_the_table(store: Store) -> None:
    rows = [values_of(an_event(n), queue=f"q{n % 3}", rank=n % 2) for n in range(12)]
    store.put_rows(rows)
    store.put_rows([values_of(an_event(n, delay=3600), queue="q0") for n in range(1000)])
    owners = [uuid.uuid4().hex[:12] for _ in range(3)]
    first, second, third = (Store(store.engine, owner) for owner in owners)
    theirs = first.claim(2, queue="q0") + first.claim(1, queue="q1") + second.claim(1, queue="q0")
    third.claim(2, queue="q0")
    second.claim(1, queue="q2")
    first.release(theirs[:1])

    def seqs(found: list[Claimed]) -> list[int]:
        return sorted(row.seq for row in found)

    assert seqs(store.held_by(owners[:2], ["q0", "q1"], 60.0)) == seqs(theirs[1:])
    assert store.held_by(owners[:1], ["q2"], 60.0) == []
    assert store.held_by(["0" * 12], ["q0", "q1", "q2"], 60.0) == []
    # Their leases are those that end within the given time.
    [mine] = third.claim(1, queue="q1", lease=3000.0)
    assert mine.seq not in seqs(store.held_by(owners, ["q1"], 60.0))
    assert mine.seq in seqs(store.held_by(owners, ["q1"], 3000.0))


def test_the_status_counts_up_to_a_limit_and_exactly_without_one(store: Store) -> None:
    store.put([an_event(n) for n in range(20)])
    store.put([an_event(n, delay=3600) for n in range(30)])
    store.put_rows([values_of(an_event(n), queue="q", rank=n % 2) for n in range(15)])
    store.put_rows([values_of(an_event(n), queue="dead only") for n in range(3)])
    store.bury(store.claim(3, queue="dead only"), "no")
    store.claim(5)
    exact = store.status(at_most=None)
    assert exact == dataclasses.replace(store.status(), by_queue=exact.by_queue)
    assert (exact.waiting, exact.scheduled, exact.leased) == (30, 30, 5)
    assert (exact.queues, exact.dead, exact.is_complete) == ({"": 50, "q": 15}, {"no": 3}, True)
    capped = store.status(at_most=8)
    of_relay, of_q = capped.by_queue[""], capped.by_queue["q"]
    assert (of_relay.waiting, of_relay.scheduled, of_relay.leased) == (8, 3, 5)  # leased ones first
    assert not of_relay.waiting_is_complete
    assert not of_relay.later_is_complete
    assert (of_q.waiting, of_q.waiting_is_complete) == (8 + 7, False)  # by priority
    assert of_q.later_is_complete
    assert (capped.dead, capped.dead_is_complete, capped.is_complete) == ({"no": 3}, True, False)
    assert store.status(at_most=2).dead == {"no": 2}
    assert not store.status(at_most=2).dead_is_complete


def test_the_status_reads_no_more_rows_than_it_counts(store: Store) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    rows = [values_of(an_event(n), queue="q", rank=n % 3) for n in range(3000)]
    for row in rows[1000:2000]:
        row["available_at"] = later
    store.put_rows(rows)
    store.put_rows([values_of(an_event(n), queue="buried") for n in range(1000)])
    store.bury(store.claim(1000, queue="buried"), "no")
    counted = store.status(at_most=10)
    assert (counted.waiting, counted.scheduled, counted.dead) == (30, 30, {"no": 10})
    statements: list[tuple[str, Any]] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "outbox_events" in statement:
            statements.append((statement, parameters))

    with store.engine.begin() as connection:
        analyze = "ANALYZE TABLE" if store.engine.dialect.name == "mariadb" else "ANALYZE"
        connection.exec_driver_sql(f"{analyze} outbox_events")
        statements.clear()
    store.status(at_most=10)
    noted = list(statements)
    assert len(noted) == 6  # the queues, their ranks, each of the three, the dead
    with store.engine.begin() as connection:
        for statement, parameters in noted:
            if store.engine.dialect.name == "sqlite":
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                steps = [each[3] for each in plan if " outbox_events" in each[3]]
                assert steps
                assert all("INDEX outbox_events_" in step for step in steps), steps
                continue
            if store.engine.dialect.name == "postgresql":
                plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
                assert "Seq Scan on outbox_events" not in str(plan.all()), statement
                continue
            before = _rows_read(connection)
            connection.exec_driver_sql(statement, parameters).all()
            assert _rows_read(connection) - before < 200, statement


def _rows_read(connection: Any) -> int:
    query = (
        "SELECT SUM(VARIABLE_VALUE) FROM information_schema.SESSION_STATUS "
        "WHERE VARIABLE_NAME LIKE 'HANDLER_READ%'"
    )
    return int(connection.execute(text(query)).scalar_one())


def test_a_claim_on_mariadb_reads_no_dead_or_scheduled_row(mariadb_store: Store) -> None:
    store = mariadb_store
    for keys in (1, 100):  # a few keys with many rows, and many keys
        store.put([an_event(n, key=f"k{n % keys}" if n % 2 else None) for n in range(1000)])
        while rows := store.claim(1000, ordered=True):
            store.bury(rows, "no")
    store.put([an_event(n, delay=3600) for n in range(2000)])
    store.put([an_event("due"), an_event("due", key="k0")])

    def rows_read() -> int:
        query = (
            "SELECT SUM(VARIABLE_VALUE) FROM information_schema.SESSION_STATUS "
            "WHERE VARIABLE_NAME LIKE 'HANDLER_READ%'"
        )
        with store.engine.connect() as connection:  # always the same, as the pool has one
            return int(connection.execute(text(query)).scalar_one())

    nothing = -(rows_read() - rows_read())
    for ordered in (False, True):
        before = rows_read()
        rows = store.claim(10, ordered=ordered)
        assert rows_read() - before - nothing < 100
        assert payloads(rows) == ["due", "due"]
        store.release(rows)


def test_on_mariadb_values_are_compared_byte_by_byte(mariadb_store: Store) -> None:
    store = mariadb_store
    long = "\u20ac" * 30_000  # over 64 KB
    names = ["mail", "Mail", "mail ", "ma\u00efl"]
    store.put([an_event(long, key=name, headers={"h": long}) for name in names])
    for number, name in enumerate(names):
        store.put_rows([values_of(an_event(number, key=name), queue=name)])
    for number, name in enumerate(names):
        assert payloads(store.claim(10, queue=name)) == [number]
    rows = store.claim(10, ordered=True)
    assert [row.event.key for row in rows] == names  # each the first of its key
    assert payloads(rows) == [long] * 4
    assert rows[0].event.headers == {"h": long}


@pytest.mark.parametrize(("is_mariadb", "version"), [(False, (8, 0, 36)), (True, (10, 5, 29))])
def test_mysql_and_an_old_mariadb_are_refused(
    mariadb_url: str, monkeypatch: pytest.MonkeyPatch, is_mariadb: bool, version: tuple[int, ...]
) -> None:
    store = opened(mariadb_url)
    monkeypatch.setattr(store.engine.dialect, "is_mariadb", is_mariadb)
    monkeypatch.setattr(store.engine.dialect, "server_version_info", version)
    for use in (store.check, store.create):
        with pytest.raises(UsageError, match=r"MariaDB from 10.6, not in this server \((8|10)"):
            use()
    store.engine.dispose()


def test_times_in_mariadb_are_exact_whatever_the_zone_of_the_session(mariadb_url: str) -> None:
    for zone in ("+05:30", "-08:00"):
        store = opened(mariadb_url)

        @event.listens_for(store.engine, "connect")
        def choose(connection: Any, _: object, zone: str = zone) -> None:
            connection.cursor().execute(f"SET time_zone = '{zone}'")

        store.engine.dispose()  # those that chose no zone
        moment = datetime.datetime(2040, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
        store.put([dataclasses.replace(an_event(1), occurred_at=moment)])
        [row] = store.claim(1, lease=0.3)
        assert row.event.occurred_at == moment
        assert row.age < 5
        assert store.claim(1) == []
        time.sleep(0.4)
        [row] = store.claim(1)
        store.complete([row])
        store.engine.dispose()


def test_a_missing_table_column_or_index_is_named_with_what_to_do(database_url: str) -> None:
    store = Store(open_engine(database_url))
    with pytest.raises(UsageError, match="outbox sql create"):
        store.check()
    assert store.create()
    assert not store.create()
    store.check()
    with store.engine.begin() as connection:
        where = " ON outbox_events" if store.engine.dialect.name == "mariadb" else ""
        connection.execute(text(f"DROP INDEX outbox_events_heads{where}"))
        connection.execute(text("ALTER TABLE outbox_events DROP COLUMN attempts"))
    with pytest.raises(UsageError, match="lacks column attempts, index outbox_events_heads"):
        store.check()
    store.engine.dispose()


def test_the_printed_ddl_creates_a_table_that_passes_the_check(database_url: str) -> None:
    engine = open_engine(database_url)
    with engine.begin() as connection:
        for statement in filter(str.strip, ddl(engine.dialect.name).split(";\n")):
            connection.exec_driver_sql(statement)
    Store(engine).check()
    engine.dispose()


def test_the_metadata_match_what_alembic_finds_in_the_database(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata_of(store.engine.dialect.name)) == []


def test_the_table_has_the_columns_of_debeziums_event_router(store: Store) -> None:
    store.put([an_event(1, key="7", id="e1"), an_event(2, id="e2")])
    columns = "id, aggregatetype, aggregateid, type"
    with store.engine.connect() as connection:
        rows = connection.execute(
            text(f"SELECT {columns}, payload FROM outbox_events ORDER BY seq")
        ).all()
    assert [tuple(row)[:4] for row in rows] == [
        ("e1", "order", "7", "order.placed"),
        ("e2", "order", "e2", "order.placed"),
    ]
    assert bytes(rows[0].payload) == b"1"


# ------------------------------------------------------------------------------ engines


@pytest.mark.hazard("H8")
def test_a_new_file_and_those_beside_it_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = Store(open_sqlite(f"{tmp_path}/private.db"))
        store.create()
        store.put([an_event(1)])
        files = sorted(tmp_path.iterdir())
        assert [one.name for one in files] == ["private.db", "private.db-shm", "private.db-wal"]
        assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}
        store.engine.dispose()
    finally:
        os.umask(before)


@pytest.mark.hazard("H8")
def test_links_folders_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target.db").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "target.db")
    (tmp_path / "dangling.db").symlink_to(tmp_path / "nowhere.db")
    for path, reason in [
        ("link.db", "symbolic link"),
        ("dangling.db", "symbolic link"),
        ("missing/events.db", "cannot be opened"),
        ("", "cannot be opened|not a regular file"),
    ]:
        with pytest.raises(UsageError, match=reason):
            open_sqlite(f"{tmp_path}/{path}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        open_sqlite(f"{tmp_path}/pipe")
    assert not (tmp_path / "nowhere.db").exists()


def test_a_second_engine_for_a_file_does_not_release_the_locks_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    first = open_sqlite(str(path))
    with first.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n)")
        connection.commit()
        open_sqlite(str(path)).dispose()
        # Without the locks another process believes it is the last, and removes the log when it
        # ends; nothing written to that log later is seen by others.
        other = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
            "c.execute('INSERT INTO t VALUES (1)'); c.commit(); c.close()"
        )
        subprocess.run([sys.executable, "-c", other, str(path)], check=True)
        assert path.with_name("events.db-wal").exists()
        assert connection.exec_driver_sql("SELECT n FROM t").scalar_one() == 1
    first.dispose()


@pytest.mark.hazard("F19")
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "database URL is invalid"),
        ("postgresql://u:secret", "database URL is invalid"),
        ("postgresql://u:secret@[::1/d", "database URL is invalid"),
        ("oracle://u:secret@h/d", "cannot be stored in oracle"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///x.db?cache=shared", "options"),
        ("sqlite:///nowhere/x.db", "folder"),
    ],
)
def test_an_unusable_url_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_engine(url)
    assert "secret" not in str(caught.value)


def test_white_space_around_a_database_url_is_ignored(tmp_path: Path) -> None:
    engine = open_engine(f" sqlite:///{tmp_path}/events.db\n")
    assert engine.url.database == f"{tmp_path}/events.db"


def test_an_asyncio_driver_is_replaced_by_a_synchronous_one(postgresql_url: str) -> None:
    url = postgresql_url.replace("+psycopg", "+asyncpg")
    engine = open_engine(url)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()


@pytest.mark.hazard("F19")
def test_an_engine_of_another_database_is_refused() -> None:
    engine: Any = create_mock_engine("mssql+pyodbc://", print)
    with pytest.raises(UsageError, match="cannot be stored in mssql"):
        Store(engine)


def test_a_missing_sqlalchemy_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import outbox\n"
        "try:\n    import outbox.sql\n"
        "except outbox.errors.MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install 'outbox-events[sql]'" in done.stdout


# ------------------------------------------------------------------------- tables of earlier days

_EARLIER = {
    "postgresql": """
CREATE TABLE outbox_events (
    id VARCHAR(255) NOT NULL, aggregatetype VARCHAR(255) NOT NULL,
    aggregateid VARCHAR(255) NOT NULL, type VARCHAR(255) NOT NULL, payload BYTEA NOT NULL,
    seq BIGSERIAL NOT NULL, queue VARCHAR(255) DEFAULT '' NOT NULL,
    exchange VARCHAR(255) NOT NULL, content_type VARCHAR(255) NOT NULL, headers TEXT,
    key VARCHAR(255), priority SMALLINT, rank SMALLINT DEFAULT 0 NOT NULL, unroutable VARCHAR(10),
    occurred_at TIMESTAMP WITH TIME ZONE NOT NULL, stored_at TIMESTAMP WITH TIME ZONE NOT NULL,
    available_at TIMESTAMP WITH TIME ZONE NOT NULL, lease_token VARCHAR(36),
    deliveries INTEGER DEFAULT 0 NOT NULL, attempts INTEGER DEFAULT 0 NOT NULL,
    dead_at TIMESTAMP WITH TIME ZONE, reason TEXT, PRIMARY KEY (seq)
)""",
    "sqlite": """
CREATE TABLE outbox_events (
    id VARCHAR(255) NOT NULL, aggregatetype VARCHAR(255) NOT NULL,
    aggregateid VARCHAR(255) NOT NULL, type VARCHAR(255) NOT NULL, payload BLOB NOT NULL,
    seq INTEGER NOT NULL, queue VARCHAR(255) DEFAULT '' NOT NULL,
    exchange VARCHAR(255) NOT NULL, content_type VARCHAR(255) NOT NULL, headers TEXT,
    "key" VARCHAR(255), priority SMALLINT, rank SMALLINT DEFAULT 0 NOT NULL,
    unroutable VARCHAR(10), occurred_at FLOAT NOT NULL, stored_at FLOAT NOT NULL,
    available_at FLOAT NOT NULL, lease_token VARCHAR(36), deliveries INTEGER DEFAULT 0 NOT NULL,
    attempts INTEGER DEFAULT 0 NOT NULL, dead_at FLOAT, reason TEXT, PRIMARY KEY (seq)
)""",
}


@pytest.mark.parametrize("database_url", ["postgresql", "sqlite"], indirect=True)
def test_a_table_of_an_earlier_version_works_and_is_completed_by_create(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(open_engine(database_url))
    with store.engine.begin() as connection:
        for statement in (
            _EARLIER[store.engine.dialect.name],
            "CREATE INDEX outbox_events_due ON outbox_events (queue, rank, available_at, seq) "
            "WHERE dead_at IS NULL",
            "CREATE INDEX outbox_events_key ON outbox_events (key, seq) "
            "WHERE key IS NOT NULL AND dead_at IS NULL",
        ):
            connection.exec_driver_sql(statement)
    store.check()
    lacking = ["dead", "heads", "tasks", "unkeyed"]
    assert f"lacks {', '.join(f'index outbox_events_{each}' for each in lacking)}" in caplog.text
    with pytest.raises(UsageError, match="lacks index outbox_events_dead"):
        store.check(complete=True)
    store.put([an_event(n, key="ab"[n % 2] if n else None) for n in range(6)])
    assert payloads(store.claim(10, ordered=True)) == [0, 1, 2, 3, 4, 5]
    assert not store.create()
    store.check(complete=True)
    store.put([an_event(6, key="c"), an_event(7)])
    assert payloads(store.claim(4, ordered=True)) == [6, 7]
    store.engine.dispose()


def test_any_number_of_processes_may_create_the_tables_at_once(database_url: str) -> None:
    program = (
        "import sys\n"
        "from outbox.sql import Inbox, Store\n"
        "from outbox.storage.engines import open_engine\n"
        "store = Store(open_engine(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "store.create()\n"
        "Inbox(store.engine).create()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert errors == [""] * 4
    store = Store(open_engine(database_url))
    store.check(complete=True)
    store.engine.dispose()


def test_a_role_that_may_only_insert_can_store_events(postgresql_url: str) -> None:
    store = opened(postgresql_url)
    role = f"writer_{uuid.uuid4().hex[:12]}"
    with store.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
        connection.exec_driver_sql(f"GRANT INSERT, SELECT (seq) ON outbox_events TO {role}")
    writer = create_engine(make_url(postgresql_url).set(username=role))
    configure("memory://", after_commit="nothing")
    try:
        with Session(writer) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        with writer.begin() as connection:
            enqueue_event(2, "a", connection=connection)
        Store(writer).put([an_event(3)])
        assert payloads(store.claim(10)) == [1, 2, 3]
    finally:
        writer.dispose()
        with store.engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        store.engine.dispose()


def test_rows_that_are_stored_together_are_what_they_are_alone(store: Store) -> None:
    odd = ["plain", "\u20ac \U0001f600", "back\\slash \"quoted\" 'q' {a,NULL}", "line\nbreak\ttab"]
    moment = datetime.datetime(2040, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    stored = [
        Event(
            id=f"{number}{text}", target=text, exchange=text, body=bytes(range(256)), key=text,
            headers={"h": text, "b": b"\x00", "nul": "\0"}, occurred_at=moment,
            priority=number, unroutable="fail" if number % 2 else None,
        )
        for number, text in enumerate(odd * 4)
    ]  # fmt: skip
    store.put(stored)
    rows = store.claim(100)
    assert [row.event for row in rows] == stored
    assert all(0 <= row.age < 60 for row in rows)
    if store.engine.dialect.name != "sqlite":  # which takes any length
        with pytest.raises(DBAPIError):
            store.put([*stored[:8], dataclasses.replace(stored[0], id="x" * 256)])
        assert store.status().waiting == 0


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("open_", [open_engine, create_engine])
def test_rows_are_stored_together_by_each_driver(
    postgresql_url: str, driver: str, open_: Callable[..., Engine]
) -> None:
    engine = open_(make_url(postgresql_url).set(drivername=f"postgresql+{driver}"))
    store = Store(engine)
    store.create()
    stored = [an_event("NULL"), an_event(key=""), *(an_event(key="NULL") for _ in range(8))]
    store.put(stored)
    assert [row.event for row in store.claim(100)] == stored
    engine.dispose()
