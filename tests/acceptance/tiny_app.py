"""An ASGI application of a page, served by workers in place of ours where only processes are under test.

``TINY_FAULT`` in the environment makes it fail in one way.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from queen.config.settings import Settings
from queen.errors import StartupError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

held: list[bytes] = []

FAULT = os.environ.get("TINY_FAULT", "")

if FAULT.startswith("boot-crash-if:") and os.path.exists(FAULT.partition(":")[2]):
    os._exit(9)
if FAULT == "import":
    raise RuntimeError("this module cannot be imported")


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    if scope["path"] == "/slow":
        await trio.sleep(1)
    elif scope["path"] == "/exit":
        os._exit(7)
    elif scope["path"] == "/block":
        time.sleep(60)  # noqa: ASYNC251  the point of it
    elif scope["path"] == "/busy":
        await be_busy(float(scope["query_string"]))
    elif scope["path"] == "/orphan":
        subprocess.run(["sh", "-c", "sleep 0.5 &"], check=True)  # noqa: ASYNC221  a moment
    elif scope["path"] == "/grow":
        held.append(b"x" * int(scope["query_string"]))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        while True:
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})


async def be_busy(seconds: float) -> None:
    """Keep the loop from being idle for a moment, without keeping it from turning."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        for _ in range(100_000):
            pass
        await trio.lowlevel.checkpoint()


async def live(receive: Receive, send: Send) -> None:
    await receive()
    if FAULT == "startup":
        await send({"type": "lifespan.startup.failed", "message": "the moon is in the wrong phase"})
        return
    if FAULT == "boot-crash":
        os._exit(9)
    await send({"type": "lifespan.startup.complete"})
    if FAULT == "lifespan-dies":
        await trio.sleep(0.2)
        raise RuntimeError("the engine broke")
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def create_app(settings: Settings) -> Callable[..., Awaitable[None]]:
    assert settings.database_url is not None
    if FAULT == "factory":
        raise StartupError("the factory is closed on Sundays")
    return app
