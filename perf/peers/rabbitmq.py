"""RabbitMQ: a quorum queue with publisher confirms, which is fsynced before it is confirmed; through aio-pika."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aio_pika
from aio_pika.abc import AbstractIncomingMessage, AbstractRobustConnection

QUEUE = "peers"
IDLE_SECONDS = 0.2


class RabbitMQ:
    def __init__(self, connection: AbstractRobustConnection, channel: aio_pika.abc.AbstractChannel) -> None:
        self._connection = connection
        self._channel = channel
        self._arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._consuming = False

    async def push(self, payloads: Sequence[str]) -> None:
        """All on the wire at once, then all confirms: as pipelined as the protocol allows."""
        send = self._channel.default_exchange.publish
        persistent = aio_pika.DeliveryMode.PERSISTENT
        messages = [aio_pika.Message(payload.encode(), delivery_mode=persistent) for payload in payloads]
        await asyncio.gather(*(send(message, routing_key=QUEUE) for message in messages))

    async def take(self, most: int) -> list[str]:
        if not self._consuming:
            self._consuming = True
            await self._channel.set_qos(prefetch_count=most * 2)
            queue = await self._channel.get_queue(QUEUE)
            await queue.consume(self._arrived.put)
        try:
            first = await asyncio.wait_for(self._arrived.get(), IDLE_SECONDS)
        except TimeoutError:
            return []
        batch = [first]
        while len(batch) < most and not self._arrived.empty():
            batch.append(self._arrived.get_nowait())
        await batch[-1].ack(multiple=True)
        return [message.body.decode() for message in batch]

    async def aclose(self) -> None:
        await self._connection.close()


async def prepare(url: str) -> None:
    connection = await aio_pika.connect_robust(url)
    channel = await connection.channel()
    await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    await connection.close()


async def connect(url: str) -> RabbitMQ:
    connection = await aio_pika.connect_robust(url)
    return RabbitMQ(connection, await connection.channel(publisher_confirms=True))
