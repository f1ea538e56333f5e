"""Which rows are sent together, and how their reports are handled."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as some

from outbox import Event, Publisher, UsageError
from outbox.errors import ConnectionLost, Nacked
from outbox.report import PublishReport, Rejection, Withdrawn
from outbox.sql.row_fates import sort_out
from outbox.sql.waves import Batch, waves
from outbox.storage.store import Claimed


def row(number: int, key: str | None = None) -> Claimed:
    event = Event(id=str(number), target="a", exchange="e", body=b"", key=key)
    return Claimed(number, "", event, "token", 1, 0, 0.0)


class Reporting:
    """What a batch needs of a publisher; a test decides when and what it reports."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[Event], Future[PublishReport]]] = []
        self.closed = False

    def submit(self, events: list[Event], *, keep: bool) -> Future[PublishReport]:
        assert not keep
        if self.closed:
            raise UsageError("closed")
        report: Future[PublishReport] = Future()
        self.sent.append((events, report))
        return report

    def report(self, **fates: Any) -> None:
        events, report = self.sent[-1]
        report.set_result(PublishReport(**fates) if fates else PublishReport(tuple(events)))

    def ids(self) -> list[list[str]]:
        return [[event.id for event in events] for events, _ in self.sent]


def batch_of(publisher: Reporting, *rows: Claimed, **options: Any) -> Batch:
    return Batch(cast(Publisher, publisher), rows, ordered=True, **options)


def numbers(rows: list[Claimed]) -> list[int]:
    return [one.seq for one in rows]


@given(some.lists(some.sampled_from(["a", "b", "c", None]), max_size=30))
def test_waves_keep_the_order_and_contain_each_key_once(keys: list[str | None]) -> None:
    rows = [row(number, key) for number, key in enumerate(keys)]
    found = waves(rows)
    assert sorted(numbers([one for wave in found for one in wave])) == list(range(len(rows)))
    for key in {key for key in keys if key is not None}:
        places = [[one.seq for one in wave if one.event.key == key] for wave in found]
        assert all(len(place) <= 1 for place in places)
        in_turn = [seq for place in places for seq in place]
        assert in_turn == sorted(in_turn)
    assert all(one.event.key is not None for wave in found[1:] for one in wave)


def test_a_wave_is_sent_when_the_one_before_it_is_confirmed() -> None:
    publisher = Reporting()
    batch = batch_of(publisher, row(1, "a"), row(2, "a"), row(3, "b"))
    assert not batch.advance()
    assert not batch.advance()
    assert publisher.ids() == [["1", "3"]]
    publisher.report()
    assert not batch.advance()
    assert publisher.ids() == [["1", "3"], ["2"]]
    publisher.report()
    assert batch.advance()
    assert numbers(batch.fates.done) == [1, 3, 2]


@pytest.mark.parametrize("error", [Nacked("full"), ConnectionLost("gone")])
def test_after_an_unconfirmed_event_nothing_of_its_key_is_sent(error: Exception) -> None:
    publisher = Reporting()
    rows = row(1, "a"), row(2, "a"), row(3, "b"), row(4, "b"), row(5, "a")
    batch = batch_of(publisher, *rows)
    batch.advance()
    publisher.report(
        published=(rows[2].event,), rejected=(Withdrawn(rows[0].event, "why"),), error=error
    )
    batch.advance()
    assert publisher.ids() == [["1", "3"], ["4"]]
    publisher.report()
    assert batch.advance()
    refused = [one.seq for one, _ in batch.fates.nacked]
    assert refused == ([1] if isinstance(error, Nacked) else [])
    assert sorted(numbers(batch.fates.unconfirmed) + refused) == [1, 2, 5]


def test_events_behind_a_dead_event_of_their_key_are_sent() -> None:
    publisher = Reporting()
    rows = row(1, "a"), row(2, "a")
    batch = batch_of(publisher, *rows)
    batch.advance()
    publisher.report(rejected=(Rejection(rows[0].event, "too large"),))
    batch.advance()
    publisher.report()
    assert batch.advance()
    assert numbers(batch.fates.done) == [2]
    assert batch.fates.rejected == [(rows[0], "too large")]


def test_no_further_wave_is_sent_when_the_time_is_up() -> None:
    publisher = Reporting()
    batch = batch_of(publisher, row(1, "a"), row(2, "a"), until=0.0)
    batch.advance()
    publisher.report()
    assert batch.advance()
    assert publisher.ids() == [["1"]]
    assert numbers(batch.fates.unconfirmed) == [2]


def test_an_abandoned_batch_leaves_all_rows_but_those_already_reported() -> None:
    publisher = Reporting()
    batch = batch_of(publisher, row(1, "a"), row(2, "a"), row(3, "a"))
    batch.advance()
    publisher.report()
    batch.advance()
    fates = batch.abandon()
    assert numbers(fates.done) == [1]
    assert numbers(fates.unconfirmed) == [2, 3]


def test_a_closed_publisher_leaves_its_unconfirmed_rows() -> None:
    publisher = Reporting()
    batch = batch_of(publisher, row(1, "a"), row(2, "a"))
    batch.advance()
    publisher.report()
    publisher.closed = True
    with pytest.raises(UsageError):
        batch.advance()
    assert batch.advance()
    assert (numbers(batch.fates.done), numbers(batch.fates.unconfirmed)) == ([1], [2])


def test_equal_events_of_two_rows_have_separate_fates() -> None:
    first, second = row(1), row(2)
    assert first.event != second.event
    twin = Claimed(3, "", Event(**_fields(first.event)), "token", 1, 0, 0.0)
    report = PublishReport(
        published=(first.event,), rejected=(Withdrawn(twin.event, "why"),), error=Nacked("full")
    )
    fates = sort_out([first, twin], report)
    assert numbers(fates.done) == [1]
    assert [(one.seq, why) for one, why in fates.nacked] == [(3, "full")]


def _fields(event: Event) -> dict[str, Any]:
    return {
        name: getattr(event, name)
        for name in ("id", "target", "exchange", "body", "occurred_at", "content_type")
    }
