"""A publisher whose connection breaks again and again leaves nothing behind."""

from __future__ import annotations

import gc
import logging
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from sqlalchemy import make_url

from outbox import Event, Publisher
from outbox.transports.rabbitmq import pika_connection
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

FDS = Path("/proc/self/fd")


def reconnect(publisher: Publisher, proxy: FaultProxy, event: Event, times: int) -> None:
    for _ in range(times):
        accepted = proxy.accepted
        proxy.cut()
        wait_until(lambda accepted=accepted: proxy.accepted > accepted)  # type: ignore[misc]
        wait_until(lambda: publisher.connected)
        assert publisher.publish([event]).ok


@pytest.mark.hazard("A18")
@pytest.mark.skipif(not FDS.exists(), reason="counts descriptors in /proc, as on Linux")
@pytest.mark.slow
def test_200_reconnects_leave_no_descriptor_no_thread_and_no_memory(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("outbox.system.backoff._FIRST_DELAY", 0.002)
    caplog.set_level(logging.CRITICAL, "outbox")  # else what is captured grows
    event = Event(id="1", target="x", exchange=name, body=b"{}", unroutable="ignore")
    with Publisher(proxy.url, exchange=name) as publisher:
        assert publisher.publish([event]).ok
        reconnect(publisher, proxy, event, 20)
        descriptors, threads = len(os.listdir(FDS)), threading.active_count()
        gc.collect()
        tracemalloc.start()
        reconnect(publisher, proxy, event, 200)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        connections = [
            # By its type: some objects of libraries raise when they are asked for their class.
            one
            for one in gc.get_objects()
            if issubclass(type(one), pika_connection.Connection)
            and one.params.port == make_url(proxy.url).port  # other tests may have left theirs
        ]
        assert len(connections) == 1
        # pika forgets cancelled timers by the thousand: some 250 kB of them, however many cuts.
        assert grown < 600_000
        assert len(os.listdir(FDS)) <= descriptors + 4  # the proxy may still be closing its last
        assert threading.active_count() == threads


@pytest.mark.hazard("A18")
@pytest.mark.slow
def test_ten_thousand_events_leave_no_memory(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, arguments={"x-max-length": 10})
    with Publisher(amqp_url, exchange=name) as publisher:

        def publish(count: int) -> None:
            for n in range(count):
                events = [
                    Event(id=f"{n}-{m}", target="x", exchange=name, body=b"x" * 500)
                    for m in range(1_000)
                ]
                assert publisher.publish(events).ok

        publish(2)
        gc.collect()
        tracemalloc.start()
        publish(10)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert size < 500_000  # the bodies alone are ten times that
