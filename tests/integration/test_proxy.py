"""The fault proxy does what it says to a connection, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pika
import pika.exceptions
import pytest

from proving.proxy import BLOCKED, UNBLOCKED, FaultProxy, Frame, Way, connection_close, method_frame

pytestmark = pytest.mark.one_python

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"


@contextlib.contextmanager
def connected(proxy: FaultProxy, name: str = "") -> Iterator[pika.BlockingConnection]:
    parameters = pika.URLParameters(proxy.url)
    parameters.socket_timeout = parameters.stack_timeout = 2
    parameters.connection_attempts = 1
    parameters.client_properties = {"connection_name": name} if name else {}
    connection = pika.BlockingConnection(parameters)
    try:
        yield connection
    finally:
        with contextlib.suppress(Exception):
            connection.close()


def test_a_healthy_link_passes_everything_unchanged(proxy: FaultProxy, name: str) -> None:
    with connected(proxy) as connection:
        channel = connection.channel()
        channel.queue_declare(name, exclusive=True)
        body = bytes(range(256)) * 2_000  # several frames
        channel.basic_publish("", name, body)
        channel.basic_publish("", name, b"")
        assert [channel.basic_get(name, auto_ack=True)[2] for _ in range(2)] == [body, b""]
    assert proxy.accepted == 1


def test_a_cut_resets_every_connection_and_new_ones_are_accepted(proxy: FaultProxy) -> None:
    with connected(proxy) as first, connected(proxy) as second:
        proxy.cut()
        for connection in (first, second):
            with pytest.raises(pika.exceptions.AMQPConnectionError):
                connection.process_data_events(5)
    with connected(proxy) as third:
        assert third.is_open
    assert proxy.accepted == 3


def test_a_link_is_cut_instead_of_passing_the_frame_that_the_rule_names(
    proxy: FaultProxy, name: str
) -> None:
    seen: list[Frame] = []

    def at_publish(frame: Frame) -> bool:
        seen.append(frame)
        return frame.way is Way.UP and frame.method == (60, 40)

    with connected(proxy) as connection:
        channel = connection.channel()
        channel.queue_declare(name)
        cut = proxy.cut_at(at_publish)
        assert not cut.is_set()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            for _ in range(100):
                channel.basic_publish("", name, b"never arrives")
                connection.process_data_events(0.05)
        assert cut.wait(5)
    assert seen[-1].method == (60, 40)
    with connected(proxy) as connection:  # the rule holds once
        channel = connection.channel()
        assert channel.queue_declare(name, passive=True).method.message_count == 0
        channel.basic_publish("", name, b"arrives")
        channel.queue_delete(name)


def test_refused_connections_are_refused_until_it_is_healed(proxy: FaultProxy) -> None:
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 2)
    proxy.heal()
    assert proxy.port == port
    with connected(proxy) as connection:
        assert connection.is_open


@pytest.mark.parametrize("way", Way)
def test_a_black_hole_holds_one_direction_and_releases_it_when_healed(
    proxy: FaultProxy, name: str, way: Way
) -> None:
    with connected(proxy) as connection, connected(proxy) as other:
        channel = connection.channel()
        channel.queue_declare(name, exclusive=True)
        channel.basic_publish("", name, b"before")
        proxy.black_hole(way)
        channel.basic_publish("", name, b"during")
        frames: list[object] = []
        other.add_on_connection_blocked_callback(lambda *found: frames.append(found))
        proxy.inject(BLOCKED)  # from the proxy itself: it is beyond the hole
        other.process_data_events(0.3)
        assert len(frames) == 1
        proxy.heal()
        bodies = [channel.basic_get(name, auto_ack=True)[2] for _ in range(2)]
        assert bodies == [b"before", b"during"]


def test_behind_a_black_hole_a_connection_is_accepted_but_gets_no_answer(
    proxy: FaultProxy,
) -> None:
    proxy.black_hole()
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as client:
        client.sendall(b"AMQP\x00\x00\x09\x01")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.heal()
        client.settimeout(5)
        assert client.recv(1) == b"\x01"  # Connection.Start


def test_every_frame_is_delayed_in_each_direction(proxy: FaultProxy) -> None:
    with connected(proxy) as connection:
        channel = connection.channel()
        proxy.delay = 0.1
        begin = time.monotonic()
        channel.basic_qos(prefetch_count=1)
        assert 0.2 <= time.monotonic() - begin < 1


def test_a_frame_is_injected_only_into_the_connection_of_that_name(proxy: FaultProxy) -> None:
    seen: list[str] = []
    with connected(proxy, "shop one") as one, connected(proxy, "shop two") as two:
        for connection, what in ((one, "one"), (two, "two")):
            connection.add_on_connection_blocked_callback(
                lambda *_, what=what: seen.append(f"{what} blocked")
            )
            connection.add_on_connection_unblocked_callback(
                lambda *_, what=what: seen.append(f"{what} unblocked")
            )
        proxy.inject(BLOCKED, to="two")
        proxy.inject(UNBLOCKED, to="shop")
        for connection in (one, two):
            connection.process_data_events(0.3)
    assert sorted(seen) == ["one unblocked", "two blocked", "two unblocked"]


def test_a_client_recognises_injected_frames(proxy: FaultProxy) -> None:
    with connected(proxy) as connection:
        proxy.inject(HEARTBEAT)
        connection.process_data_events(0.1)
        assert connection.is_open
        proxy.inject(method_frame(0, 10, 61))
        connection.process_data_events(0.1)
        proxy.inject(connection_close(320, "forced"))
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
            connection.process_data_events(5)
        assert (caught.value.reply_code, caught.value.reply_text) == (320, "forced")
