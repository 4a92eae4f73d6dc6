"""Conformance section 9: whose message it is, with the clients against a server that wants tokens."""

from __future__ import annotations

import base64
import hmac
import importlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from .support import Broker, Queen

URL = os.environ.get("QUEEN_AUTH_URL", "")
SECRET = os.environ.get("QUEEN_AUTH_SECRET", "").encode()


def segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(sub: Any, role: str = "admin", seconds: int = 3600) -> str:
    """As the reference suites build theirs: HS256, an hour."""
    now = int(time.time())
    claims = {"sub": sub, "username": "tester", "role": role, "iat": now, "exp": now + seconds}
    signed = ".".join(segment(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return f"{signed}.{segment(hmac.digest(SECRET, signed.encode(), 'sha256'))}"


@asynccontextmanager
async def connected(bearer: str | None) -> AsyncIterator[Any]:
    client = Queen(url=URL, bearer_token=bearer, retry_attempts=1)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def queue_for(sub: Any) -> AsyncIterator[tuple[Any, str]]:
    """A client whose token has that subject, and a queue that is deleted afterwards."""
    name = f"auth-{uuid.uuid4().hex}"
    async with connected(token(sub)) as client:
        yield client, name
        await client.queue(name).delete()


async def test_producer_sub_stamped_from_jwt(broker: Broker) -> None:
    async with queue_for("producer-7") as (client, name):
        await client.queue(name).push([{"data": {"n": 1}}])
        [message] = await client.queue(name).batch(1).pop()

    assert message["producerSub"] == "producer-7"
    assert message["data"] == {"n": 1}


async def test_producer_sub_round_trip(broker: Broker) -> None:
    async with queue_for("alice") as (client, name), connected(token("bob", "read-write")) as bob:
        await client.queue(name).push([{"data": 1}])
        await bob.queue(name).push([{"data": 2}])
        messages = await client.queue(name).batch(10).pop()

    assert [(message["data"], message["producerSub"]) for message in messages] == [(1, "alice"), (2, "bob")]


@pytest.mark.parametrize("sub", ["", None, 7])
async def test_producer_sub_empty_string_stored_as_null(broker: Broker, sub: Any) -> None:
    async with queue_for(sub) as (client, name):
        await client.queue(name).push([{"data": 1}])
        [message] = await client.queue(name).batch(1).pop()

    assert message["producerSub"] is None


async def test_producer_sub_ignored_from_body_without_auth(broker: Broker) -> None:
    name = broker.name()
    item = {"queue": name, "payload": 1, "producerSub": "mallory"}
    answer = await broker.http.post("/api/v1/push", json={"items": [item]})
    assert answer.status_code == 201

    [message] = await broker.pop(name)
    assert message["producerSub"] is None


async def test_a_transaction_stamps_its_pushes(broker: Broker) -> None:
    async with queue_for("alice") as (client, name):
        await client.queue(name).push([{"data": 1}])
        [first] = await client.queue(name).batch(1).pop()
        await client.transaction().ack(first).queue(name).push([{"data": 2}]).commit()
        [second] = await client.queue(name).batch(1).pop()

    assert (second["data"], second["producerSub"]) == (2, "alice")


async def test_a_stream_sends_its_token_and_its_sink_is_stamped(broker: Broker) -> None:
    stream_type = importlib.import_module("queen.streams").Stream
    async with queue_for("alice") as (client, source), queue_for("alice") as (_, sink):
        await client.queue(source).push([{"data": {"n": n}} for n in range(5)])
        stream = stream_type.from_(client.queue(source)).map(lambda m: m["data"]).to(client.queue(sink))
        runner = await stream.run(query_id=f"{source}-q", url=URL, bearer_token=token("streamer", "read-write"))
        try:
            messages: list[Any] = []
            while len(messages) < 5:
                messages += await client.queue(sink).batch(10).wait(True).timeout_millis(5000).pop()
        finally:
            await runner.stop()
        assert runner.metrics()["errorsTotal"] == 0

    assert [message["data"]["n"] for message in messages] == list(range(5))
    assert {message["producerSub"] for message in messages} == {"streamer"}


@pytest.mark.parametrize(
    ("bearer", "error"),
    [
        (None, "Authentication required"),
        ("nonsense", "Token decode error"),
        (token("late", seconds=-3600), "Token has expired"),
        (token("forged")[:-4] + "AAAA", "Invalid token signature"),
    ],
    ids=["none", "nonsense", "expired", "forged"],
)
async def test_without_a_valid_token_nothing_works(broker: Broker, bearer: str | None, error: str) -> None:
    async with connected(bearer) as client:
        with pytest.raises(Exception, match=error):
            await client.queue("q").push([{"data": 1}])


async def test_a_reader_may_look_and_not_push(broker: Broker) -> None:
    async with connected(token("reader", "read-only")) as client:
        with pytest.raises(Exception, match="Insufficient permissions"):
            await client.queue("q").push([{"data": 1}])
        assert isinstance(await client.admin.list_queues(), dict)
