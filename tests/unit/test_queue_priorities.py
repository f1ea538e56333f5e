"""Priorities of consumers and what brokers support, without a broker."""

from __future__ import annotations

from typing import Any

import pytest

from outbox import UsageError
from outbox.consumers import Consumer, ReceivedEvent, consumer
from outbox.consumers.discovery import selected
from outbox.messages.delivery import QueueSpec
from outbox.transports.rabbitmq.topology import obstacle


def handle(event: ReceivedEvent) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "quorum"),
        ({"max_priority": 10}, "classic"),
        ({"max_priority": 10, "queue_type": "quorum"}, "quorum"),
        ({"queue_type": "classic"}, "classic"),
    ],
)
def test_a_queue_with_priorities_is_classic_unless_the_consumer_asks_for_quorum(
    options: dict[str, Any], kind: str
) -> None:
    spec = consumer("q", **options)(handle).spec("outbox")
    assert (spec.queue_type, spec.max_priority) == (kind, options.get("max_priority"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_priority": 0}, "max_priority is 0, not an int from 1 to 255"),
        ({"max_priority": 256}, "max_priority is 256"),
        ({"max_priority": True}, "max_priority is True"),
        ({"max_priority": "9"}, "max_priority is '9'"),
        ({"queue_type": "stream"}, "queue_type is 'stream', not 'quorum' or 'classic'"),
    ],
)
def test_impossible_queue_options_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        consumer("q", **options)(handle)
    with pytest.raises(UsageError, match=expected):
        type("Named", (Consumer,), options)


def spec(max_priority: int | None, queue_type: Any) -> QueueSpec:
    return QueueSpec("q", (), "", max_priority=max_priority, queue_type=queue_type)


@pytest.mark.parametrize("version", [(), (3, 10), (3, 13), (4, 0), (4, 2), (4, 3)])
def test_classic_queues_have_priorities_in_every_version(version: tuple[int, ...]) -> None:
    assert obstacle(spec(255, "classic"), version) is None
    assert obstacle(spec(None, "quorum"), version) is None


@pytest.mark.hazard("C11")
@pytest.mark.parametrize(
    ("version", "highest", "expected"),
    [
        ((3, 10), 1, "in RabbitMQ 3.10 quorum queues have no priorities; omit queue_type"),
        ((3, 13), 10, "no priorities"),
        ((4, 0), 10, "have two, up to 4 and above, and deliver them in turns"),
        ((4, 2), 10, "have two"),
        ((4, 3), 32, "priorities up to 31"),
    ],
)
def test_priorities_that_quorum_queues_do_not_support_are_reported(
    version: tuple[int, ...], highest: int, expected: str
) -> None:
    found = obstacle(spec(highest, "quorum"), version)
    assert found is not None
    assert expected in found


@pytest.mark.parametrize("version", [(), (4, 3), (5, 0)])
def test_priorities_that_quorum_queues_support_are_allowed(version: tuple[int, ...]) -> None:
    assert obstacle(spec(31, "quorum"), version) is None


KNOWN = {"high", "medium", "low", "other", "a,b"}


def consumers() -> list[Consumer]:
    return [consumer(queue)(handle) for queue in sorted(KNOWN)]


@pytest.mark.parametrize(
    ("groups", "ranks"),
    [
        ([], {}),
        (["high"], {"high": 0}),
        (["high", "low"], {"high": 0, "low": 0}),
        (["high,medium,low"], {"high": 0, "medium": 1, "low": 2}),
        (["high, low", "other"], {"high": 0, "low": 1, "other": 0}),
        (["a,b"], {"a,b": 0}),
        (["high", "high"], {"high": 0}),
    ],
)
def test_queues_in_one_option_are_ordered_but_those_in_several_options_are_not(
    groups: list[str], ranks: dict[str, int]
) -> None:
    found, ordered = selected(consumers(), groups)
    assert ordered == ranks
    assert {one.queue for one in found} == (set(ranks) or KNOWN)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["high,lwo"], "no consumer has the queue 'lwo'; the queues are 'a,b', 'high'"),
        (["high,"], "no consumer has the queue ''"),
        (["high,low,high"], "twice"),
        (["high,low", "low"], "twice"),
    ],
)
def test_queues_without_a_clear_order_are_refused(groups: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        selected(consumers(), groups)
