"""FastStream's subscriber, which acks when the handler has returned, without a log line each."""

from __future__ import annotations

import asyncio
from typing import Any

from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from benchmarks.peers.consuming import PREFETCH, QUEUE, Countdown


def consume(url: str, messages: int) -> float:
    return asyncio.run(_consume(url, messages))


async def _consume(url: str, messages: int) -> float:
    done = asyncio.Event()
    countdown = Countdown(messages, done.set)
    broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)

    @broker.subscriber(RabbitQueue(QUEUE, declare=False))
    async def handle(message: dict[str, Any]) -> None:
        countdown.handle()

    async with broker:
        await broker.start()
        await done.wait()
    return countdown.rate
