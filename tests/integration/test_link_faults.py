"""Faults of the network and the broker on the publisher's connection, frame by frame."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import pika
import pika.heartbeat
import pytest
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

from outbox import ConnectFailed, ConnectionLost, Event, Publisher, PublishReport, PublishTimeout
from outbox.transports.rabbitmq import pika_connection
from proving.proxy import (
    BLOCKED,
    UNBLOCKED,
    FaultProxy,
    Way,
    channel_close,
    connection_close,
    method_frame,
)
from tests.amqp import Inspector
from tests.waiting import wait_until

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


def events_for(name: str, count: int, target: str = "x", **options: Any) -> list[Event]:
    return [
        Event(id=f"{name}-{target}-{n}", target=target, exchange=name, body=b"{}", **options)
        for n in range(count)
    ]


def _is_down(publisher: Publisher) -> bool:
    return not publisher.connected


def ids_of(events: list[Event] | tuple[Event, ...]) -> set[str]:
    return {event.id for event in events}


@pytest.fixture
def queue(inspector: Inspector, name: str) -> str:
    """A queue that gets every event of the test's exchange."""
    return inspector.queue(name, name)


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[int]:
    """Listen on a port that answers so to every client and hangs up, or does neither; yield it."""
    clients: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                clients.append(client)
                if answer:
                    client.recv(8)
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for client in clients:
        client.close()


@contextlib.contextmanager
def slow_uplink(url: str, bytes_per_second: int) -> Iterator[str]:
    """Pass data on to the broker at this rate, with small buffers; yield the URL to use."""
    broker = pika.URLParameters(url)
    sockets: list[socket.socket] = []

    def pipe(source: socket.socket, target: socket.socket, rate: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                target.sendall(data)
                time.sleep(len(data) / rate if rate else 0)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                onward = socket.create_connection((broker.host, broker.port))
                sockets.extend((client, onward))
                for ends in ((client, onward, bytes_per_second), (onward, client, 0)):
                    threads.append(threading.Thread(target=pipe, args=ends))
                    threads[-1].start()

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        credentials, _, address = url.rpartition("@")
        port = listening.getsockname()[1]
        yield f"{credentials}@127.0.0.1:{port}/{address.partition('/')[2]}"
        for one in (listening, *sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
    for one in sockets:
        one.close()


@pytest.mark.hazard("A5")
@pytest.mark.parametrize("ways", [(Way.UP,), (Way.DOWN,), (Way.UP, Way.DOWN)], ids=str)
def test_a_half_open_link_with_events_in_flight_is_closed_after_the_stall_timeout(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str, ways: tuple[Way, ...]
) -> None:
    before, *during = events_for(name, 10)
    with Publisher(proxy.url, exchange=name, timeout=0.2, stall_timeout=0.8) as publisher:
        publisher.publish([before])  # perhaps it takes longer than that
        assert publisher.drain(10)
        proxy.black_hole(*ways)
        report = publisher.publish(during)
        assert report.kept == tuple(during)
        assert isinstance(report.error, PublishTimeout)
        assert 0.5 < wait_until(lambda: not publisher.connected) < 1.5
        proxy.heal()
        assert publisher.drain(10)
    assert ids_of([before, *during]) == {message.id for message in inspector.all(queue)}


@pytest.mark.hazard("A4")
def test_heartbeats_detect_a_half_open_link_while_nothing_is_published(
    amqp_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker: Any = pika.heartbeat.HeartbeatChecker
    start = checker._start_check_timer

    def start_sooner(self: Any) -> None:
        self._check_interval = 1.2  # pika's own: 5 seconds more than agreed, twice
        start(self)

    monkeypatch.setattr(checker, "_start_check_timer", start_sooner)
    with contextlib.ExitStack() as stack:
        publishers = []
        for ways in ((Way.UP,), (Way.DOWN,), (Way.UP, Way.DOWN)):
            proxy = stack.enter_context(FaultProxy(amqp_url))
            publisher = stack.enter_context(Publisher(proxy.url, exchange=name, heartbeat=1))
            event = events_for(name, 1, unroutable="ignore")
            assert publisher.publish(event).ok
            proxy.black_hole(*ways)
            publishers.append(publisher)
        for publisher in publishers:
            wait_until(functools.partial(_is_down, publisher), 6)


@pytest.mark.slow
def test_an_idle_half_open_link_is_noticed_soon_after_one_heartbeat(
    proxy: FaultProxy, name: str
) -> None:
    with Publisher(proxy.url, exchange=name, heartbeat=2) as publisher:
        assert publisher.publish(events_for(name, 1, unroutable="ignore")).ok
        time.sleep(2.5)
        assert publisher.connected
        proxy.black_hole()
        assert wait_until(lambda: not publisher.connected, 6) < 3.5


def test_an_outage_is_logged_again_when_its_reason_changes(
    proxy: FaultProxy, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "outbox.link" and record.levelno == logging.WARNING
        ]

    with Publisher(proxy.url.replace("guest:guest", "guest:wrong"), exchange=name) as publisher:
        proxy.refuse()
        publisher.publish(events_for(name, 3))
        wait_until(lambda: len(warnings()) == 1)
        with pytest.raises(AssertionError):  # the same failure again says nothing new
            wait_until(lambda: len(warnings()) == 2, 1.5)
        proxy.heal()
        wait_until(lambda: len(warnings()) == 2)
        publisher.close(0)
    refused, password = warnings()
    assert "refused" in refused
    assert "the broker refused the user or the password" in password
    assert "3 event(s) kept" in password


def test_a_hasty_caller_costs_others_nothing(proxy: FaultProxy, queue: str, name: str) -> None:
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish(events_for(name, 1)).ok
        proxy.delay = 0.1
        for n in range(3):
            assert publisher.publish(events_for(name, 1, f"hasty-{n}"), timeout=0.01).kept
            assert publisher.publish(events_for(name, 1, f"patient-{n}")).ok
        assert publisher.drain(5)


@pytest.mark.hazard("A5", "B15")
def test_closing_over_a_half_open_link_ends_in_time_and_names_the_lost_events(
    proxy: FaultProxy, queue: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = events_for(name, 2)
    publisher = Publisher(proxy.url, exchange=name, timeout=0.1, heartbeat=0)
    publisher.publish([first])
    assert publisher.drain(10)
    proxy.black_hole()
    assert publisher.publish([second]).kept
    begin = time.monotonic()
    assert publisher.close(0.1) == (second,)
    assert time.monotonic() - begin < 4
    assert f"1 event(s) lost, never confirmed: {second.id!r}" in caplog.text


@pytest.mark.hazard("A5", "B4")
def test_a_silent_host_costs_the_connect_timeout_and_the_next_is_tried(
    amqp_url: str, inspector: Inspector, queue: str, name: str
) -> None:
    credentials, _, address = amqp_url.rpartition("@")
    [event] = events_for(name, 1)
    with (
        server(b"") as port,
        Publisher(
            f"{credentials}@127.0.0.1:{port},{address}", exchange=name, connect_timeout=0.4
        ) as publisher,
    ):
        begin = time.monotonic()
        report = publisher.publish([event])
        assert 0.3 < time.monotonic() - begin < 1.5
        assert report.kept == (event,)
        assert isinstance(report.error, ConnectFailed)
        assert publisher.drain(1)  # no back-off: there was another host
    assert inspector.get(queue).id == event.id


@pytest.mark.hazard("A5")
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00", b"\x00" * 64]
)
def test_a_port_that_does_not_speak_amqp_is_reported_at_once_and_the_next_host_is_tried(
    amqp_url: str, inspector: Inspector, queue: str, name: str, answer: bytes
) -> None:
    credentials, _, address = amqp_url.rpartition("@")
    [event] = events_for(name, 1)
    with (
        server(answer) as port,
        Publisher(f"{credentials}@127.0.0.1:{port},{address}", exchange=name) as publisher,
    ):
        begin = time.monotonic()
        report = publisher.publish([event])
        assert isinstance(report.error, ConnectFailed)
        assert "does not speak AMQP 0-9-1" in str(report.error)
        assert publisher.drain(1)
        assert time.monotonic() - begin < 1
    assert inspector.get(queue).id == event.id


ERRORS = {
    "channel closed, 403": channel_close(403, "as if"),
    "channel closed, 404": channel_close(404, "as if"),
    "channel closed, 406": channel_close(406, "as if"),
    "channel closed, 541": channel_close(541, "as if"),
    "connection closed, 320": connection_close(320, "as if"),
    "connection closed, 501": connection_close(501, "as if"),
    "connection closed, 541": connection_close(541, "as if"),
    "malformed frame": b"\x09\x00\x00\x00\x00\x00\x01!!",
    "no end mark": b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x3d\x00",
    "unknown method": method_frame(1, 60, 999),
    "body without a header": b"\x03\x00\x01\x00\x00\x00\x01x\xce",
}
ODDITIES = {
    "heartbeat": HEARTBEAT,
    "frame on an unknown channel": method_frame(77, 60, 80, bytes(9)),
    "unexpected method": method_frame(1, 20, 11, bytes(4)),
    "confirm of an unknown number": method_frame(1, 60, 80, b"\0\0\0\0\0\0\0\x63\0"),
}


@pytest.mark.hazard("A11")
@pytest.mark.parametrize("what", [*ERRORS, *ODDITIES])
def test_after_any_error_between_events_the_publisher_recovers_by_itself(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str, what: str
) -> None:
    first, *others = events_for(name, 10)
    with Publisher(proxy.url, exchange=name, unroutable="fail") as publisher:
        assert publisher.publish([first]).ok
        proxy.inject({**ERRORS, **ODDITIES}[what])
        if what in ERRORS:
            wait_until(lambda: not publisher.connected)
        report = publisher.publish(others)
        assert report.rejected == ()
        assert publisher.drain(5)
        assert publisher.publish([first]).ok
    assert ids_of([first, *others]) == {message.id for message in inspector.all(queue)}
    assert (proxy.accepted == 1) is (what in ODDITIES)


@pytest.mark.hazard("A9")
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("what", ERRORS)
def test_an_error_while_events_are_in_flight_is_not_blamed_on_them(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str, what: str, count: int
) -> None:
    first, *others = events_for(name, 1 + count)
    with Publisher(proxy.url, exchange=name, unroutable="fail") as publisher:
        assert publisher.publish([first]).ok
        proxy.black_hole(Way.UP)
        future = publisher.submit(others)
        transport: Any = publisher._transport()
        wait_until(lambda: len(transport._confirms) == count)
        proxy.inject(ERRORS[what])
        wait_until(lambda: transport._channel is None)
        proxy.cut()
        proxy.heal()
        assert publisher.drain(5)
        assert future.result().rejected == ()
        assert publisher.stats().rejected == 0
    arrived = inspector.messages(queue, 1 + count)
    assert [message.id for message in arrived] == [event.id for event in [first, *others]]


@pytest.mark.hazard("A5")
def test_while_a_broker_blocks_callers_do_not_wait_and_it_gets_everything_when_it_unblocks(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    first, *others = events_for(name, 4)
    with Publisher(proxy.url, exchange=name, timeout=5) as publisher:
        assert publisher.publish([first]).ok
        proxy.inject(BLOCKED)
        wait_until(lambda: not publisher.connected)
        begin = time.monotonic()
        reports = [publisher.publish([event]) for event in others]
        assert time.monotonic() - begin < 0.5
        assert [report.kept for report in reports] == [(event,) for event in others]
        assert "blocks publishers" in str(reports[0].error)
        assert [m.id for m in inspector.all(queue)] == [first.id]
        proxy.inject(UNBLOCKED)
        assert publisher.drain(5)
    assert [m.id for m in inspector.all(queue)] == [event.id for event in others]
    assert proxy.accepted == 1


@pytest.mark.hazard("A5", "B5")
def test_a_caller_waiting_when_the_broker_blocks_gets_its_report_at_once(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    first, second = events_for(name, 2)
    with Publisher(proxy.url, exchange=name, timeout=5) as publisher:
        assert publisher.publish([first]).ok
        proxy.black_hole(Way.UP)
        future = publisher.submit([second])
        proxy.inject(BLOCKED)
        assert future.result(1).kept == (second,)
        proxy.heal()
        proxy.inject(UNBLOCKED)
        assert publisher.drain(5)
    assert [m.id for m in inspector.all(queue)] == [first.id, second.id]


@pytest.mark.hazard("A2")
def test_a_flush_costs_round_trips_per_chunk_not_per_event(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish(events_for(name, 1)).ok
        proxy.delay = 0.02
        begin = time.monotonic()
        assert publisher.publish(events_for(name, 50)).ok
        assert time.monotonic() - begin < 10 * 2 * proxy.delay


class Interrupted(BaseException):
    """What a time limit raises, whichever it is."""


@pytest.fixture
def interrupt_soon() -> Iterator[Callable[[type[BaseException]], None]]:
    """Raise something in the main thread in 50 ms, as a signal's handler does."""
    before = signal.getsignal(signal.SIGALRM)

    def arm(kind: type[BaseException]) -> None:
        def strike(_number: int, _frame: FrameType | None) -> None:
            raise kind

        signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.hazard("A1")
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt, SystemExit])
def test_after_an_interrupted_wait_later_reports_are_about_their_own_events(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    interrupt_soon: Callable[[type[BaseException]], None],
    caplog: pytest.LogCaptureFixture,
    kind: type[BaseException],
) -> None:
    queue = inspector.queue(name, name, ("good",))
    inspector.queue(f"{name}-full", name, ("full",), arguments=FULL)
    good = events_for(name, 4, "good")
    full = events_for(name, 2, "full")
    with Publisher(proxy.url, exchange=name, drain_timeout=0.1) as publisher:
        assert publisher.publish([good[0], full[0]]).ok  # the queue for one is full now
        proxy.delay = 0.2
        interrupt_soon(kind)
        with pytest.raises(kind):
            publisher.publish([good[1]])
        [warning] = caplog.messages
        assert kind.__name__ in warning
        assert good[1].id in warning
        assert publisher.publish([full[1]]).kept == (full[1],)
        proxy.delay = 0.0
        assert publisher.publish([good[2]]).published == (good[2],)
        assert publisher.publish([full[1]]).published == ()
        assert publisher.publish([good[3]]).published == (good[3],)
    assert [m.id for m in inspector.all(queue)] == [event.id for event in good]


@pytest.mark.hazard("A11")
@pytest.mark.parametrize("error", [FileNotFoundError, AssertionError, RuntimeError, IndexError])
def test_any_exception_while_writing_keeps_the_events_and_replaces_the_connection(
    proxy: FaultProxy,
    inspector: Inspector,
    queue: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    write = pika_connection.publish
    failures = iter([error("as if")])

    def fails_once(*arguments: Any) -> None:
        for failure in failures:
            raise failure
        write(*arguments)

    events = events_for(name, 3)
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish(events[:1]).ok
        monkeypatch.setattr(pika_connection, "publish", fails_once)
        report = publisher.publish(events[1:])
        assert report.kept == tuple(events[1:])
        assert isinstance(report.error, ConnectionLost)
        assert publisher.drain(5)
        assert publisher.publish(events[:1]).ok
    assert [m.id for m in inspector.all(queue)] == [event.id for event in [*events, events[0]]]
    assert proxy.accepted == 2
    assert "unexpected error with" in caplog.text


@pytest.mark.hazard("A9")
def test_a_poisonous_event_among_twenty_is_rejected_alone(
    proxy: FaultProxy, inspector: Inspector, queue: str, name: str
) -> None:
    internal = f"{name}-internal"  # publishing to it is forbidden: 403 closes the channel
    inspector.channel.exchange_declare(internal, "topic", internal=True)
    inspector.clean_up(exchange=internal)
    events = events_for(name, 20)
    poison = {
        4: Event(id="internal", target="x", exchange=internal, body=b"{}"),
        9: Event(id="large", target="x", exchange=name, body=b"", headers={"a": "x" * 200_000}),
        14: Event(id="type", target="x", exchange=name, body=b"{}", headers={"CC": "no list"}),
    }
    for place, event in poison.items():
        events[place] = event
    rejected: dict[str, str] = {}
    with Publisher(
        proxy.url,
        exchange=name,
        on_rejected=lambda event, reason: rejected.update({event.id: reason}),
    ) as publisher:
        report = publisher.publish(events)
        good = [event for event in events if event not in poison.values()]
        assert report.published == tuple(good)
        assert [one.event for one in report.rejected] == list(poison.values())
        assert publisher.publish(events_for(name, 1)).ok
    assert "403" in rejected["internal"]
    assert "do not fit into one frame" in rejected["large"]
    assert "406" in rejected["type"]
    assert ids_of(good) == {message.id for message in inspector.all(queue)}
    assert proxy.accepted == 1  # one event's fault costs the connection nothing


@pytest.mark.hazard("A8")
@pytest.mark.parametrize(
    "exchange", ["é" * 127, "a\nb", "e" * 255], ids=["cut", "controls", "long"]
)
def test_a_missing_exchange_is_identified_however_the_broker_quotes_its_name(
    amqp_url: str, inspector: Inspector, queue: str, name: str, exchange: str
) -> None:
    good = events_for(name, 4)
    lost = Event(id="lost", target="x", exchange=exchange, body=b"{}", unroutable="fail")
    with Publisher(amqp_url, exchange=name) as publisher:
        report = publisher.publish([*good[:2], lost, *good[2:]])
        assert report.published == tuple(good)
        assert [one.event for one in report.rejected] == [lost]
        assert report.rejected[0].reason.isprintable()
    assert ids_of(good) == {message.id for message in inspector.all(queue)}


@pytest.mark.hazard("A9")
def test_an_event_whose_headers_exceed_the_brokers_frame_size_is_rejected_alone(
    amqp_url: str, inspector: Inspector, queue: str, name: str
) -> None:
    events = events_for(name, 3)
    events[1] = Event(id="wide", target="x", exchange=name, body=b"", headers={"a": "x" * 9_000})
    with Publisher(amqp_url, exchange=name) as publisher:
        transport: Any = publisher._transport()
        transport._link._hosts[0].frame_max = 8192  # what a broker so configured would say
        report = publisher.publish(events)
        assert report.published == (events[0], events[2])
        assert [one.event for one in report.rejected] == [events[1]]
        assert "8192 bytes" in report.rejected[0].reason
        assert publisher.publish(events).published == (events[0], events[2])


def test_what_was_encoded_for_larger_frames_is_encoded_anew_whenever_it_is_sent(
    amqp_url: str, inspector: Inspector, queue: str, name: str
) -> None:
    bodies = [bytes([n]) * 20_000 for n in range(3)]
    events = [
        Event(id=f"{n}", target="x", exchange=name, body=body) for n, body in enumerate(bodies)
    ]
    with Publisher(amqp_url, exchange=name) as publisher:
        transport: Any = publisher._transport()
        transport._link._hosts[0].frame_max = 8192
        encode = transport._encoder.encode
        large = [encode(event) for event in events]
        assert publisher.publish(events[:1]).ok
        # As if a caller had encoded these just before the first connection was negotiated.
        frames = iter(large[1:])
        transport._encoder.encode = lambda event: next(frames, None) or encode(event)
        assert publisher.publish(events[1:]).ok
        assert publisher.stats().connects == 1
    assert [message.body for message in inspector.all(queue)] == bodies


@pytest.mark.timeout(60)
def test_bytes_that_the_broker_takes_keep_a_slow_link_alive(
    amqp_url: str, inspector: Inspector, queue: str, name: str
) -> None:
    small, large, *others = events_for(name, 8)
    large = replace(large, body=b"x" * (3 << 20))
    with (
        slow_uplink(amqp_url, bytes_per_second=1 << 20) as url,
        Publisher(url, exchange=name, timeout=2, stall_timeout=0.8) as publisher,
    ):
        assert publisher.publish([small]).ok
        publisher.submit([large, *others])
        assert publisher.drain(20)
        assert publisher.stats().connects == 1
    arrived = [message.id for message in inspector.all(queue)]
    assert arrived == [event.id for event in (small, large, *others)]


def test_heartbeats_that_a_silent_broker_takes_do_not_keep_the_link_alive(
    proxy: FaultProxy, queue: str, name: str
) -> None:
    before, event = events_for(name, 2)
    with Publisher(
        proxy.url, exchange=name, timeout=0.2, stall_timeout=2, heartbeat=1, drain_timeout=0.1
    ) as publisher:
        assert publisher.publish([before], timeout=10).ok
        proxy.black_hole(Way.UP)  # heartbeats still arrive, and pika goes on sending them
        assert publisher.publish([event]).kept
        assert 1 < wait_until(lambda: not publisher.connected, 6) < 5


@pytest.mark.hazard("C2")
def test_an_event_refused_by_one_of_two_queues_is_sent_again_with_the_same_id(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(f"{name}-full", name, ("both",), arguments=FULL)
    open_queue = inspector.queue(name, name, ("both",))
    inspector.publish(f"{name}-full", b"fills it")
    [event] = events_for(name, 1, "both")
    with Publisher(amqp_url, exchange=name) as publisher:
        assert publisher.publish([event]).kept == (event,)
        assert inspector.get(open_queue).id == event.id  # despite the nack, one queue has it
        assert inspector.get(f"{name}-full").body == b"fills it"
        assert publisher.drain(10)
    assert inspector.get(f"{name}-full").id == event.id
    assert inspector.get(open_queue).id == event.id


@pytest.mark.hazard("C4")
def test_an_event_is_routable_by_an_alternate_exchange_with_a_queue_but_not_without_one(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    alternate = f"{name}-alternate"
    inspector.channel.exchange_declare(alternate, "fanout", durable=True)
    inspector.clean_up(exchange=alternate)
    inspector.channel.exchange_declare(
        name, "topic", durable=True, arguments={"alternate-exchange": alternate}
    )
    inspector.clean_up(exchange=name)
    [event] = events_for(name, 1, unroutable="fail")
    with Publisher(amqp_url, exchange=name, declare="passive") as publisher:
        assert [one.event for one in publisher.publish([event]).rejected] == [event]
        inspector.queue(name)
        inspector.channel.queue_bind(name, alternate, "")
        assert publisher.publish([event]).published == (event,)
    assert inspector.get(name).id == event.id


@pytest.mark.hazard("A5")
def test_keeping_half_of_the_maximum_warns_once(
    proxy: FaultProxy, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.refuse()
    with Publisher(proxy.url, exchange=name, max_kept=10, drain_timeout=0.1) as publisher:
        for event in events_for(name, 8):
            publisher.make_ready()
            assert publisher.publish([event]).kept
        warnings = [one for one in caplog.records if "half of the limit" in one.getMessage()]
        assert len(warnings) == 1
        assert warnings[0].levelno == logging.WARNING
        assert "5 event(s)" in warnings[0].getMessage()


def test_reports_of_a_fault_are_complete(proxy: FaultProxy, queue: str, name: str) -> None:
    events = events_for(name, 5)
    with Publisher(proxy.url, exchange=name) as publisher:
        cut = proxy.cut_at(lambda frame: frame.way is Way.UP and frame.method == (60, 40))
        report = publisher.publish(events)
        assert cut.is_set()
        assert report == PublishReport(kept=tuple(events), error=report.error)
        assert publisher.drain(5)


def test_draining_keeps_trying_however_long_the_broker_was_away(
    proxy: FaultProxy, inspector: Inspector, name: str, queue: str
) -> None:
    with Publisher(proxy.url, exchange=name) as publisher:
        publisher.publish(events_for(name, 1))
        assert inspector.get(queue)
        proxy.refuse()
        assert publisher.publish(events_for(name, 1)).kept
        # As after half an hour: the next attempt is far away.
        transport: Any = publisher._own
        transport._link._failures = 20
        wait_until(lambda: transport._link._failures > 20)
        healing = threading.Timer(1.0, proxy.heal)
        healing.start()
        assert publisher.drain(5)
        healing.join()
    assert inspector.get(queue)


def test_a_connection_that_is_reset_at_once_is_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect = SelectorIOServicesAdapter.connect_socket

    def connect_and_lose(
        services: Any, sock: socket.socket, address: Any, on_done: Callable[..., None]
    ) -> Any:
        def lose(error: BaseException | None) -> None:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0)
            on_done(error)

        return connect(services, sock, address, lose)

    monkeypatch.setattr(SelectorIOServicesAdapter, "connect_socket", connect_and_lose)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Publisher(f"amqp://guest:guest@127.0.0.1:{port}/", drain_timeout=0) as publisher:
            report = publisher.publish(events_for("reset", 1))
    assert isinstance(report.error, ConnectFailed)
    assert "unexpected error" not in caplog.text
