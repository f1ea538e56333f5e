"""The backlog's rules, without a broker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outbox import (
    ConnectFailed,
    ConnectionLost,
    Event,
    Nacked,
    PublishReport,
    PublishTimeout,
)
from outbox.backlog.backlog import Backlog, News
from outbox.backlog.chunk import Chunk, Entry, Fate

LOST = ConnectionLost("lost")


def chunk_of(*ids: str, keep: bool = True) -> Chunk:
    return Chunk([Event(id=one, target="x", exchange="", body=b"12345") for one in ids], keep=keep)


def ids(entries: Sequence[Entry] | Sequence[Event]) -> str:
    return "".join(one.event.id if isinstance(one, Entry) else one.id for one in entries)


def report_of(news: News) -> PublishReport:
    [(_, report)] = news.reports
    return report


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_chunk_is_reported_when_its_last_event_has_a_fate() -> None:
    backlog = Backlog()
    assert backlog.add(chunk_of("a", "b", "c", "d")).reports == []
    a, b, c, d = backlog.take(10, 10)
    assert backlog.give_fate([c], Fate.PUBLISHED).reports == []
    assert backlog.give_fate([a], Fate.REJECTED, "no").reports == []
    assert backlog.give_fate([d], Fate.IGNORED).reports == []
    report = report_of(backlog.give_fate([b], Fate.PUBLISHED))
    assert ids(report.published) == "bc"
    assert ids(report.ignored) == "d"
    assert [(one.event.id, one.reason) for one in report.rejected] == [("a", "no")]
    assert backlog.unsettled == 0


def test_a_lost_link_puts_events_in_flight_ahead_of_newer_ones() -> None:
    backlog = Backlog()
    backlog.add(chunk_of("a", "b", "c"))
    backlog.add(chunk_of("d"))
    flying = backlog.take(2, 10)
    news = backlog.down(flying, LOST)
    assert [ids(report.kept) for _, report in news.reports] == ["abc", "d"]
    assert news.reports[0][1].error is LOST
    assert ids(tuple(news.kept)) == "abcd"
    later = backlog.add(chunk_of("e"))
    assert ids(report_of(later).kept) == "e"
    assert ids(backlog.kept) == "abcde"
    backlog.up()
    assert ids(backlog.take(10, 10)) == "abcde"


def test_an_event_that_must_not_be_kept_is_withdrawn_and_never_sent() -> None:
    backlog = Backlog()
    backlog.add(chunk_of("a", "b", keep=False))
    backlog.add(chunk_of("c"))
    flying = backlog.take(1, 10)
    news = backlog.down(flying, LOST)
    withdrawn = news.reports[0][1]
    assert [one.event.id for one in withdrawn.rejected] == ["a", "b"]
    assert withdrawn.kept == ()
    refused = report_of(backlog.add(chunk_of("d", keep=False)))
    assert [one.event.id for one in refused.rejected] == ["d"]
    backlog.up()
    assert ids(backlog.take(10, 10)) == "c"


def test_a_refused_event_waits_separately_and_its_siblings_are_reported_without_it() -> None:
    backlog = Backlog()
    backlog.add(chunk_of("a", "b"))
    a, b = backlog.take(10, 10)
    assert backlog.refused([a], Nacked("full")).reports == []
    report = report_of(backlog.give_fate([b], Fate.PUBLISHED))
    assert (ids(report.published), ids(report.kept)) == ("b", "a")
    assert isinstance(report.error, Nacked)
    assert ids(backlog.take(10, 10)) == ""
    backlog.requeue([a])
    assert ids(backlog.take(10, 10)) == "a"
    assert backlog.give_fate([a], Fate.PUBLISHED).reports == []
    assert backlog.kept_size == (0, 0)


def test_held_events_are_kept_and_counted_separately_until_they_are_released_or_settled() -> None:
    backlog = Backlog()
    backlog.add(chunk_of("a", "b"))
    backlog.add(chunk_of("c", keep=False))
    taken = backlog.take(10, 100)
    news = backlog.hold(taken, Nacked("no permission"))
    assert [ids(report.kept) for _, report in news.reports] == ["ab", ""]
    assert backlog.hold(taken[:2], Nacked("still none")).kept == []
    assert (backlog.kept_size, backlog.held_size) == ((2, 10), (2, 10))
    backlog.release_held(taken[:1])
    assert (backlog.kept_size, backlog.held_size) == ((2, 10), (1, 5))
    backlog.give_fate(taken[:2], Fate.PUBLISHED)
    assert (backlog.kept_size, backlog.held_size) == ((0, 0), (0, 0))
    assert backlog.unsettled == 0
    assert backlog.tally.nacked == 0


def test_after_a_timeout_without_any_confirm_later_callers_do_not_wait() -> None:
    clock = Clock()
    backlog = Backlog(clock=clock)
    slow = chunk_of("a")
    backlog.add(slow)
    flying = backlog.take(10, 10)
    clock.now += 5
    report = report_of(backlog.release(slow))
    assert ids(report.kept) == "a"
    assert isinstance(report.error, PublishTimeout)
    assert backlog.release(slow).reports == []
    assert ids(report_of(backlog.add(chunk_of("b"))).kept) == "b"
    clock.now += 1
    backlog.confirmed()
    backlog.give_fate(flying, Fate.PUBLISHED)
    assert backlog.add(chunk_of("c")).reports == []


def test_with_nothing_in_flight_a_stall_ends_by_itself() -> None:
    clock = Clock()
    backlog = Backlog(clock=clock)
    withdrawn = chunk_of("a", keep=False)
    backlog.add(withdrawn)
    clock.now += 5
    assert report_of(backlog.release(withdrawn)).rejected  # before it was ever taken
    assert backlog.add(chunk_of("b", keep=False)).reports == []
    assert ids(backlog.take(10, 10)) == "b"


def test_a_timeout_while_others_get_confirms_does_not_open_the_circuit() -> None:
    clock = Clock()
    backlog = Backlog(clock=clock)
    slow = chunk_of("a")
    backlog.add(slow)
    clock.now += 1
    backlog.confirmed()
    backlog.release(slow)
    assert backlog.add(chunk_of("b")).reports == []


def test_an_empty_chunk_is_reported_at_once() -> None:
    assert report_of(Backlog().add(chunk_of())).ok


def test_take_is_bounded_by_bytes_but_takes_at_least_one() -> None:
    backlog = Backlog()
    chunk = Chunk(
        [Event(id=one, target="x", exchange="", body=b"") for one in "abc"],
        frames=[b"x" * 10, b"x" * 10, b"x" * 100],
    )
    backlog.add(chunk)
    assert ids(backlog.take(10, 25)) == "ab"
    assert ids(backlog.take(10, 25)) == "c"


def test_closing_reports_to_waiting_callers_and_returns_the_kept_events() -> None:
    backlog = Backlog()
    backlog.add(chunk_of("a", "b"))
    backlog.add(chunk_of("c", keep=False))
    flying = backlog.take(1, 10)
    left, news = backlog.close(ConnectFailed("closed"))
    assert ids(left) == "ab"
    assert [ids(report.kept) for _, report in news.reports] == ["ab", ""]
    assert backlog.give_fate(flying, Fate.PUBLISHED).reports == []
    assert backlog.unsettled == 0
    assert backlog.kept == ()


def test_another_backlog_adopts_all_in_order_and_reports_to_those_who_wait() -> None:
    backlog, successor = Backlog(), Backlog()
    backlog.add(chunk_of("a", "b"))
    flying = backlog.take(1, 10)
    backlog.down(flying, LOST)
    waiting = chunk_of("c", "d")
    backlog.up()
    backlog.add(waiting)
    [a] = backlog.take(1, 10)
    entries = backlog.surrender()
    assert ids(entries) == "abcd"
    assert (backlog.unsettled, backlog.kept_size, backlog.waiting_size) == (0, (0, 0), (0, 0))
    assert successor.adopt(entries).reports == []
    assert ids(successor.kept) == "ab"
    assert successor.kept_size == (2, 10)
    news = successor.give_fate(successor.take(10, 1000), Fate.PUBLISHED)
    assert [(chunk, ids(report.published)) for chunk, report in news.reports] == [(waiting, "cd")]
    assert (successor.unsettled, successor.kept_size) == (0, (0, 0))
    assert a.fate is Fate.PUBLISHED


def test_what_another_backlog_adopts_while_its_circuit_is_open_is_reported_at_once() -> None:
    backlog, successor = Backlog(), Backlog()
    backlog.add(chunk_of("a"))
    backlog.add(chunk_of("b", keep=False))
    successor.down((), LOST)
    news = successor.adopt(backlog.surrender())
    assert [ids(report.kept) for _, report in news.reports] == ["a", ""]
    successor.up()
    assert ids(successor.take(10, 1000)) == "a"


def test_a_caller_that_reports_a_chunk_itself_is_not_contradicted() -> None:
    clock = Clock()
    backlog = Backlog(clock=clock)
    kept, withdrawn = chunk_of("a"), chunk_of("b", keep=False)
    for chunk in (kept, withdrawn):
        backlog.add(chunk)
        assert chunk.claim_report()
    assert ids(kept.report().kept) == "a"
    assert [one.event.id for one in withdrawn.report().rejected] == ["b"]
    assert ids(backlog.take(1, 10)) == "a"
    for chunk in (kept, withdrawn):
        assert backlog.release(chunk).reports == []
    assert ids(backlog.kept) == "a"
    assert ids(backlog.take(10, 100)) == ""


def test_a_chunk_reported_before_it_is_added_is_kept_or_withdrawn() -> None:
    backlog = Backlog()
    kept, withdrawn = chunk_of("a"), chunk_of("b", keep=False)
    for chunk in (kept, withdrawn):
        assert chunk.claim_report()
        assert backlog.add(chunk).reports == []
    assert ids(backlog.kept) == ids(backlog.take(10, 100)) == "a"
    assert backlog.unsettled == 1


def test_a_timeout_below_half_a_second_does_not_make_later_callers_fail() -> None:
    clock = Clock()
    backlog = Backlog(clock=clock)
    hurried = chunk_of("a")
    backlog.add(hurried)
    clock.now += 0.4
    assert ids(report_of(backlog.release(hurried)).kept) == "a"
    assert backlog.add(chunk_of("b")).reports == []


def test_who_waits_for_the_end_is_called_once() -> None:
    backlog = Backlog()
    called: list[int] = []
    [at_once] = backlog.when_settled(lambda: called.append(1)).settled
    at_once()
    backlog.add(chunk_of("a"))
    assert backlog.when_settled(lambda: called.append(2)).settled == []
    [later] = backlog.give_fate(backlog.take(1, 10), Fate.PUBLISHED).settled
    later()
    assert called == [1, 2]
    backlog.add(chunk_of("b"))
    assert backlog.give_fate(backlog.take(1, 10), Fate.PUBLISHED).settled == []


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, every event has one fate and every chunk one report."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.chunks: list[Chunk] = []
        self.flying: list[Entry] = []
        self.apart: list[Entry] = []
        self.all: list[Entry] = []
        self.reports: dict[Chunk, PublishReport] = {}
        self.open = False

    def spread(self, news: News) -> None:
        for chunk, report in news.reports:
            assert chunk not in self.reports
            self.reports[chunk] = report

    @rule(count=st.integers(0, 4), keep=st.booleans())
    def add(self, count: int, keep: bool) -> None:
        chunk = chunk_of(*(f"{len(self.all) + n}" for n in range(count)), keep=keep)
        self.chunks.append(chunk)
        self.all += chunk.entries
        self.spread(self.backlog.add(chunk))

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        if not self.open:
            self.flying += self.backlog.take(count, 1 << 20)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fate=st.sampled_from([Fate.PUBLISHED, Fate.REJECTED, Fate.IGNORED]))
    def settle(self, data: st.DataObject, fate: Fate) -> None:
        entry = data.draw(st.sampled_from(self.flying))
        self.flying.remove(entry)
        self.backlog.confirmed()
        self.spread(self.backlog.give_fate([entry], fate))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.flying))
        self.flying.remove(entry)
        self.spread(self.backlog.refused([entry], Nacked("full")))
        if entry.fate is None:
            self.apart.append(entry)

    @precondition(lambda self: self.apart)
    @rule()
    def retry(self) -> None:
        self.backlog.requeue([self.apart.pop()])

    @rule()
    def lose(self) -> None:
        self.spread(self.backlog.down(self.flying, LOST))
        self.flying = []
        self.open = True

    @rule()
    def connect(self) -> None:
        self.backlog.up()
        self.open = False

    @precondition(lambda self: self.chunks)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.spread(self.backlog.release(data.draw(st.sampled_from(self.chunks))))

    @invariant()
    def kept_is_what_was_reported_and_has_no_fate(self) -> None:
        kept = {one.event.id for one in self.all if one.kept}
        assert {event.id for event in self.backlog.kept} == kept
        assert self.backlog.kept_size == (len(kept), 5 * len(kept))
        assert all(one.fate is None for one in self.all if one.kept)

    @invariant()
    def whoever_is_settled_is_reported(self) -> None:
        for entry in self.all:
            if entry.chunk not in self.reports:
                assert not (self.open and entry.fate is None and not entry.kept)

    def teardown(self) -> None:
        self.connect()
        while self.apart:
            self.retry()
        while entries := [*self.flying, *self.backlog.take(100, 1 << 20)]:
            self.flying = []
            self.spread(self.backlog.give_fate(entries, Fate.PUBLISHED))
        assert all(entry.fate is not None for entry in self.all)
        assert set(self.reports) == set(self.chunks)
        assert self.backlog.unsettled == 0
        assert self.backlog.kept_size == (0, 0)


TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("keep", [True, False])
def test_a_reported_chunk_no_longer_holds_its_entries(keep: bool) -> None:
    chunk = chunk_of("a", keep=keep)
    backlog = Backlog()
    backlog.add(chunk)
    backlog.down((), LOST)
    assert chunk.entries == []


def test_events_aside_count_as_kept_and_return_behind_those_in_the_queue() -> None:
    backlog = Backlog()
    backlog.down((), LOST)
    first = backlog.add(chunk_of("a", "b", "c")).kept
    second = backlog.add(chunk_of("d", "e")).kept
    aside = backlog.put_aside([first[2], *second])
    assert ids(aside) == "cde"
    assert ids(backlog.kept) == "ab"
    assert backlog.aside_size == (3, 15)
    assert backlog.kept_size == (5, 25)
    assert backlog.unsettled == 5
    backlog.up()
    backlog.give_fate(backlog.take(10, 100), Fate.PUBLISHED)
    settled: list[bool] = []
    backlog.when_settled(lambda: settled.append(True))
    backlog.restore(aside)
    assert backlog.aside_size == (0, 0)
    taken = backlog.take(10, 100)
    assert ids(taken) == "cde"
    news = backlog.give_fate(taken, Fate.PUBLISHED)
    assert ids(news.no_longer_kept) == "cde"
    assert len(news.settled) == 1
    assert (backlog.unsettled, backlog.kept_size) == (0, (0, 0))


def test_what_is_in_flight_cannot_be_put_aside() -> None:
    backlog = Backlog()
    chunk = chunk_of("a", "b")
    backlog.add(chunk)
    flying = backlog.take(1, 10)
    kept = backlog.release(chunk).kept
    assert ids(backlog.put_aside(kept)) == "b"
    assert backlog.give_fate(flying, Fate.PUBLISHED).no_longer_kept == flying
    assert backlog.kept_size == backlog.aside_size == (1, 5)


def test_a_chunk_can_be_held_back_though_the_broker_is_available() -> None:
    backlog = Backlog()
    news = backlog.add(chunk_of("a"), LOST)
    assert ids(report_of(news).kept) == "a"
    assert report_of(news).error is LOST
    assert backlog.circuit is None


def test_adopted_and_lost_events_are_counted_while_they_are_aside() -> None:
    backlog = Backlog()
    backlog.add_aside(3, 30)
    assert (backlog.unsettled, backlog.kept_size) == (3, (3, 30))
    settled = backlog.when_settled(lambda: None)
    assert settled.settled == []
    assert len(backlog.lose_aside(3).settled) == 1
    assert (backlog.unsettled, backlog.kept_size) == (0, (0, 0))
