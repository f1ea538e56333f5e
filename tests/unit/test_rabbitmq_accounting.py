"""Confirms, acks and frames, without a broker."""

from __future__ import annotations

import random
import struct
from typing import Any

import pika
import pika.frame
import pika.spec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Event
from outbox.backlog.chunk import Chunk, Entry
from outbox.messages.delivery import Delivery
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq.amqp.encoder import PUBLISH_CHANNEL, Encoder
from outbox.transports.rabbitmq.confirms import Confirms
from outbox.transports.rabbitmq.consuming.acks import Acks, Done
from tests.amqp import properties_of_event


def entries_of(*ids: str, target: str = "x") -> list[Entry]:
    return Chunk([Event(id=one, target=target, exchange="e", body=b"") for one in ids]).entries


def names(entries: list[Entry]) -> str:
    return "".join(entry.event.id for entry in entries)


@pytest.mark.hazard("A3")
def test_confirms_may_arrive_in_any_order_and_in_groups() -> None:
    confirms = Confirms()
    confirms.sent(entries_of(*"abcdef"))
    assert names(confirms.confirmed([(3, False)])[0]) == "c"
    assert names(confirms.confirmed([(4, True)])[0]) == "abd"
    assert confirms.confirmed([(2, False)]) == ([], [])
    assert names(confirms.confirmed([(6, True)])[0]) == "ef"
    assert len(confirms) == 0
    confirms.sent(entries_of("g"))
    assert names(confirms.confirmed([(0, True)])[0]) == "g"


def test_a_returned_event_is_recognised_when_its_confirm_arrives() -> None:
    confirms = Confirms()
    confirms.sent(entries_of("a", "b"))
    confirms.sent(entries_of("a", target="y"))
    assert confirms.returned("a", "e", "y", "312")
    assert not confirms.returned("a", "e", "y", "312")
    assert not confirms.returned("z", "e", "x", "312")
    confirms.sent(entries_of("c"))
    assert confirms.returned("c", "e", "x", "312")
    entries, unroutable = confirms.confirmed([(4, True)])
    assert names(entries) == "ab"
    assert [(entry.event.target, reason) for entry, reason in unroutable] == [
        ("y", "312"),
        ("x", "312"),
    ]


def test_of_two_equal_events_a_return_is_for_the_first_one_not_yet_returned() -> None:
    confirms = Confirms()
    first, second = entries_of("a", "a")
    confirms.sent([first, second])
    assert confirms.returned("a", "e", "x", "one")
    assert confirms.returned("a", "e", "x", "two")
    assert confirms.confirmed([(0, True)]) == ([], [(first, "one"), (second, "two")])


@pytest.mark.hazard("A3")
@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_every_sent_entry_is_confirmed_exactly_once(count: int, random: random.Random) -> None:
    confirms = Confirms()
    confirms.sent(entries_of(*map(str, range(count))))
    seen = []
    while len(confirms):
        entries, _ = confirms.confirmed([(random.randint(1, count), random.random() < 0.3)])
        seen += [entry.event.id for entry in entries]
    assert sorted(seen, key=int) == [str(n) for n in range(count)]


def test_clearing_returns_the_entries_in_the_order_of_sending() -> None:
    confirms = Confirms()
    confirms.sent(entries_of(*"abcd"))
    confirms.confirmed([(2, False)])
    assert names(confirms.clear()) == "acd"
    assert len(confirms) == 0
    confirms.sent(entries_of("z"))
    assert names(confirms.confirmed([(1, False)])[0]) == "z"


@pytest.mark.hazard("A16")
@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_every_delivery_is_acked_once_and_never_while_it_is_being_processed(
    count: int, random: random.Random
) -> None:
    acks = Acks()
    waiting = set(range(1, count + 1))  # what the broker still waits for
    working = set(waiting)
    finished: set[int] = set()
    while working:
        done = random.sample(sorted(working), random.randint(1, len(working)))
        working -= set(done)
        if random.random() < 0.2:
            assert acks.settle(done[0])
            waiting.remove(done.pop(0))
        finished |= set(done)
        for tag, multiple in acks.done([*done, *done], hold=random.random() < 0.7):
            assert tag in waiting  # or the broker closes the channel
            spoken_for = {one for one in waiting if one <= tag} if multiple else {tag}
            assert spoken_for <= finished
            waiting -= spoken_for
        assert acks.held == bool(waiting & finished)
    assert acks.done([], hold=False) == []
    assert not waiting


def test_an_ack_waits_one_turn_for_an_earlier_delivery_still_in_progress() -> None:
    acks = Acks()
    assert acks.done([2, 3, 4]) == []
    assert acks.held
    assert acks.done([1]) == [(4, True)]
    assert acks.done([6, 8]) == []
    assert acks.done([9]) == [(6, False), (8, False)]
    assert acks.done([5, 11], hold=False) == [(5, False), (9, False), (11, False)]


def decoded(data: bytes) -> list[Any]:
    frames = []
    while data:
        size, frame = pika.frame.decode_frame(data)
        assert frame is not None
        frames.append(frame)
        data = data[size:]
    return frames


@pytest.mark.hazard("A10")
@pytest.mark.parametrize(
    "event",
    [
        Event(id="1", target="a.b", exchange="e", body=b"{}"),
        Event(id="é" * 100, target="é" * 127, exchange="", body=b"x" * 300_000),
        Event(id="1", target="t", exchange="e", body=b"", priority=0),
        Event(
            id="1",
            target="t",
            exchange="e",
            body=b"{}",
            key="k",
            priority=255,
            headers={"a": [1, -1, 1 << 40, None, True, "é", b"\xff", {"b": {}}], "e": []},
        ),
    ],
    ids=["plain", "long", "empty", "all"],
)
@pytest.mark.parametrize("app_id", ["", "shop"])
def test_frames_equal_those_of_pikas_own_encoder(event: Event, app_id: str) -> None:
    method, header, *bodies = decoded(Encoder(app_id).encode(event))
    assert isinstance(method.method, pika.spec.Basic.Publish)
    assert (method.method.exchange, method.method.routing_key) == (event.exchange, event.target)
    assert method.method.mandatory
    assert header.body_size == len(event.body)
    properties = properties_of_event(event, app_id)
    assert header.properties == properties
    assert b"".join(body.fragment for body in bodies) == event.body
    assert all(frame.channel_number == PUBLISH_CHANNEL for frame in [method, header, *bodies])
    by_pika = pika.frame.Header(PUBLISH_CHANNEL, len(event.body), properties)
    if not event.headers:
        assert by_pika.marshal() in Encoder(app_id).encode(event)


def test_what_was_encoded_before_changes_nothing() -> None:
    headers: list[Any] = [
        {"a": "x", "b": "y"},
        {"a": "x", "b": "y"},
        {"a": "x"},
        {"a": 1, "b": "y"},
        {"a": True, "b": "y"},
        {"a": 1, "b": "y"},
        {"a": "x", "b": "y"},
    ]
    events = [
        Event(id=id, target=target, exchange="e", body=b"{}", headers=table, key=key)
        for table in headers
        for key in (None, "k")
        for target in ("t", "u")
        for id in ("1", "22")
    ]
    encoder = Encoder()
    for event in [*events, *reversed(events), *(each for each in events for _ in range(2))]:
        assert encoder.encode(event) == Encoder().encode(event)
    table = {"a": "x"}
    event = Event(id="1", target="t", exchange="e", body=b"{}", headers=table)
    encoder.encode(event)
    table["a"] = "y"
    assert encoder.encode(event) == Encoder().encode(event)


def test_a_smaller_frame_size_of_the_broker_is_respected() -> None:
    encoder = Encoder(frame_max=4096)
    event = Event(id="1", target="t", exchange="e", body=b"x" * 10_000)
    data = encoder.encode(event)
    sizes = []
    while data:
        [size] = struct.unpack(">I", data[3:7])
        sizes.append(size + 8)
        data = data[size + 8 :]
    assert max(sizes) == 4096


@pytest.mark.hazard("A18")
def test_templates_for_targets_made_of_user_data_do_not_pile_up() -> None:
    encoder = Encoder()
    for n in range(5000):
        encoder.encode(Event(id="1", target=f"user.{n}", exchange="e", body=b""))
    assert len(encoder._templates) <= 1024


def test_the_back_off_doubles_from_half_a_second_to_thirty_with_jitter() -> None:
    for attempt, most in enumerate([0.5, 1, 2, 4, 8, 16, 30, 30]):
        delays = [backoff(attempt) for _ in range(200)]
        assert most / 2 <= min(delays) < max(delays) <= most
    assert backoff(10_000) <= 30


def delivery(tag: int) -> Delivery:
    return Delivery("q", tag, 1, False, "e", "t", b"")


def test_the_first_ack_wakes_the_link_but_those_right_after_it_do_not() -> None:
    done = Done(prefetch=100)
    assert [done.add(delivery(tag)) for tag in range(1, 6)] == [True, False, False, False, False]
    assert [one.tag for one in done.take()] == [1, 2, 3, 4, 5]
    assert not done.add(delivery(6))  # there is a pause
    assert done.end_pause()
    assert [one.tag for one in done.take()] == [6]


def test_after_an_idle_pause_the_next_ack_wakes_the_link() -> None:
    done = Done(prefetch=100)
    done.add(delivery(1))
    done.take()
    assert not done.end_pause()
    assert done.add(delivery(2))


def test_a_quarter_of_the_prefetch_does_not_wait_for_the_end_of_the_pause() -> None:
    done = Done(prefetch=20)
    assert [done.add(delivery(tag)) for tag in range(1, 8)] == [True] + [False] * 3 + [
        True,
        False,
        False,
    ]
    done.take()
    assert [done.add(delivery(tag)) for tag in range(8, 13)] == [False] * 4 + [True]


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_with_a_small_prefetch_no_ack_waits(prefetch: int) -> None:
    done = Done(prefetch)
    for tag in range(1, 4):
        assert done.add(delivery(tag))
        assert [one.tag for one in done.take()] == [tag]
