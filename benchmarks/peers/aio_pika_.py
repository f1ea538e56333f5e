"""aio-pika, one by one, and with ``asyncio.gather`` over a chunk."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aio_pika

from benchmarks.peers import BODY, EXCHANGE, TARGET


class AioPika:
    """A publisher that awaits each confirm before the next event."""

    name = "aio-pika, one by one"
    chunks: tuple[int, ...] = (1,)
    queue = None

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(url))

    async def _connect(self, url: str) -> None:
        self._connection = await aio_pika.connect(f"{url}?heartbeat=600")
        channel: Any = await self._connection.channel(on_return_raises=True)
        self._exchange = await channel.get_exchange(EXCHANGE, ensure=False)

    def publish(self, chunk: int, times: int) -> float:
        return self._loop.run_until_complete(self._publish(chunk, times))

    async def _publish(self, chunk: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(chunk * times):
            await self._publish_one(0)
        return time.perf_counter() - begin

    async def _publish_one(self, number: int) -> None:
        message = aio_pika.Message(
            BODY,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=f"01900000-0000-7000-8000-{number:012}",
            type=TARGET,
        )
        await self._exchange.publish(message, TARGET, mandatory=True)

    def close(self) -> None:
        self._loop.run_until_complete(self._connection.close())
        self._loop.close()


class AioPikaGathered(AioPika):
    """A publisher that publishes a whole chunk concurrently, and awaits all of its confirms."""

    name = "aio-pika, gathered"
    chunks = (10, 100, 1000)

    async def _publish(self, chunk: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            await asyncio.gather(*map(self._publish_one, range(chunk)))
        return time.perf_counter() - begin
