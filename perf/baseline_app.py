"""A bare ASGI app that reads a request and answers as many bytes as the server would. No queue, no database.

What this does on hypercorn is the ceiling of everything on hypercorn; the distance to it is ours.
Run it with ``hypercorn -k trio perf.baseline_app:app``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ID = "0199f0e2-7a5c-7abc-8def-0123456789ab"
PUSHED = (
    f'{{"index":0,"transaction_id":"{ID}","status":"queued","message_id":"{ID}","partition_id":"{ID}",'
    '"trace_id":null,"queueName":"bench"}'
).encode()
POPPED = (
    f'{{"id":"{ID}","transactionId":"{ID}","traceId":null,"data":{{"r":10000000,"i":123,"x":"0123"}},'
    '"producerSub":null,"createdAt":"2026-01-01T00:00:00.000000Z","queue":"bench","partition":"p000000",'
    f'"partitionId":"{ID}","leaseId":"","consumerGroup":"__QUEUE_MODE__","retryCount":0,"deliveryAttempt":1}}'
).encode()
_BATCH = re.compile(rb"batch=(\d+)")


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer a push with one element per pushed item, a pop with ``batch`` messages."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    parts = []
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            break
    if scope["method"] == "POST":
        items = b"".join(parts).count(b'"payload":')
        status, body = 201, b"[" + b",".join([PUSHED] * items) + b"]"
    else:
        found = _BATCH.search(scope["query_string"])
        messages = int(found[1]) if found else 1
        status, body = 200, b'{"success":true,"messages":[' + b",".join([POPPED] * messages) + b"]}"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
