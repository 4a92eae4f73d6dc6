"""The tiny application as WSGI: the same as asgi_app.py."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

importlib.import_module("faulty")  # a neighbour on the path: sees to it that this can go wrong


def chunks(seconds: int) -> Iterator[bytes]:
    for _ in range(seconds * 10):
        yield bytes(1024)
        time.sleep(0.1)


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/park":
        time.sleep(30.0)
    if path.startswith("/stream/"):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return chunks(int(path[8:]))
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
