"""A bare aio-pika callback that acks each message; aio-pika's iterator is somewhat slower."""

from __future__ import annotations

import asyncio

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from benchmarks.peers.consuming import PREFETCH, QUEUE, Countdown


def consume(url: str, messages: int) -> float:
    return asyncio.run(_consume(url, messages))


async def _consume(url: str, messages: int) -> float:
    countdown = Countdown(messages)
    last_acked = asyncio.Event()

    async def on_message(message: AbstractIncomingMessage) -> None:
        countdown.handle()
        await message.ack()
        if countdown.is_over:
            last_acked.set()

    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(QUEUE)
        await queue.consume(on_message)
        await last_acked.wait()
    return countdown.rate
