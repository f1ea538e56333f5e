"""The order of the events of one key after a nack, without a broker."""

from __future__ import annotations

from outbox import Event
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.transports.rabbitmq.confirms import Confirms
from outbox.transports.rabbitmq.holding.key_order import KeyOrder


def entries_of(*ids: str, key: str | None = "k") -> list[Entry]:
    events = [Event(id=one, target="x", exchange="", body=b"", key=key) for one in ids]
    return Chunk(events).entries


def test_nacked_events_take_turns_in_the_order_sent_however_the_nacks_come() -> None:
    order = KeyOrder()
    a, b, c = entries_of("a", "b", "c")
    numbers = {a: 1, b: 2, c: 3}
    assert order.nacked([c], numbers) == ["k"]
    assert order.nacked([b, a], numbers) == []
    turns = []
    while (entry := order.take_turn("k")) is not None:
        assert order.hold_back([entry]) == ([entry], [])
        assert order.take_turn("k") is None  # the last one has no fate yet
        entry.fate = Fate.PUBLISHED
        assert order.settled([entry]) == ["k"]
        turns.append(entry)
    assert turns == [a, b, c]
    assert not order.keys


def test_one_that_is_nacked_again_keeps_its_place_and_later_events_wait_behind() -> None:
    order = KeyOrder()
    a, b, late = entries_of("a", "b", "late")
    [other], [plain] = entries_of("other", key="o"), entries_of("plain", key=None)
    order.nacked([a], {a: 1})
    order.nacked([b], {b: 2})
    assert order.hold_back([other, late, plain]) == ([other, plain], [late])
    assert order.take_turn("k") is a
    assert order.nacked([a], {a: 9}) == ["k"]
    assert order.take_turn("k") is a
    a.fate = Fate.PUBLISHED
    assert order.take_turn("k") is b
    b.fate = Fate.PUBLISHED
    assert order.take_turn("k") is late
    [latest] = entries_of("latest")
    order.hold_back([latest])
    order.nacked([late], {late: 9})
    assert order.closed() == [late, latest]
    assert order.take_turn("k") is None


def test_what_was_withdrawn_meanwhile_loses_its_turn() -> None:
    order = KeyOrder()
    a, b = entries_of("a", "b")
    order.nacked([a, b], {})
    a.fate = Fate.WITHDRAWN
    assert order.take_turn("k") is b


def test_numbers_go_on_over_later_channels() -> None:
    confirms = Confirms()
    a, b, c = entries_of("a", "b", "c")
    confirms.sent([a, b])
    [first], both = confirms.numbers(1, multiple=False).values(), confirms.numbers(0, multiple=True)
    assert both == {a: first, b: first + 1}
    assert confirms.numbers(7, multiple=False) == {}
    confirms.clear()
    confirms.sent([c])
    assert confirms.numbers(1, multiple=True)[c] > first + 1
