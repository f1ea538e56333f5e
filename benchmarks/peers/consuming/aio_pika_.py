"""A bare loop over aio-pika's iterator that acks each message."""

from __future__ import annotations

import asyncio

import aio_pika

from benchmarks.peers.consuming import PREFETCH, QUEUE, Countdown


def consume(url: str, messages: int) -> float:
    return asyncio.run(_consume(url, messages))


async def _consume(url: str, messages: int) -> float:
    countdown = Countdown(messages)
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(QUEUE)
        async with queue.iterator() as incoming:
            async for message in incoming:
                countdown.handle()
                await message.ack()
                if countdown.is_over:
                    break
    return countdown.rate


def consume_by_callback(url: str, messages: int) -> float:
    return asyncio.run(_by_callback(url, messages))


async def _by_callback(url: str, messages: int) -> float:
    done = asyncio.Event()
    countdown = Countdown(messages, done.set)
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(QUEUE)

        async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            countdown.handle()
            await message.ack()

        await queue.consume(on_message)
        await done.wait()
        await asyncio.sleep(0.5)
    return countdown.rate
