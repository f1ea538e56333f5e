"""The embedded transport's decisions, without a file."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from outbox import Blocked, ConnectionLost, Event, UsageError
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.event import Unroutable
from outbox.storage.store import Claimed
from outbox.transports.database.claimed_rows import (
    DELIVERY_LIMIT,
    delivery_of,
    is_deadly,
    letter_of_deadly,
)
from outbox.transports.database.leases import Leases
from outbox.transports.database.plan import Plan
from outbox.transports.database.routing import Binding, Routes, of_queue
from outbox.transports.database.sqlite.location import Location
from outbox.transports.database.sqlite.sqlite_errors import is_busy, is_failure, of_database
from outbox.url import BrokerURL

LEASE = 30.0
EVENT = Event(id="1", target="a.b", exchange="x", body=b"{}", key="k", priority=3)


def routes(*bindings: tuple[str, str, str]) -> Routes:
    found = Routes()
    found.update([Binding(*one) for one in bindings])
    return found


def claimed(
    seq: int = 1, *, queue: str = "q", deliveries: int = 1, attempts: int = 0, event: Event = EVENT
) -> Claimed:
    return Claimed(seq, queue, event, "token", deliveries, attempts, age=0.0)


def location(url: str) -> Location:
    return Location.of(BrokerURL.parse(url))


# ---------------------------------------------------------------------------------- location


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert location("sqlite:///o.db") == Location(str(tmp_path / "o.db"), "FULL")
    assert location("sqlite:////var/o%20o.db").path == "/var/o o.db"


def test_durability_is_full_unless_the_url_says_otherwise() -> None:
    assert location("sqlite:////o.db?synchronous=full").synchronous == "FULL"
    assert location("sqlite:////o.db?synchronous=normal").synchronous == "NORMAL"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////o.db?mode=ro", "unknown option 'mode' in the sqlite URL"),
        ("sqlite:////o.db?synchronous=off", "invalid synchronous=off in the sqlite URL; use full"),
        ("sqlite:////o.db?synchronous", "not name=value pairs"),
    ],
)
def test_an_unusable_url_is_reported(url: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        location(url)


# ------------------------------------------------------------------------------------ routes


def test_a_queue_with_two_bindings_that_match_gets_an_event_once() -> None:
    found = routes(("q", "x", "a.*"), ("q", "x", "#"), ("p", "x", "a.b"), ("r", "y", "#"))
    assert found.queues("x", "a.b") == ("p", "q")
    assert found.queues("x", "c") == ("q",)
    assert found.queues("z", "a.b") == ()


def test_without_an_exchange_the_target_is_the_name_of_a_queue() -> None:
    found = routes(of_queue("#"), of_queue("q.1"))
    assert found.queues("", "#") == ("#",)
    assert found.queues("", "q.1") == ("q.1",)
    assert found.queues("", "other") == ()
    assert found.has_queue("q.1")
    assert not found.has_queue("x")


def test_new_bindings_take_effect_at_once() -> None:
    found = routes(("q", "x", "a"))
    assert found.queues("x", "b") == ()
    found.update([Binding("q", "x", "b")])
    assert found.queues("x", "b") == ("q",)
    assert found.queues("x", "a") == ()


def test_countless_addresses_do_not_fill_the_memory() -> None:
    found = routes(("q", "x", "#"))
    for number in range(25_000):
        found.queues("x", f"user.{number}")
    assert len(found._cache) <= 10_000


# -------------------------------------------------------------------------------------- plan


def plan(*events: Event, bound: Routes | None = None) -> Plan[Entry]:
    return Plan(Chunk(events).entries, bound or routes(("q", "x", "a.*")), "park")


def test_each_queue_gets_a_row_in_the_order_of_the_events() -> None:
    bound = routes(("p", "x", "#"), ("q", "x", "a.*"))
    second = Event(id="2", target="c", exchange="x", body=b"")
    rows = plan(EVENT, second, bound=bound).rows
    assert [(row["id"], row["queue"], row["rank"]) for row in rows] == [
        ("1", "p", 3),
        ("1", "q", 3),
        ("2", "p", 0),
    ]


def test_an_unroutable_event_follows_its_own_policy_or_else_the_publishers() -> None:
    policies: list[Unroutable | None] = [None, "park", "fail", "ignore"]
    events = [
        Event(id=str(number), target="lost", exchange="x", body=b"", unroutable=policy)
        for number, policy in enumerate(policies, 1)
    ]
    found = plan(*events)
    assert {
        (fate, reason): [entry.event.id for entry in entries]
        for (fate, reason), entries in found.fates.items()
    } == {
        (Fate.PARKED, ""): ["1", "2"],
        (Fate.REJECTED, "unroutable: 312 NO_ROUTE"): ["3"],
        (Fate.IGNORED, "unroutable: 312 NO_ROUTE"): ["4"],
    }
    assert [row["queue"] for row in found.rows] == ["outbox.unroutable"] * 2


def test_without_a_parking_queue_nothing_is_parked() -> None:
    lost = Event(id="2", target="lost", exchange="x", body=b"")
    found = plan(EVENT, lost)
    assert found.parks
    found.park_nothing()
    assert [entry.event for entry in found.without_queue] == [lost]
    assert [row["id"] for row in found.rows] == ["1"]
    assert list(found.fates) == [(Fate.PUBLISHED, "")]


# ------------------------------------------------------------------------------------ leases


def test_rows_are_numbered_and_bounded_for_each_queue() -> None:
    leases = Leases(2, LEASE)
    assert leases.free("q") == 2
    tags = [leases.take(claimed(seq), 0.0) for seq in (5, 6)]
    assert (leases.free("q"), leases.free("p"), len(leases)) == (0, 2, 2)
    leases.drop([tags[0], 99])
    leases.drop([tags[0]])
    assert leases.free("q") == 1
    assert leases.get(tags[0]) is None
    assert [row.seq for row in leases.rows] == [6]


def test_leases_are_extended_long_before_they_end() -> None:
    leases = Leases(10, LEASE)
    assert leases.extend_in(100.0) is None
    leases.take(claimed(1), 100.0)
    leases.take(claimed(2), 105.0)
    assert leases.extend_in(105.0) == pytest.approx(LEASE / 3 - 5)
    assert leases.extended({1, 2}, 110.0) == 0
    assert leases.extend_in(110.0) == pytest.approx(LEASE / 3)


def test_a_lease_that_another_worker_has_taken_is_forgotten() -> None:
    leases = Leases(10, LEASE)
    first, second = (leases.take(claimed(seq), 0.0) for seq in (1, 2))
    assert leases.extended({2}, 10.0) == 1
    assert first not in leases
    assert second in leases
    assert leases.free("q") == 9


def test_a_lease_that_has_ended_is_kept_unless_another_worker_has_it() -> None:
    leases = Leases(10, LEASE)
    tag = leases.take(claimed(1), 0.0)
    assert leases.extend_in(2 * LEASE) == pytest.approx(LEASE / 3 - 2 * LEASE)
    assert leases.extended({1}, 2 * LEASE) == 0
    assert tag in leases


# --------------------------------------------------------------------------------- delivering


def test_a_replayed_dead_letter_has_its_first_address() -> None:
    headers = {"outbox-origin-exchange": "x", "outbox-origin-target": "a.b", "own": 1}
    event = Event(id="1", target="q", exchange="", body=b"", headers=headers)
    found = delivery_of(claimed(event=event), 1)
    assert (found.exchange, found.target) == ("x", "a.b")


def test_a_message_lost_with_its_worker_too_often_is_deadly_but_not_one_given_back() -> None:
    assert not is_deadly(claimed(deliveries=DELIVERY_LIMIT))
    assert is_deadly(claimed(deliveries=DELIVERY_LIMIT + 1))
    assert not is_deadly(claimed(deliveries=1000, attempts=999))
    assert is_deadly(claimed(deliveries=1000, attempts=1000 - 1 - DELIVERY_LIMIT))


def test_a_deadly_message_has_its_address_and_the_reason_as_a_dead_letter() -> None:
    letter = letter_of_deadly(claimed(deliveries=21))
    assert (letter.exchange, letter.target, letter.id) == ("", "q.dead", "1")
    assert (letter.priority, letter.key, letter.headers["outbox-key"]) == (3, None, "k")
    assert letter.headers["outbox-dead-queue"] == "q"
    assert letter.headers["outbox-dead-exchange"] == "x"
    assert letter.headers["outbox-dead-target"] == "a.b"
    assert "delivered 20 times" in letter.headers["outbox-dead-reason"]


@pytest.mark.parametrize(
    ("own", "attempts", "first_failure"),
    [
        ({}, 1, None),
        (
            {"outbox-attempt": 3, "outbox-first-failed-at": "2026-01-02T03:04:05+00:00"},
            3,
            "2026-01-02T03:04:05+00:00",
        ),
    ],
    ids=["at once", "tried before"],
)
def test_a_deadly_message_has_its_attempts_and_times_as_a_dead_letter(
    own: dict[str, Any], attempts: int, first_failure: str | None
) -> None:
    event = Event(id="1", target="a.b", exchange="x", body=b"", headers={**own, "x-death": []})
    letter = letter_of_deadly(claimed(event=event, deliveries=21))
    assert letter.headers["outbox-attempt"] == attempts
    now = letter.headers["outbox-dead-at"]
    assert letter.headers["outbox-dead-first-at"] == (first_failure or now)
    assert letter.occurred_at == event.occurred_at
    assert "x-death" not in letter.headers


# ------------------------------------------------------------------------------------ failures


def error(kind: type[sqlite3.Error], code: int = 0) -> sqlite3.Error:
    found = kind("broken")
    found.sqlite_errorcode = code
    return found


def test_only_errors_of_the_database_itself_count_as_its_failure() -> None:
    assert is_failure(error(sqlite3.OperationalError))
    assert is_failure(error(sqlite3.DatabaseError))  # a damaged file
    assert is_failure(OSError())
    assert not is_failure(error(sqlite3.DataError))
    assert not is_failure(error(sqlite3.IntegrityError))
    assert not is_failure(ValueError())


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        (sqlite3.SQLITE_BUSY, Blocked, "another process has kept /o.db locked"),
        (sqlite3.SQLITE_BUSY | 2 << 8, Blocked, "another process"),
        (sqlite3.SQLITE_FULL, Blocked, "no space left for /o.db"),
        (sqlite3.SQLITE_IOERR | 3 << 8, ConnectionLost, "/o.db cannot be used: broken"),
    ],
)
def test_a_failure_has_its_own_error_type_and_its_cause(
    code: int, kind: type[Exception], expected: str
) -> None:
    cause = error(sqlite3.OperationalError, code)
    found = of_database(cause, "/o.db")
    assert type(found) is kind
    assert expected in str(found)
    assert found.__cause__ is cause
    assert is_busy(cause) == ("another process" in expected)
