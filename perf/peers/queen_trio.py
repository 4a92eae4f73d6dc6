"""queen-trio itself, over plain sockets: what a thin client of its HTTP costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

QUEUE = "peers"


class QueenTrio:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, partition: str) -> None:
        self._reader = reader
        self._writer = writer
        self._partition = partition

    async def push(self, payloads: Sequence[str]) -> None:
        start = f'{{"queue":"{QUEUE}","partition":"{self._partition}","payload":'
        body = '{"items":[' + ",".join(f"{start}{payload}}}" for payload in payloads) + "]}"
        status, answer = await self._exchange("POST", "/api/v1/push", body.encode())
        if status != 201:
            raise RuntimeError(f"push answered {status}: {answer[:200]!r}")

    async def take(self, most: int) -> list[str]:
        path = f"/api/v1/pop/queue/{QUEUE}?batch={most}"
        status, answer = await self._exchange("GET", path)
        if status == 204:
            return []
        popped = json.loads(answer)
        acks = [
            {"transactionId": message["transactionId"], "partitionId": message["partitionId"], "status": "completed"}
            for message in popped["messages"]
        ]
        body = json.dumps({"acknowledgments": acks, "leaseId": popped["leaseId"]}).encode()
        status, answer = await self._exchange("POST", "/api/v1/ack/batch", body)
        if status != 200:
            raise RuntimeError(f"ack answered {status}: {answer[:200]!r}")
        return [json.dumps(message["data"]) for message in popped["messages"]]

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def _exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nhost: queen\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        status = int(lines[0].split()[1])
        if b"transfer-encoding: chunked" in lines:
            return status, await self._chunks()
        length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
        return status, await self._reader.readexactly(length)

    async def _chunks(self) -> bytes:
        body = bytearray()
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return bytes(body)


async def prepare(url: str) -> None:
    """The first push makes the queue."""


_connections = 0


async def connect(url: str) -> QueenTrio:
    """Each connection pushes to one of 50 partitions: order holds within one, and peers promise no more."""
    global _connections
    _connections += 1
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**24)
    return QueenTrio(reader, writer, str(_connections % 50))
