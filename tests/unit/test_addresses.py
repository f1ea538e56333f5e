"""Which addresses take events, without a broker."""

from __future__ import annotations

import pytest

from outbox import Event
from outbox.backlog.chunk import Chunk, Entry
from outbox.transports.rabbitmq.amqp.encoder import PUBLISH_CHANNEL, Encoder, on_channel
from outbox.transports.rabbitmq.holding.addresses import PARKING, Addresses
from outbox.transports.rabbitmq.holding.replies import Complaint, complaint_about, is_quoted_whole

OWN = ("own", "")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def entries_for(*exchanges: str, target: str = "x") -> list[Entry]:
    events = [
        Event(id=f"{n}", target=target, exchange=e, body=b"") for n, e in enumerate(exchanges)
    ]
    return Chunk(events).entries


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def addresses(clock: Clock) -> Addresses:
    addresses = Addresses(clock=clock)
    addresses.opened("own")
    return addresses


def test_the_first_event_for_an_address_is_tried_and_later_ones_wait_behind_it(
    addresses: Addresses,
) -> None:
    entries = entries_for("own", "", "other", "own", "other")
    assert addresses.all_known([entries[0], entries[1], entries[3]])
    assert not addresses.all_known(entries)
    result = addresses.sort(entries)
    assert result.ready == [entries[0], entries[1], entries[3]]
    assert result.fresh == [("other", "")]
    [later] = entries_for("other")
    assert addresses.sort([later]).fresh == []
    assert addresses.learn(("other", "")) == [entries[2], entries[4], later]
    assert addresses.all_known(entries)
    assert addresses.sort(entries).ready == entries


def test_what_is_known_ends_with_the_connection_and_what_was_held_is_returned_in_order(
    addresses: Addresses,
) -> None:
    entries = entries_for("a", "b", "a")
    addresses.sort(entries)
    assert addresses.closed() == [entries[0], entries[2], entries[1]]
    addresses.opened("")
    assert addresses.sort(entries_for("own")).fresh == [OWN]


def test_a_fault_is_remembered_for_some_seconds(addresses: Addresses, clock: Clock) -> None:
    entries = entries_for("gone", "gone")
    addresses.sort(entries[:1])
    assert addresses.fail(("gone", ""), "404") == entries[:1]
    assert [fault.reason for _, fault in addresses.sort(entries).faulty] == ["404", "404"]
    clock.now += 5.1
    assert addresses.sort(entries).fresh == [("gone", "")]


def test_a_refused_address_says_why_it_holds_new_events(addresses: Addresses) -> None:
    entries = entries_for("own", "own")
    hold = addresses.hold(OWN, entries[:1])
    hold.failures, hold.reason = 1, "403"
    assert addresses.sort(entries[1:]).refused == [(entries[1], "403")]
    assert addresses.learn(OWN) == entries


def test_each_target_of_a_guarded_exchange_is_an_address(addresses: Addresses) -> None:
    addresses.guard("own")
    [one], [other] = entries_for("own", target="a"), entries_for("own", target="b")
    assert addresses.sort([one, other]).fresh == [("own", "a"), ("own", "b")]
    assert addresses.learn(("own", "a")) == [one]
    assert addresses.sort([one]).ready == [one]
    assert addresses.sort(entries_for("")).ready


def test_parked_events_are_tried_apart_from_others_for_the_default_exchange(
    addresses: Addresses,
) -> None:
    [entry] = entries_for("own")
    entry.parked_as = Event(id="0", target="outbox.unroutable", exchange="", body=b"")
    addresses.note_parked()
    assert not addresses.all_known([entry])
    assert addresses.sort([entry]).fresh == [PARKING]
    addresses.learn(PARKING)
    assert addresses.all_known([entry])


def test_a_suspect_is_tried_over_another_connection_and_holds_up_no_others(
    addresses: Addresses,
) -> None:
    suspect, other = entries_for("own", "own")
    addresses.suspect([suspect])
    result = addresses.sort([suspect, other])
    assert (result.ready, result.fresh) == ([other], [suspect])
    assert addresses.must_be_apart(suspect)
    assert not addresses.must_be_apart(OWN)
    addresses.abandon(suspect)
    assert addresses.sort([suspect]).ready == [suspect]


def test_memory_is_bounded_whatever_names_come(addresses: Addresses) -> None:
    for n in range(25_000):
        addresses.fail((f"gone-{n}", ""), "404")
        addresses.learn((f"there-{n}", ""))
        addresses.learn(("guarded", f"{n}"))
    collections = (addresses._faulty, addresses._known, addresses._known_targets)
    assert all(len(collection) <= 10_000 for collection in collections)
    assert not addresses.holds


@pytest.mark.parametrize(
    ("code", "text", "complaint"),
    [
        (404, "404 NOT_FOUND - no exchange 'e' in vhost '/'", Complaint.MISSING),
        (404, "404 NOT_FOUND - no exchange 'f' in vhost '/'", None),
        (403, "403 ACCESS_REFUSED - access to exchange 'e' in vhost '/' refused for user 'u'",
         Complaint.FORBIDDEN),
        (403, "403 ACCESS_REFUSED - write access to exchange 'e' in vhost '/' refused for user 'u'",
         Complaint.FORBIDDEN),
        (403, "403 ACCESS_REFUSED - write access to exchange 'amq.default' in vhost '/' refused",
         None),
        (403, "403 ACCESS_REFUSED - access to topic 'x' in exchange 'e' in vhost '/' refused",
         Complaint.FORBIDDEN_TOPIC),
        (403, "403 ACCESS_REFUSED - access to topic 'y' in exchange 'e' in vhost '/'", None),
        (403, "403 ACCESS_REFUSED - cannot publish to internal exchange 'e' in vhost '/'",
         Complaint.INTERNAL),
        (403, "403 ACCESS_REFUSED - Provided JWT token has expired", None),
        (406, "406 PRECONDITION_FAILED - no exchange 'e' in vhost '/'", None),
    ],
)  # fmt: skip
def test_what_a_reply_says_about_an_address(
    code: int, text: str, complaint: Complaint | None
) -> None:
    event = Event(id="1", target="x", exchange="e", body=b"")
    assert complaint_about(event, code, text) is complaint


def test_a_refusal_of_the_default_exchange_is_recognised() -> None:
    text = "403 ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'"
    event = Event(id="1", target="q", exchange="", body=b"")
    assert complaint_about(event, 403, text) is Complaint.FORBIDDEN


@pytest.mark.parametrize(
    ("name", "whole"), [("a" * 255, True), ("é" * 60, True), ("é" * 127, False), ("", True)]
)
def test_long_names_that_are_not_ascii_may_be_cut_in_a_character(name: str, whole: bool) -> None:
    assert is_quoted_whole(name) is whole


@pytest.mark.parametrize("size", [0, 1, 300])
def test_frames_move_to_another_channel_and_back(size: int) -> None:
    event = Event(id="1", target="x", exchange="e", body=b"y" * size, headers={"a": 1})
    frames = Encoder(frame_max=200).encode(event)
    moved = on_channel(2_047, frames)
    assert moved != frames
    assert moved.count(b"\x07\xff") >= 2
    assert on_channel(PUBLISH_CHANNEL, moved) == frames
