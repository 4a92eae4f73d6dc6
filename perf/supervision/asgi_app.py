"""The tiny application as ASGI, on asyncio or Trio. `/` answers with the process id."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

importlib.import_module("faulty")  # a neighbour on the path: sees to it that this can go wrong

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def pause(seconds: float) -> None:
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        await trio.sleep(seconds)
    else:
        await asyncio.sleep(seconds)


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path = scope["path"]
    if path == "/park":
        await pause(30.0)
    headers = [(b"content-type", b"text/plain")]
    body = str(os.getpid()).encode()
    if path.startswith("/stream/"):  # a chunk every 100 ms for so many seconds
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(int(path[8:]) * 10):
            await send({"type": "http.response.body", "body": bytes(1024), "more_body": True})
            await pause(0.1)
        await send({"type": "http.response.body", "body": b""})
        return
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def create_app(settings: object) -> Any:
    """The factory that `queen-trio run --app` wants."""
    return app
