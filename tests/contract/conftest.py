"""The two servers that are asked: the ASGI application in process, and `queen-trio run` on a socket."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from queen.config.settings import Secret, Settings
from tests.acceptance.support import Server
from tests.http.asgi_driver import Standing

KEY = "5e" * 32
MAX_TIMEOUT_SECONDS = 0.05
"""What is asked for at random would wait for weeks."""


class InProcess(HTTPAdapter):
    """What `requests` would send to a socket goes to an application in this process."""

    def __init__(self, standing: Standing) -> None:
        super().__init__()
        self._standing = standing

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        assert isinstance(body, bytes), "schemathesis sends whole bodies"
        headers = {
            name: value if isinstance(value, str) else value.decode("latin-1")
            for name, value in request.headers.items()
        }
        answer = self._standing.request(request.method or "GET", request.path_url, body, headers)
        return self.build_response(
            request,
            HTTPResponse(io.BytesIO(answer.body), answer.headers, status=answer.status, preload_content=False),
        )


class Asked:
    """A server to ask, through ``session``."""

    def __init__(self, url: str, session: requests.Session) -> None:
        self.url, self.session = url, session

    def call(self, method: str, path: str, body: Any = None) -> requests.Response:
        return self.session.request(method, self.url + path, json=body)


@pytest.fixture(scope="session")
def application(postgres: Any) -> Iterator[Asked]:
    name = postgres.create_migrated(1)
    settings = Settings(
        database_url=Secret(postgres.url(name)),
        db_pool_size=4,
        encryption_key=Secret(KEY),
        max_timeout_seconds=MAX_TIMEOUT_SECONDS,
    )
    standing = Standing(settings)
    standing.start()
    with requests.Session() as session:
        session.mount("http://in.process", InProcess(standing))
        yield Asked("http://in.process", session)
    standing.stop()
    postgres.drop(name)


@pytest.fixture(scope="session")
def server() -> Iterator[Asked]:
    scratch = Path(tempfile.mkdtemp(prefix="queen-contract-"))
    scratch.chmod(0o755)
    environment = {
        "QUEEN_ENCRYPTION_KEY": KEY,
        "MAX_TIMEOUT": str(round(MAX_TIMEOUT_SECONDS * 1000)),
        "LOG_LEVEL": os.environ.get("QUEEN_CONTRACT_LOG_LEVEL", "warn"),
    }
    server = Server(scratch / "data", logs=scratch, workers=1, environment=environment)
    try:
        server.wait_ready()
        with requests.Session() as session:
            yield Asked(f"http://127.0.0.1:{server.port}", session)
        assert "unexpected error" not in server.log
    finally:
        server.end()
        shutil.rmtree(scratch)
