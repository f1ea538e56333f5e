"""Taps: they see what passes by, take nothing away, and say what they may have missed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import aiormq
import pytest
from aio_pika.connection import make_url

from outbox import ConnectFailed, NotConfigured, Publisher, UsageError, configure
from outbox.consumers import ReceivedEvent
from outbox.settings import Settings
from outbox.tap import Tap, tapped_queue
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.url import BrokerURL
from proving.proxy import FaultProxy
from tests.amqp import Inspector, Unwritten, properties_of
from tests.integration.test_worker import send

PROMPTLY = 20.0  # seconds, on a busy machine


def sent(publisher: Publisher, target: str, *payloads: Any, **options: Any) -> list[str]:
    """Publish from another thread: waiting for confirms on the loop's is refused."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(send, publisher, target, *payloads, **options).result(PROMPTLY)


async def taken(events: AsyncIterator[ReceivedEvent], count: int) -> list[ReceivedEvent]:
    async with asyncio.timeout(PROMPTLY):
        return [await anext(events) for _ in range(count)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(PROMPTLY):
        while not condition():  # noqa: ASYNC110  nothing signals it
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_tap_sees_what_matches_in_order_and_takes_nothing_away(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    async with Tap("order.*", "photo.#", url=amqp_url, exchange=name) as tap:
        events = aiter(tap)
        options: dict[str, Any] = {"key": "k", "headers": {"tenant": 7}}
        ids = sent(publisher, "order.placed", *range(1_000), **options)
        ids += sent(publisher, "order.placed.late", 0) + sent(publisher, "photo", 0)
        seen = await taken(events, 1_001)
    assert [event.id for event in seen] == [*ids[:1_000], ids[-1]]
    first = seen[0]
    assert (first.payload, first.target, first.exchange) == (0, "order.placed", name)
    assert (first.key, first.headers, first.queue) == ("k", {"tenant": 7}, "")
    assert tap.dropped == 0
    assert [message.id for message in inspector.messages(name, 1_002)] == ids


@pytest.mark.asyncio
async def test_several_exchanges_are_tapped_and_an_event_is_seen_once(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    other = f"{name}-other"
    for exchange in (name, other):
        inspector.queue(f"{exchange}-queue", exchange)
    async with Tap("a.#", "a.*", url=amqp_url, exchange=[name, other, name]) as tap:
        for exchange in (name, other):
            inspector.publish("a.b", b"1", exchange)
        seen = await taken(aiter(tap), 2)
        assert [event.exchange for event in seen] == [name, other]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(aiter(tap))


@pytest.mark.asyncio
async def test_without_a_block_the_loop_connects_and_disconnects(
    amqp_url: str, inspector: Inspector, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector.clean_up(exchange=name)
    monkeypatch.setenv("OUTBOX_EXCHANGE", name)
    with FaultProxy(amqp_url) as proxy:
        monkeypatch.setenv("OUTBOX_URL", proxy.url)

        async def publish() -> None:
            await until(lambda: proxy.accepted)
            while True:  # it can't be seen from outside when the queue is bound
                await asyncio.sleep(0.05)
                inspector.publish("x", b"[1]", name)

        publishing: asyncio.Task[None] | None = None
        try:
            loop = Tap()
            publishing = asyncio.create_task(publish())
            async with asyncio.timeout(PROMPTLY):
                async for event in loop:  # it has created the exchange
                    assert event.payload == [1]
                    break
        finally:
            assert publishing is not None
            publishing.cancel()
        await until(lambda: not proxy._links)
        assert proxy.accepted == 1
        with pytest.raises(UsageError, match="only once"):
            await loop.__aenter__()


@pytest.mark.asyncio
async def test_a_cancelled_reader_leaves_no_connection(amqp_url: str, name: str) -> None:
    with FaultProxy(amqp_url) as proxy:
        tap = Tap(url=proxy.url)

        async def read() -> None:
            async for _ in tap:
                raise AssertionError

        reading = asyncio.create_task(read())
        await until(lambda: tap._queue._connection is not None)
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: not proxy._links)


@pytest.mark.asyncio
async def test_another_task_can_close_a_tap(amqp_url: str) -> None:
    async with Tap(url=amqp_url) as tap:
        closing = asyncio.get_running_loop().call_later(
            0.1, lambda: asyncio.ensure_future(tap.close())
        )
        async with asyncio.timeout(PROMPTLY):
            assert [event async for event in tap if event.target == "nothing"] == []
        closing.cancel()
    await tap.close()


@pytest.mark.asyncio
async def test_a_tap_connects_again_and_says_what_it_may_have_missed(
    amqp_url: str,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inspector.queue(name, name)
    gaps: list[str] = []
    with FaultProxy(amqp_url) as proxy:
        async with Tap("#", url=proxy.url, exchange=name, on_gap=gaps.append) as tap:
            events = aiter(tap)
            before = sent(publisher, "x", "before")
            assert [event.id for event in await taken(events, 1)] == before
            proxy.refuse()
            reading = asyncio.create_task(taken(events, 1))
            await until(lambda: gaps)
            sent(publisher, "x", "missed")
            proxy.heal()
            await until(lambda: len(gaps) == 2)
            after = sent(publisher, "x", "after")
            assert [event.id for event in await reading] == after
    lost, again = gaps
    assert re.fullmatch(r"the connection was lost: .+; reconnecting", lost)
    assert re.fullmatch(r"connected again; messages of the last \d+\.\d s may be missing", again)
    assert [record.message for record in caplog.records if record.name == "outbox.tap"] == gaps


@pytest.mark.asyncio
async def test_a_reader_that_is_too_slow_gets_the_newest_and_is_shown_how_many_it_missed(
    amqp_url: str,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inspector.queue(name, name)
    monkeypatch.setattr(tapped_queue, "_MOST_MESSAGES", 100)
    gaps: list[str] = []
    async with Tap(url=amqp_url, exchange=name, on_gap=gaps.append) as tap:
        ids = sent(publisher, "x", *range(500))
        await until(lambda: tap.dropped == 400)
        assert [event.id for event in await taken(aiter(tap), 100)] == ids[-100:]
        assert gaps == ["400 message(s) were dropped, because they are read too slowly"]
        monkeypatch.setattr(tapped_queue, "_MOST_BYTES", 1_000)
        ids = sent(publisher, "x", *["." * 400] * 3, "." * 4_000)
        await until(lambda: tap.dropped == 403)
        assert [event.id for event in await taken(aiter(tap), 1)] == ids[-1:]


@pytest.mark.asyncio
@pytest.mark.slow
async def test_the_queue_of_a_blocked_loop_stays_bounded_in_the_broker(
    amqp_url: str,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inspector.queue(name, name)
    monkeypatch.setitem(tapped_queue._ARGUMENTS, "x-max-length", 50)
    async with Tap(url=amqp_url, exchange=name) as tap:
        events = aiter(tap)
        [_] = [await taken(events, 1) for _ in sent(publisher, "x", 0)]
        # The loop is blocked meanwhile, and 40 MB are more than sockets hold.
        ids = sent(publisher, "x", *["." * 10_000] * 4_000)
        seen: list[str] = []
        while ids[-1] not in seen:
            seen += [event.id for event in await taken(events, 1)]
    assert tap.dropped == 0
    assert len(seen) < 3_000
    assert seen == [id for id in ids if id in set(seen)]


@pytest.mark.asyncio
async def test_what_other_clients_publish_does_not_end_a_tap(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    deep: Any = 1
    for _ in range(1_000):
        deep = [deep]
    year_10000 = 253_402_300_800
    async with Tap(url=amqp_url, exchange=name) as tap:
        events = aiter(tap)
        for properties in (
            {"timestamp": year_10000},
            {"content_encoding": "gzip"},
            {"headers": {"CC": ["x"], "x": None}},
            {"headers": {"deep": Unwritten(nested(2_000))}},
            {"headers": {"float": Unwritten(b"d" + b"\x7f\xf0" + b"\0" * 6)}},
        ):
            with Unwritten.written():
                inspector.publish("x", b"{", name, properties_of(**properties))
            while True:  # it may have to connect again
                inspector.publish("after", b"[1]", name, properties_of(message_id="after"))
                try:
                    async with asyncio.timeout(1):
                        while (event := await anext(events)).id != "after":
                            with pytest.raises(ValueError):
                                _ = event.payload
                    break
                except TimeoutError:
                    events = aiter(tap)


def nested(depth: int) -> bytes:
    """Return a field array in a field array, and so on."""
    data = b"t\x01"
    for _ in range(depth):
        data = b"A" + len(data).to_bytes(4) + data
    return data


@pytest.mark.asyncio
async def test_the_first_connection_fails_for_its_reason(
    amqp_url: str, inspector: Inspector, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(kind: type[Exception], text: str, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            async with Tap(**options):
                raise AssertionError

    missing = f"cannot tap .* no exchange '{name}'"
    await fails(UsageError, missing, url=amqp_url, exchange=[f"{name}", "amq.topic"])
    address = amqp_url.rpartition("/")[0]
    await fails(ConnectFailed, "check the vhost", url=f"{address}/{name}")
    await fails(ConnectFailed, "cannot connect to 127.0.0.1:1: .*111", url="amqp://127.0.0.1:1")
    with FaultProxy(amqp_url) as proxy:
        proxy.black_hole()
        monkeypatch.setenv("OUTBOX_CONNECT_TIMEOUT", "0.3")
        began = time.monotonic()
        await fails(ConnectFailed, r"no answer within 0\.3 s", url=proxy.url)
        assert time.monotonic() - began < 5


@pytest.mark.asyncio
async def test_each_host_is_tried(amqp_url: str, inspector: Inspector, name: str) -> None:
    inspector.queue(name, name)
    authority, _, vhost = amqp_url.removeprefix("amqp://").partition("/")
    hosts = re.sub(r"([^@]*)$", r"127.0.0.1:1,\1", authority, count=1)
    async with Tap(url=f"amqp://{hosts}/{vhost}", exchange=name) as tap:
        inspector.publish("x", b"1", name)
        assert [event.payload for event in await taken(aiter(tap), 1)] == [1]


@pytest.mark.asyncio
async def test_each_connection_asks_for_credentials(amqp_url: str) -> None:
    asked: list[str] = []
    passwords = iter(["wrong", "guest"])
    address = amqp_url.rpartition("@")[2].removeprefix("amqp://")

    def credentials() -> tuple[str, str]:
        asked.append("once")
        return "guest", next(passwords)

    settings = Settings.load(f"amqp://{address}", {"credentials": credentials})
    with pytest.raises(ConnectFailed, match="ACCESS_REFUSED"):
        async with Tap(settings=settings):
            raise AssertionError
    async with Tap(settings=settings):
        assert len(asked) == 2
    with pytest.raises(ConnectFailed, match="no credentials: StopIteration"):
        async with Tap(settings=settings):
            raise AssertionError


def test_what_cannot_be_tapped_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, text in (("sqlite:///outbox.db", "sqlite:// has none"), ("memory://", "memory://")):
        with pytest.raises(UsageError, match=text):
            Tap(url=url)
    with pytest.raises(NotConfigured):
        Tap("order.*")
    monkeypatch.setenv("OUTBOX_URL", "amqp://localhost")
    for options, text in (
        ({"exchange": ""}, "default exchange"),
        ({"exchange": []}, "no exchange"),
        ({"exchange": ["x", 5]}, "the exchange is a int"),
    ):
        with pytest.raises(UsageError, match=text):
            Tap("order.*", **options)
    with pytest.raises(UsageError, match="url="):
        Tap("amqp://localhost/", "order.*")
    with pytest.raises(UsageError, match="more than 255"):
        Tap("x" * 256)


def test_the_url_and_the_exchange_are_those_of_the_configured_publisher() -> None:
    configure("amqp://shop.invalid/", exchange="shop")
    tap = Tap("order.*")
    assert tap._queue._hosts[0].host == "shop.invalid"
    assert list(tap._queue._bindings) == [("shop", "order.*")]


@pytest.mark.asyncio
@pytest.mark.parametrize("vhost", ["/", "shop", "a/b c%?#ä"])
async def test_aio_pika_gets_the_url_as_outbox_reads_it(vhost: str) -> None:
    url = f"amqp://us%40er:{quote('p/w:%@#?ä', safe='')}@[::1]:5679/{quote(vhost, safe='')}"
    settings = Settings.load(url, {"heartbeat": 7})
    [host] = connection_parameters(BrokerURL.parse(url), settings, "tap")
    connection = aiormq.Connection(make_url(**_addressed(tapped_queue._arguments(host))))
    assert connection.vhost == vhost
    assert (connection.url.host, connection.url.port) == ("::1", 5679)
    assert (connection.url.user, connection.url.password) == ("us@er", "p/w:%@#?ä")
    assert connection.heartbeat_timeout == 7


def _addressed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "client_properties"}
