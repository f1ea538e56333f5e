"""Whatever fails, no log contains a payload, a password or a forged line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest

from outbox import EventCollector, Publisher, UsageError
from outbox.transports.rabbitmq import pika_connection
from proving.proxy import FaultProxy, channel_close, connection_close
from tests.amqp import Inspector
from tests.waiting import wait_until

BODY, HEADER, PASSWORD = "SECRET-BODY", "SECRET-HEADER", "SECRET-PASSWORD"
FORGED = "forged\nERROR root: somebody else's line\r"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of everybody at DEBUG, pika's with it."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "pika")
    caplog.set_level(logging.DEBUG, "outbox")
    return caplog


def refused(proxy: FaultProxy, publisher: Publisher) -> None:
    proxy.refuse()
    publish(publisher)


def cut(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher)
    proxy.cut_at(lambda frame: frame.method == (60, 40))
    publish(publisher)


def stalled(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher)
    proxy.black_hole()
    publish(publisher)
    wait_until(lambda: not publisher.connected)
    proxy.heal()


def unroutable(proxy: FaultProxy, publisher: Publisher) -> None:
    for policy in ("park", "fail", "ignore"):
        publish(publisher, unroutable=policy)


def nacked(proxy: FaultProxy, publisher: Publisher) -> None:
    for _ in range(2):
        publish(publisher, target="full")


def missing_exchange(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher, exchange=f"missing\n{FORGED}")


def channel_closed(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher)
    proxy.inject(channel_close(541, FORGED))
    wait_until(lambda: not publisher.connected)
    publish(publisher)


def connection_closed(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher)
    proxy.inject(connection_close(320, FORGED))
    wait_until(lambda: not publisher.connected)
    publish(publisher)


def bug(proxy: FaultProxy, publisher: Publisher) -> None:
    publish(publisher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pika_connection, "publish", None)
        publish(publisher)


def publish(publisher: Publisher, target: str = f"lost.{FORGED}", **options: object) -> None:
    with EventCollector.use(EventCollector(publisher=publisher)) as collector:
        collector.enqueue_event(
            {"body": BODY},
            target,
            headers={"tenant": HEADER, FORGED: FORGED},
            key=FORGED,
            id=f"{target}{FORGED}"[:200],
            **options,  # type: ignore[arg-type]
        )
        collector.publish()


@pytest.mark.hazard("A13", "H5")
@pytest.mark.parametrize(
    "fails",
    [
        refused,
        cut,
        stalled,
        unroutable,
        nacked,
        missing_exchange,
        channel_closed,
        connection_closed,
        bug,
    ],
)
def test_no_failure_writes_a_body_a_password_or_a_forged_line(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    log: pytest.LogCaptureFixture,
    fails: Callable[[FaultProxy, Publisher], None],
) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    inspector.queue(f"{name}-full", name, ("full",), arguments=full)
    with Publisher(
        proxy.url, exchange=name, timeout=0.2, stall_timeout=0.3, drain_timeout=0.1
    ) as publisher:
        fails(proxy, publisher)
    check(log)
    assert [one for one in log.records if one.levelno >= logging.WARNING]


@pytest.mark.hazard("A19")
def test_a_refused_password_is_in_no_log(
    amqp_url: str, name: str, log: pytest.LogCaptureFixture
) -> None:
    host = amqp_url.rpartition("@")[2]
    url = f"amqp://guest:{PASSWORD}@{host}"
    with Publisher(url, exchange=name, drain_timeout=0.1) as publisher:
        publish(publisher)
        log.records.append(logging.makeLogRecord({"msg": repr(publisher)}))
    check(log)
    assert "refused the user or the password" in log.text


@pytest.mark.hazard("A19")
@pytest.mark.parametrize(
    "url",
    [
        f"amqp://user:{PASSWORD}/@host/",
        f"amqp://user:{PASSWORD}:x@host",
        f"amqp://user:{PASSWORD}@host:port",
        f"http://user:{PASSWORD}@host",
        f"amqp://user:{PASSWORD}@host/?no_such_option={PASSWORD}",
    ],
)
def test_an_unusable_url_is_reported_without_its_password(
    url: str, log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError) as caught:
        Publisher(url)
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in repr(caught.value.__cause__)
    check(log)


def check(log: pytest.LogCaptureFixture) -> None:
    """Look at every record as a handler would write it, the traceback and the arguments with it."""
    formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    for record in log.records:
        if record.name == "asyncio":
            continue
        text = formatter.format(record)
        for secret in (BODY, HEADER, PASSWORD, json.dumps(BODY)):
            assert secret not in text
        assert "\nERROR root: somebody" not in text
        assert "\r" not in text
