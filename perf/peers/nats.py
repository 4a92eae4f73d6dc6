"""NATS JetStream: a stream in files, one durable pull consumer, each message acknowledged; through nats-py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import nats as client
from nats.aio.client import Client as Connection
from nats.errors import TimeoutError as NothingCame
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StorageType

STREAM, SUBJECT, CONSUMER = "PEERS", "peers.work", "peers"
IDLE_SECONDS = 0.2


class Nats:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stream = connection.jetstream()
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def push(self, payloads: Sequence[str]) -> None:
        """All on the wire at once, then all acknowledgements."""
        await asyncio.gather(*(self._stream.publish(SUBJECT, payload.encode()) for payload in payloads))

    async def take(self, most: int) -> list[str]:
        if self._subscription is None:
            self._subscription = await self._stream.pull_subscribe(SUBJECT, CONSUMER, STREAM)
        try:
            messages = await self._subscription.fetch(most, timeout=IDLE_SECONDS)
        except NothingCame:
            return []
        for message in messages:
            await message.ack()
        return [message.data.decode() for message in messages]

    async def aclose(self) -> None:
        await self._connection.flush()  # the acks; drain() would wait for ever for what fetch() has left in its queue
        await self._connection.close()


async def prepare(url: str) -> None:
    connection = await client.connect(url)
    await connection.jetstream().add_stream(
        name=STREAM, subjects=[SUBJECT], storage=StorageType.FILE, retention=RetentionPolicy.WORK_QUEUE
    )
    await connection.close()


async def connect(url: str) -> Nats:
    return Nats(await client.connect(url))
