"""What a publisher counts."""

from __future__ import annotations

import pytest

from outbox import Event, EventCollector, Publisher, Stats, auto_publishing, configure
from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk, Fate
from outbox.backlog.stats import LATENCY_BOUNDS
from outbox.errors import ConnectionLost

LOST = ConnectionLost("away")


def make_events(count: int) -> list[Event]:
    collector = EventCollector(publisher=Publisher("memory://"))
    return [collector.enqueue_event({"n": n}, "x") for n in range(count)]


def test_a_new_publisher_has_counted_nothing() -> None:
    with Publisher("memory://") as publisher:
        stats = publisher.stats()
    assert (stats.published, stats.kept, stats.cleared, stats.reconnects) == (0, 0, 0, 0)
    assert stats.latency.count == 0
    assert stats.latency.mean == 0.0


def test_published_and_cleared_events_are_counted() -> None:
    dropped: list[tuple[Event, ...]] = []
    confirmed: list[tuple[int, float]] = []
    with Publisher(
        "memory://",
        on_cleared=dropped.append,
        on_confirmed=lambda count, seconds: confirmed.append((count, seconds)),
    ) as publisher:
        collector = EventCollector(publisher=publisher)
        for number in range(3):
            collector.enqueue_event(number, "x")
        collector.publish()
        gone = collector.enqueue_event(3, "x")
        collector.clear_events()
        stats = publisher.stats()
    assert (stats.published, stats.cleared) == (3, 1)
    assert dropped == [(gone,)]
    [(count, seconds)] = confirmed
    assert count == 3
    assert 0 <= seconds < 5
    assert stats.latency.count == 1


def test_a_rollback_is_counted_by_the_default_publisher() -> None:
    publisher = configure("memory://")
    with pytest.raises(KeyError), auto_publishing() as block:
        block.enqueue_event(1, "x")
        raise KeyError
    assert publisher.stats().cleared == 1


def test_a_hook_that_raises_does_not_undo_a_rollback() -> None:
    def hook(_events: object) -> None:
        raise RuntimeError("in the hook")

    configure("memory://", on_cleared=hook)
    with pytest.raises(KeyError), auto_publishing() as block:
        block.enqueue_event(1, "x")
        raise KeyError
    assert block.report is None


def test_every_fate_is_counted_once_and_kept_events_separately() -> None:
    backlog = Backlog()
    kept = Chunk(make_events(3))
    backlog.add(kept)
    entries = list(kept.entries)
    backlog.down(backlog.take(10, 10_000), LOST)
    backlog.up()
    backlog.take(10, 10_000)
    backlog.give_fate(entries[:2], Fate.PUBLISHED)
    backlog.give_fate(entries, Fate.PARKED)  # two of them have theirs
    withdrawn = Chunk(make_events(1), keep=False)
    backlog.add(withdrawn)
    backlog.refused(backlog.take(10, 10_000), LOST)
    assert backlog.tally.fates == {"published": 2, "parked": 1, "withdrawn": 1}
    assert backlog.tally.ever_kept == 3
    assert backlog.tally.nacked == 1


def test_only_chunks_confirmed_in_time_count_towards_the_latency() -> None:
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    first, second = Chunk(make_events(1)), Chunk(make_events(1))
    backlog.add(first)
    now[0] = 0.004
    backlog.give_fate(backlog.take(1, 10_000), Fate.PUBLISHED)
    backlog.add(second)
    backlog.release(second)
    now[0] = 9.0
    backlog.give_fate(backlog.take(1, 10_000), Fate.PUBLISHED)
    latency = backlog.tally.latency
    assert latency.count == 1
    assert latency.total == latency.maximum == pytest.approx(0.004)


def test_a_duration_counts_in_the_first_bucket_it_fits() -> None:
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    for seconds in (0.0, 0.001, 0.002, 99.0):
        now[0] = 0.0
        backlog.add(Chunk(make_events(1)))
        now[0] += seconds
        backlog.give_fate(backlog.take(1, 10_000), Fate.PUBLISHED)
    buckets = backlog.tally.latency.buckets
    assert len(buckets) == len(LATENCY_BOUNDS) + 1
    assert (buckets[0], buckets[1], buckets[-1]) == (2, 1, 1)


def test_stats_are_a_snapshot() -> None:
    with Publisher("memory://") as publisher:
        before = publisher.stats()
        EventCollector(publisher=publisher).enqueue_event(1, "x")
        publisher.publish(make_events(1))
        assert isinstance(before, Stats)
        assert before.published == 0
        assert publisher.stats().published == 1
