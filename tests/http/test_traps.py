"""The traps of the contract that show at the wire: each one breaks a published client or one of its tests."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from queen.config.settings import Settings

from .asgi_driver import Http, open_app


async def pop(http: Http, target: str) -> list[dict[str, Any]]:
    answer = await http.get(f"/api/v1/pop/{target}")
    assert answer.status in (200, 204)
    messages: list[dict[str, Any]] = answer.json["messages"] if answer.status == 200 else []
    return messages


def ack_of(message: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {name: message[name] for name in ("transactionId", "partitionId", "leaseId")} | others


async def test_a_hundred_failed_acks_under_one_lease_count_as_one_retry(http: Http) -> None:
    """Trap 6."""
    await http.push("q", *range(100))
    messages = await pop(http, "queue/q?batch=100")

    acks = [ack_of(message, status="failed", error="no") for message in messages]
    answer = await http.post("/api/v1/ack/batch", {"acknowledgments": acks})

    assert [result["success"] for result in answer.json] == [True] * 100
    assert not any(result["dlq"] for result in answer.json)
    again = await pop(http, "queue/q?batch=100")
    assert [message["id"] for message in again] == [message["id"] for message in messages]
    assert {message["retryCount"] for message in again} == {1}
    assert {message["deliveryAttempt"] for message in again} == {2}


@pytest.mark.parametrize("retry_limit", [0, 1, 2])
async def test_a_retry_limit_of_n_means_n_plus_one_deliveries(http: Http, retry_limit: int) -> None:
    """Trap 7."""
    await http.post("/api/v1/configure", {"queue": "q", "options": {"retryLimit": retry_limit}})
    await http.push("q", {"n": 1})

    results = []
    while messages := await pop(http, "queue/q"):
        results += (await http.post("/api/v1/ack", ack_of(messages[0], status="failed", error="why"))).json

    assert [result["dlq"] for result in results] == [False] * retry_limit + [True]
    [letter] = (await http.get("/api/v1/dlq?queue=q")).json["messages"]
    assert (letter["data"], letter["errorMessage"]) == ({"n": 1}, "why")


async def test_a_group_subscribes_at_its_first_pop_also_when_it_gets_nothing(http: Http) -> None:
    """Trap 8."""
    await http.push("q", "old")

    assert await pop(http, "queue/q?consumerGroup=g&subscriptionMode=new") == []
    await http.push("q", "new")
    await http.push("q", "elsewhere", partition="born later")

    got = await pop(http, "queue/q?consumerGroup=g&batch=10&partitions=5")
    assert {message["data"] for message in got} == {"new", "elsewhere"}


async def test_two_workers_read_what_either_has_written(settings: Settings) -> None:
    """Trap 9."""
    async with open_app(settings) as one, open_app(settings) as other:
        here, there = Http(one), Http(other)
        assert await pop(there, "queue/q") == []
        for number in range(20):
            await here.push("q", number)
            [message] = await pop(there, "queue/q")
            assert message["data"] == number
            assert (await here.post("/api/v1/ack", ack_of(message))).json[0]["success"]
            assert await pop(there, "queue/q") == []
        await here.request("DELETE", "/api/v1/resources/queues/q")
        await there.push("q", "born again")
        assert [message["data"] for message in await pop(here, "queue/q")] == ["born again"]


async def test_configuring_again_takes_old_options_back_at_once(http: Http) -> None:
    """Trap 10."""
    await http.post("/api/v1/configure", {"queue": "q", "options": {"delayedProcessing": 60, "windowBuffer": 60}})
    await http.push("q", 1)
    assert await pop(http, "queue/q") == []

    await http.post("/api/v1/configure", {"queue": "q", "options": {"leaseTime": 5}})

    assert [message["data"] for message in await pop(http, "queue/q")] == [1]


async def test_an_encrypted_queue_without_a_key_is_refused_and_with_one_is_plain_to_clients(settings: Settings) -> None:
    without_key = msgspec.structs.replace(settings, encryption_key=None)
    async with open_app(settings) as keyed, open_app(without_key) as keyless:
        await Http(keyed).post("/api/v1/configure", {"queue": "q", "options": {"encryptionEnabled": True}})

        await Http(keyed).push("q", {"plain": "text"})
        refused = await Http(keyless).post("/api/v1/push", {"items": [{"queue": "q", "payload": 1}]})
        unread = await Http(keyless).get("/api/v1/pop/queue/q?consumerGroup=g")
        popped = await pop(Http(keyed), "queue/q")

    assert (refused.status, refused.json["code"]) == (409, "encryption_unavailable")
    assert "QUEEN_ENCRYPTION_KEY" in refused.error
    assert (unread.status, unread.json["code"]) == (409, "encryption_unavailable")
    assert [message["data"] for message in popped] == [{"plain": "text"}]


async def test_a_failed_reading_gives_the_batch_back_before_it_is_answered(settings: Settings) -> None:
    without_key = msgspec.structs.replace(settings, encryption_key=None)
    async with open_app(settings) as keyed, open_app(without_key) as keyless:
        await Http(keyed).post("/api/v1/configure", {"queue": "q", "options": {"encryptionEnabled": True}})
        await Http(keyed).push("q", 1)

        assert (await Http(keyless).get("/api/v1/pop/queue/q")).status == 409

        [message] = await pop(Http(keyed), "queue/q")
        assert (message["data"], message["deliveryAttempt"]) == (1, 1)
