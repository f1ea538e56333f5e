"""Events whose address takes none: missing exchanges, missing permissions, and what ends links."""

from __future__ import annotations

import datetime
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outbox import Event, Nacked, Publisher
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.testing.broker import PrivateBroker
from proving.proxy import FaultProxy, Way, channel_close
from tests.amqp import Inspector
from tests.waiting import wait_until

ALL = ".*"
JWT_EXPIRED = "ACCESS_REFUSED - Provided JWT token has expired at timestamp 1"


def events_for(exchange: str, count: int, target: str = "x", **options: Any) -> list[Event]:
    prefix = f"{exchange[-40:]}-{target}"
    return [
        Event(id=f"{prefix}-{n}", target=target, exchange=exchange, body=b"{}", **options)
        for n in range(count)
    ]


def ids_in(inspector: Inspector, queue: str) -> list[str]:
    return [message.id for message in inspector.all(queue)]


@pytest.fixture
def queue(inspector: Inspector, name: str) -> str:
    """A queue that gets every event of the test's exchange."""
    return inspector.queue(name, name)


class App:
    """A user with few permissions, on an empty virtual host of a private broker."""

    def __init__(self, broker: PrivateBroker) -> None:
        self._broker = broker
        self.admin_url = broker.empty_url()
        self._vhost = self.admin_url.rpartition("/")[2]
        self.user = f"app-{uuid.uuid4().hex[:8]}"
        broker.ctl("add_user", self.user, "pw")
        self.url = self.admin_url.replace("guest:guest", f"{self.user}:pw")
        self.inspector = Inspector(self.admin_url)

    def may(self, *, configure: str = ALL, write: str = ALL) -> None:
        read = r"^outbox\.delay\..*$"
        self._broker.ctl("set_permissions", "-p", self._vhost, self.user, configure, write, read)

    def may_send(self, exchange: str, topics: str) -> None:
        self._broker.ctl(
            "set_topic_permissions", "-p", self._vhost, self.user, exchange, topics, ALL
        )


@pytest.fixture
def app(private_broker: PrivateBroker) -> Iterator[App]:
    app = App(private_broker)
    yield app
    app.inspector.close()


def test_events_to_missing_exchanges_cost_others_no_duplicate_and_no_connection(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    good = events_for(name, 400)
    lost = [
        event
        for n in range(200)
        for event in events_for(f"{name}-missing-{n % 50}", 1, str(n), unroutable="fail")
    ]
    with Publisher(proxy.url, exchange=name, timeout=20) as publisher:
        futures = [
            publisher.submit([*good[at : at + 2], lost[at // 2]]) for at in range(0, len(good), 2)
        ]
        reports = [future.result(20) for future in futures]
        assert [event for report in reports for event in report.published] == good
        assert [one.event for report in reports for one in report.rejected] == lost
        assert all("no exchange" in one.reason for report in reports for one in report.rejected)
        assert ids_in(inspector, queue) == [event.id for event in good]
    assert proxy.accepted == 1


@pytest.mark.slow
def test_a_missing_exchange_is_looked_for_again_after_some_seconds(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    late = f"{name}-late"
    event, again = events_for(late, 2, unroutable="fail")
    with Publisher(amqp_url, exchange=name) as publisher:
        assert publisher.publish([event]).rejected
        inspector.queue(late, late)
        wait_until(lambda: publisher.publish([again]).ok, 10)
    assert ids_in(inspector, late) == [again.id]


def test_an_exchange_that_is_deleted_later_is_forgotten(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    other = f"{name}-other"
    inspector.queue(other, other)
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish(events_for(other, 3)).ok
        inspector.channel.exchange_delete(other)
        gone = events_for(other, 5, "gone", unroutable="fail")
        assert [one.event for one in publisher.publish(gone).rejected] == gone
        good = events_for(name, 100)
        assert publisher.publish([*good[:50], *gone, *good[50:]]).published == tuple(good)
        assert ids_in(inspector, queue) == [event.id for event in good]
    assert proxy.accepted == 1


def test_the_publishers_own_exchange_is_declared_again_and_the_events_are_sent(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with Publisher(amqp_url, exchange=name) as publisher:
        assert publisher.publish(events_for(name, 1)).ok
        inspector.channel.exchange_delete(name)
        lost, *others = events_for(name, 20, "later", unroutable="ignore")
        assert publisher.publish([lost]).ignored == (lost,)  # nothing is bound to the new one
        inspector.channel.queue_bind(name, name, "#")  # fails if there is none
        assert publisher.publish(others).published == tuple(others)
        assert publisher.stats().connects == 1


@pytest.mark.slow
def test_an_exchange_the_user_may_not_write_to_holds_up_its_own_events_only(
    app: App, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    closed = f"{name}-closed"
    for exchange in (name, closed):
        app.inspector.queue(exchange, exchange)
    app.may(write=f"^({name}|amq.default)$")
    held, good = events_for(closed, 60), events_for(name, 120)
    with Publisher(app.url, exchange=name, max_kept=50) as publisher:
        for n in range(60):
            report = publisher.publish([good[2 * n], held[n], good[2 * n + 1]])
            assert report.published == (good[2 * n], good[2 * n + 1])
            assert report.kept == (held[n],)
            assert isinstance(report.error, Nacked)
        publisher.check_room(30)  # beyond the first 50, held events count like others
        assert ids_in(app.inspector, name) == [event.id for event in good]
        assert [one for one in caplog.messages if "grant the user write permission" in one]
        app.may()
        assert publisher.drain(15)
        assert publisher.stats().rejected == 0
        assert publisher.publish(held[:1]).ok
    assert ids_in(app.inspector, closed) == [event.id for event in [*held, held[0]]]


def is_kept_after(pause: float, publisher: Publisher, exchange: str) -> bool:
    time.sleep(pause)
    return bool(publisher.publish(events_for(exchange, 1, "z")).kept)


@pytest.mark.slow
def test_a_permission_that_is_withdrawn_for_a_moment_costs_no_event(app: App, name: str) -> None:
    app.inspector.queue(name, name)
    app.may()
    with Publisher(app.url, exchange=name) as publisher:
        assert publisher.publish(events_for(name, 1)).ok
        app.may(write="^$")
        events = events_for(name, 100, "y")
        # A channel caches a permission until it has been idle for a second or two.
        wait_until(lambda: is_kept_after(3.0, publisher, name), 20)
        reports = [publisher.publish(events[at : at + 10]) for at in range(0, 100, 10)]
        assert not [report for report in reports if report.rejected or report.parked]
        assert all(report.kept for report in reports)
        app.may()
        assert publisher.drain(15)
        assert publisher.stats().rejected == 0
    arrived = [one for one in ids_in(app.inspector, name) if "-y-" in one]
    assert list(dict.fromkeys(arrived)) == [event.id for event in events]


@pytest.mark.slow
def test_a_routing_key_the_user_may_not_use_holds_up_no_others(app: App, name: str) -> None:
    app.inspector.queue(name, name)
    app.may()
    app.may_send(name, "^good")
    good = events_for(name, 40, "good")
    with Publisher(app.url, exchange=name) as publisher:
        for n in range(20):
            bad = events_for(name, 2, f"bad-{n}")
            report = publisher.publish([good[2 * n], *bad, good[2 * n + 1]])
            assert report.published == (good[2 * n], good[2 * n + 1])
            assert report.kept == tuple(bad)
        app.may_send(name, ALL)
        assert publisher.drain(15)
        assert publisher.publish(events_for(name, 1, "bad-0")).ok
    arrived = ids_in(app.inspector, name)
    assert len(set(arrived)) == 40 + 40
    # That a routing key is refused shows on the publishing channel, but only the first time.
    twice = {one for one in arrived if arrived.count(one) > 1}
    assert twice <= {good[0].id, good[1].id, f"{name}-bad-0-0"}


@pytest.mark.slow
def test_a_missing_exchange_is_unroutable_even_if_the_user_may_not_write_to_it(
    app: App, name: str
) -> None:
    app.may(write=f"^({name}|amq.default)$")
    lost = events_for(f"{name}-missing", 2)
    with Publisher(app.url, exchange=name) as publisher:
        assert publisher.publish(lost).parked or publisher.drain(10)
        assert publisher.stats().parked == 2


@pytest.mark.parametrize("lacks", ["write", "configure"])
@pytest.mark.slow
def test_events_that_cannot_be_parked_are_kept_beside_the_others(
    app: App, name: str, lacks: str, caplog: pytest.LogCaptureFixture
) -> None:
    app.inspector.queue(name, name, ("good",))
    own = f"^{name}$"
    app.may(configure=own, write=own if lacks == "write" else f"^({name}|amq.default)$")
    unroutable, good = events_for(name, 60, "bad"), events_for(name, 60, "good")
    with Publisher(app.url, exchange=name, max_kept=50) as publisher:
        for n in range(50):
            publisher.check_room(1)
            report = publisher.publish([good[n], unroutable[n]])
            assert report.published == (good[n],)
            assert report.kept == (unroutable[n],)
        publisher.check_room(49)
        assert publisher.stats().kept == 50
        assert ids_in(app.inspector, name) == [event.id for event in good[:50]]
        errors = [one for one in caplog.records if one.levelno == logging.ERROR]
        assert len(errors) == 1  # and not one for each event
        remedy = "'amq.default'" if lacks == "write" else "create the durable queue"
        assert remedy in errors[0].getMessage()
        app.may()
        assert publisher.drain(20)
        assert publisher.stats().parked == 50
    parked = ids_in(app.inspector, PARKING_QUEUE)
    assert parked == [event.id for event in unroutable[:50]]


@pytest.mark.slow
def test_the_documented_permissions_suffice_to_publish_to_park_and_to_delay(
    app: App, name: str
) -> None:
    app.inspector.queue(f"{name}-q", name, ("good",))
    app.may(
        configure=rf"^{name}$|^outbox\.(unroutable|delay\..*)$",
        write=rf"^{name}$|^amq\.default$|^outbox\.(unroutable|delay\..*)$|^{name}-q$",
    )
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    with Publisher(app.url, exchange=name) as publisher:
        good = events_for(name, 1, "good")
        delayed = events_for(name, 1, "good", deliver_at=soon)
        to_queue = events_for("", 1, f"{name}-q", deliver_at=soon)
        assert publisher.publish([*good, *delayed, *to_queue]).ok
        publisher.publish(events_for(name, 1, "bad"))
        assert publisher.drain(10)
        assert publisher.stats().parked == 1
    assert len(app.inspector.messages(f"{name}-q", 3)) == 3


def test_an_expired_token_is_not_the_fault_of_an_event(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    before, *events = events_for(name, 2)
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish([before]).ok
        transport: Any = publisher._transport()
        proxy.black_hole(Way.UP)
        future = publisher.submit(events)
        for _ in range(2):  # alone in flight, twice
            wait_until(lambda: len(transport._confirms) == 1)
            proxy.inject(channel_close(403, JWT_EXPIRED))
            wait_until(lambda: transport._channel is None or future.done())
            proxy.heal()
            if not future.done():
                wait_until(lambda: transport._channel is not None or future.done())
        assert publisher.drain(10)
        assert publisher.stats().rejected == 0
    assert set(ids_in(inspector, queue)) == {event.id for event in (before, *events)}


@pytest.fixture
def broken_encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Publisher, str, bool], None]:
    """Have a publisher encode an event so that the broker ends the connection (501)."""

    def break_it(publisher: Publisher, event_id: str, parked_too: bool) -> None:
        encoder = publisher._transport()._encoder  # type: ignore[attr-defined]
        encode = encoder.encode

        def encode_badly(event: Event) -> bytes:
            frames: bytes = encode(event)
            bad = event.id == event_id and (parked_too or event.exchange)
            return frames[:-1] + b"\x00" if bad else frames  # no end mark

        monkeypatch.setattr(encoder, "encode", encode_badly)

    return break_it


@pytest.mark.parametrize("parked_too", [False, True])
def test_an_event_that_ends_the_connection_is_isolated_and_given_up_or_parked(
    amqp_url: str,
    inspector: Inspector,
    queue: str,
    name: str,
    parked_too: bool,
    broken_encoder: Callable[[Publisher, str, bool], None],
) -> None:
    events = events_for(name, 30)
    poison = events[17]
    with Publisher(amqp_url, exchange=name) as publisher:
        assert publisher.publish(events[:1]).ok
        broken_encoder(publisher, poison.id, parked_too)
        publisher.publish(events[1:])
        assert publisher.drain(20)
        stats = publisher.stats()
        assert (stats.parked, stats.rejected) == ((0, 1) if parked_too else (1, 0))
        connects = publisher.stats().connects
        assert connects <= 3 + parked_too
        assert publisher.publish(events_for(name, 10, "y")).ok
        assert publisher.stats().connects == connects
    good = {event.id for event in events} - {poison.id}
    assert good <= set(ids_in(inspector, queue))


def test_an_exchange_whose_name_the_broker_cannot_quote_costs_the_others_nothing(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    good = events_for(name, 60)
    lost = events_for("é" * 127, 30, unroutable="fail")
    with Publisher(proxy.url, exchange=name) as publisher:
        for n in range(30):
            report = publisher.publish([good[2 * n], lost[n], good[2 * n + 1]])
            assert report.published == (good[2 * n], good[2 * n + 1])
            assert [one.event for one in report.rejected] == [lost[n]]
        assert publisher.stats().connects == 1
        assert ids_in(inspector, queue) == [event.id for event in good]


def test_trials_of_many_addresses_at_once_leave_the_publishing_channel_alone(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    """More addresses than trials may run at once, some of which exist, from several threads."""
    existing = [f"{name}-{n}" for n in range(6)]
    for exchange in existing:
        inspector.queue(exchange, exchange)
    failures: list[object] = []

    def publish(thread: int) -> None:
        for n in range(30):
            good = [Event(id=f"{thread}-{n}", target="x", exchange=e, body=b"") for e in existing]
            bad = events_for(f"{name}-no-{thread}-{n}", 1, unroutable="ignore")
            report = publisher.publish([*good, *bad])
            if report.published != tuple(good) or report.ignored != tuple(bad):
                failures.append(report)

    with Publisher(proxy.url, exchange=name, timeout=20) as publisher:
        threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for exchange in existing:
        ids = ids_in(inspector, exchange)
        assert len(ids) == len(set(ids)) == 120
    assert proxy.accepted == 1
