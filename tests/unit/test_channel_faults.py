"""Which event the broker closed the channel over, without a broker."""

from __future__ import annotations

import pytest

from outbox import Event
from outbox.backlog.chunk import Chunk, Entry
from outbox.transports.rabbitmq.channel_faults import ChannelFaults, Verdict

REFUSED = (406, "406 PRECONDITION_FAILED - invalid expiration")
INTERNAL = (541, "541 INTERNAL_ERROR")
MISSING = (404, "404 NOT_FOUND - no exchange 'gone' in vhost '/'")


def entries_of(*ids: str, exchange: str = "e") -> list[Entry]:
    return Chunk([Event(id=one, target="x", exchange=exchange, body=b"") for one in ids]).entries


def test_of_several_events_all_are_suspects_until_as_many_are_answered() -> None:
    faults = ChannelFaults()
    entries = entries_of("a", "b", "c")
    isolating = [faults.to_isolate > 0]
    assert faults.judge(entries, *REFUSED) == Verdict(again=entries)
    for answered in (0, 2, 1):
        faults.answered(answered)
        isolating.append(faults.to_isolate > 0)
    assert isolating == [False, True, True, False]


def test_an_event_is_rejected_only_when_it_closes_the_channel_alone_and_twice() -> None:
    faults = ChannelFaults()
    entries = entries_of("a", "b")
    alone = entries[:1]
    faults.judge(entries, *REFUSED)
    assert faults.judge(alone, *REFUSED) == Verdict(again=alone)
    assert faults.judge(alone, *REFUSED) == Verdict(rejected=alone)
    faults.answered(1)
    assert not faults.to_isolate


def test_one_that_another_was_accused_after_has_to_close_it_twice_again() -> None:
    faults = ChannelFaults()
    first, second = entries_of("a"), entries_of("b")
    for entries in (first, second, first):
        assert faults.judge(entries, *REFUSED) == Verdict(again=entries)


def test_the_brokers_own_trouble_costs_an_event_a_back_off_and_no_more() -> None:
    faults = ChannelFaults()
    alone = entries_of("a")
    for _ in range(5):
        assert faults.judge(alone, *INTERNAL) == Verdict(later=alone)
        assert not faults.to_isolate


def test_events_to_an_exchange_that_is_reported_missing_are_unroutable_and_others_go_on() -> None:
    faults = ChannelFaults()
    lost, fine = entries_of("a", "c", exchange="gone"), entries_of("b", "d")
    faults.judge(fine, *REFUSED)
    mixed = [lost[0], fine[0], lost[1], fine[1]]
    assert faults.judge(mixed, *MISSING) == Verdict(again=fine, unroutable=lost)
    assert not faults.to_isolate


@pytest.mark.parametrize("text", ["404 NOT_FOUND", "404 NOT_FOUND - no exchange 'other' in vhost"])
def test_an_exchange_that_is_missing_unnamed_makes_its_event_unroutable_in_the_end(
    text: str,
) -> None:
    faults = ChannelFaults()
    alone = entries_of("a")
    assert faults.judge(alone, 404, text) == Verdict(again=alone)
    assert faults.judge(alone, 404, text) == Verdict(unroutable=alone)


FORBIDDEN = (403, "403 ACCESS_REFUSED - access to exchange 'closed' in vhost '/' refused for user")
TOPIC = (403, "403 ACCESS_REFUSED - access to topic 'x' in exchange 'closed' in vhost '/' refused")
INTERNAL_EXCHANGE = (
    403,
    "403 ACCESS_REFUSED - cannot publish to internal exchange 'closed' in vhost",
)


def test_events_to_a_forbidden_exchange_are_refused_not_rejected_and_others_go_on() -> None:
    faults = ChannelFaults()
    closed, fine = entries_of("a", "c", exchange="closed"), entries_of("b")
    mixed = [closed[0], fine[0], closed[1]]
    assert faults.judge(mixed, *FORBIDDEN) == Verdict(again=fine, refused=closed)
    assert faults.judge(mixed, *TOPIC) == Verdict(again=fine, refused=closed, by_topic=True)
    assert faults.judge(mixed, *INTERNAL_EXCHANGE) == Verdict(again=fine, rejected=closed)
    assert not faults.to_isolate


def test_an_event_refused_without_a_name_is_kept_for_the_refusal_may_be_about_the_user() -> None:
    faults = ChannelFaults()
    alone = entries_of("a")
    expired = (403, "403 ACCESS_REFUSED - Provided JWT token has expired")
    assert faults.judge(alone, *expired) == Verdict(again=alone)
    assert faults.judge(alone, *expired) == Verdict(refused=alone)


def test_when_the_connection_ends_several_are_isolated_and_one_alone_is_a_suspect() -> None:
    faults = ChannelFaults()
    entries = entries_of("a", "b")
    assert faults.connection_ended(entries) is None
    assert faults.to_isolate == 2
    assert faults.connection_ended(entries[:1]) is entries[0]
    assert faults.to_isolate == 1
