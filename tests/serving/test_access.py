"""Tokens on either way of serving: the same requests are let in, by the same rules, before a body is read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from queen.auth import keys
from queen.config.settings import JwtSettings, Secret, Settings

from .support import Answer, Server, open_server, request

SECRET = "a secret that is long enough for HS256"
PUSH = b'{"items":[{"queue":"q","payload":1}]}'


def bearer(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **claims: Any) -> dict[str, str]:
    claims = {"sub": "alice", "role": "admin", "exp": int(time.time()) + 60} | claims
    return {"Authorization": f"Bearer {jwt.encode(claims, key, algorithm, None if kid is None else {'kid': kid})}"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, jwt=JwtSettings(enabled=True, secret=Secret(SECRET)))


async def ask(server: Server, method: str, target: str, body: bytes = b"", headers: Any = None) -> Answer:
    async with await server.connect() as client:
        return await client.exchange(request(method, target, body, **(headers or {})))


async def test_who_has_a_token_is_let_in_and_named(server: Server) -> None:
    pushed = await ask(server, "POST", "/api/v1/push", PUSH, bearer())
    popped = await ask(server, "GET", "/api/v1/pop/queue/q", headers=bearer())

    assert (pushed.status, popped.status) == (201, 200)
    assert popped.json["messages"][0]["producerSub"] == "alice"


async def test_who_has_none_is_refused(server: Server) -> None:
    answer = await ask(server, "POST", "/api/v1/push", PUSH)

    assert (answer.status, answer.json["error"]) == (401, "Authentication required")
    assert answer.headers["www-authenticate"] == "Bearer"
    forged = await ask(server, "POST", "/api/v1/push", PUSH, bearer("another secret, as long as the first one"))
    assert (forged.status, forged.json["error"]) == (401, "Invalid token signature")
    weak = await ask(server, "POST", "/api/v1/push", PUSH, bearer(role="read-only"))
    assert (weak.status, weak.json["error"]) == (403, "Insufficient permissions")


async def test_what_is_no_route_needs_a_token_too(server: Server) -> None:
    assert (await ask(server, "GET", "/api/v1/nothing")).status == 401
    assert (await ask(server, "GET", "/api/v1/nothing", headers=bearer())).status == 404
    assert (await ask(server, "OPTIONS", "/api/v1/nothing")).status == 204
    assert (await ask(server, "GET", "/health")).status == 200


async def test_a_refused_request_is_answered_before_its_body_has_come(server: Server) -> None:
    async with await server.connect() as client:
        await client.send(b"POST /api/v1/push HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n{")
        answer = await client.receive(to_head=True)

    assert answer is not None
    assert answer.status == 401


async def test_a_connection_is_not_remembered_as_authenticated(server: Server) -> None:
    async with await server.connect() as client:
        assert (await client.exchange(request("GET", "/api/v1/dlq", b"", **bearer()))).status == 200
        assert (await client.exchange(request("GET", "/api/v1/dlq"))).status == 401


# -- an endpoint with keys ----------------------------------------------------------------------------------------


class Issuer:
    """A key set served over HTTP on loopback, and what was asked of it. ``answer``: what it sends, None: nothing."""

    def __init__(self) -> None:
        self.port = 0
        self.answer: bytes | None = b""
        self.asked = 0

    def publish(self, **named: Ed25519PrivateKey) -> None:
        entries = [
            OKPAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "key_ops": ["verify"]}
            for kid, key in named.items()
        ]
        self.reply(json.dumps({"keys": entries}).encode())

    def reply(self, body: bytes, status: bytes = b"200 OK") -> None:
        self.answer = b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            received = b""
            while b"\r\n\r\n" not in received:
                if not (data := await stream.receive_some()):
                    return
                received += data
            self.asked += 1
            if self.answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(self.answer)


@asynccontextmanager
async def open_issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    async with trio.open_nursery() as serving:
        listeners = await serving.start(trio.serve_tcp, issuer.serve, 0)
        issuer.port = listeners[0].socket.getsockname()[1]
        yield issuer
        serving.cancel_scope.cancel()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with open_issuer() as issuer:
        yield issuer


def with_issuer(settings: Settings, port: int, **others: Any) -> Settings:
    url = Secret(f"http://127.0.0.1:{port}/keys")
    return msgspec.structs.replace(
        settings, jwt=JwtSettings(enabled=True, algorithm="EdDSA", jwks_url=url, jwks_timeout_seconds=1.0, **others)
    )


async def test_tokens_are_verified_with_keys_from_an_endpoint_that_rotates_them(
    settings: Settings, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "FORCED_PAUSE_SECONDS", 0.0)
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    issuer.publish(old=old)
    async with open_server(with_issuer(settings, issuer.port), fast=True) as server:

        async def status(key: Ed25519PrivateKey, kid: str) -> int:
            return (await ask(server, "GET", "/api/v1/dlq", headers=bearer(key, "EdDSA", kid, n=time.time()))).status

        assert await status(old, "old") == 200
        assert await status(new, "new") == 401
        issuer.publish(new=new)
        assert await status(new, "new") == 200
        assert await status(old, "old") == 200
        assert await status(new, "old") == 401
        issuer.reply(b"away", b"503 Service Unavailable")
        assert await status(new, "made up") == 401
        assert await status(new, "new") == 200


async def test_a_flood_of_made_up_key_ids_asks_the_endpoint_once(settings: Settings, issuer: Issuer) -> None:
    key = Ed25519PrivateKey.generate()
    issuer.publish(known=key)
    async with open_server(with_issuer(settings, issuer.port), fast=True) as server:
        assert (await ask(server, "GET", "/api/v1/dlq", headers=bearer(key, "EdDSA", "known"))).status == 200
        asked = issuer.asked
        begun = time.monotonic()

        async def flood(n: int) -> None:
            async with await server.connect() as client:
                for step in range(20):
                    headers = bearer(key, "EdDSA", f"{n}-{step}")
                    answer = await client.exchange(request("GET", "/api/v1/dlq", b"", **headers))
                    assert answer.json["error"] == f"Unknown key ID: {n}-{step}"

        async with trio.open_nursery() as attackers:
            for n in range(10):
                attackers.start_soon(flood, n)

        assert issuer.asked - asked <= 1 + (time.monotonic() - begun) / keys.FORCED_PAUSE_SECONDS


@pytest.mark.parametrize("fault", ["refused", "status", "garbage", "silence", "too large", "redirect"])
async def test_without_keys_the_answer_says_so_and_the_server_goes_on(
    settings: Settings, issuer: Issuer, fault: str
) -> None:
    port = issuer.port
    if fault == "refused":
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
    elif fault == "status":
        issuer.reply(b"{}", b"500 Internal Server Error")
    elif fault == "garbage":
        issuer.reply(b"<html>")
    elif fault == "silence":
        issuer.answer = None
    elif fault == "too large":
        issuer.reply(b" " * (keys.MAX_SET_BYTES + 1))
    else:
        issuer.reply(b"", b"302 Found\r\nLocation: http://127.0.0.1:1/")
    key = Ed25519PrivateKey.generate()

    async with open_server(with_issuer(settings, port), fast=True) as server:
        answer = await ask(server, "GET", "/api/v1/dlq", headers=bearer(key, "EdDSA", "k"))
        assert (answer.status, answer.json["error"]) == (500, "Failed to fetch JWKS")
        assert answer.json["code"] == "keys_unavailable"
        assert (await ask(server, "GET", "/livez")).status == 200


async def test_the_url_of_an_endpoint_is_in_no_log(
    settings: Settings, capsys: pytest.CaptureFixture[str], issuer: Issuer
) -> None:
    url = Secret(f"http://me:hunter2@127.0.0.1:{issuer.port}/keys?secret=hunter2")
    jwt_settings = JwtSettings(enabled=True, algorithm="EdDSA", jwks_url=url, jwks_timeout_seconds=1.0)
    issuer.reply(b"<html>")
    key = Ed25519PrivateKey.generate()

    async with open_server(msgspec.structs.replace(settings, jwt=jwt_settings), fast=True) as server:
        answer = await ask(server, "GET", "/api/v1/dlq", headers=bearer(key, "EdDSA", "k"))

    told = capsys.readouterr()
    assert "keys not fetched" in told.out
    assert "hunter2" not in told.out + told.err + answer.body.decode()
