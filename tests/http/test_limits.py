"""maxSize, ttl, retryDelay and deadLetterQueue over HTTP: who sets them gets what they say, who does not, no change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import DatabaseClock, wait_until

from .admin_kit import API, ack, ask, configure, order, pop
from .asgi_driver import Http


def item(queue: str, payload: Any = None, **members: Any) -> dict[str, Any]:
    return {"queue": queue, "payload": payload, **members}


async def test_a_push_to_a_full_queue_is_429_and_says_so_of_every_item(http: Http) -> None:
    await configure(http, "full", maxSize=1)
    await configure(http, "free")
    items = [item("full", 1, transactionId="a"), item("free", 2), item("full", 3, partition="p")]

    refused = await http.post(f"{API}/push", {"items": items})

    assert refused.status == 429
    assert refused.headers["retry-after"] == "1"
    assert (refused.json["code"], refused.json["status"]) == ("queue_full", 429)
    assert "'full'" in refused.json["error"]
    assert [
        (result["index"], result["transaction_id"], result["status"], result["error"], result["partition"])
        for result in refused.json["results"]
    ] == [
        (0, "a", "failed", "queue_full", "Default"),
        (1, None, "failed", "not_stored", "Default"),
        (2, None, "failed", "queue_full", "p"),
    ]
    assert (await ask(http, "resources", "overview"))["messages"]["total"] == 0
    assert (await http.post(f"{API}/push", {"items": items[:2]})).status == 201


async def test_consuming_makes_room(http: Http) -> None:
    await configure(http, "q", maxSize=2)
    await http.push("q", 1, 2)
    assert (await http.post(f"{API}/push", {"items": [item("q", 3)]})).status == 429
    await ack(http, await pop(http, "q", batch=2))

    assert (await http.post(f"{API}/push", {"items": [item("q", 3)]})).status == 201


async def test_a_transaction_into_a_full_queue_is_refused_as_transactions_are(http: Http) -> None:
    await configure(http, "q", maxSize=1)
    await http.push("q", 1)
    operations = [{"type": "push", "items": [item("q", 2)]}]

    answer = await http.post(f"{API}/transaction", {"operations": operations})

    assert (answer.status, answer.json["success"]) == (200, False)
    assert "'q' has room for 0 more" in answer.json["error"]


async def test_the_defaults_change_nothing(http: Http, database_clock: DatabaseClock) -> None:
    await configure(http, "q")
    await http.push("q", *range(100))
    await ack(http, await pop(http, "q", batch=100), status="failed")
    messages = await pop(http, "q", batch=100)
    assert len(messages) == 100
    await ack(http, messages, status="failed")
    await database_clock.advance(3601)

    assert len(await pop(http, "q", batch=100)) == 100


@pytest.mark.parametrize(
    ("options", "later"),
    [({"ttl": 3600}, 3601), ({"ttl": 60}, 61)],
    ids=["the default, but asked for", "another"],
)
async def test_a_ttl_that_is_asked_for_is_kept(
    http: Http, database_clock: DatabaseClock, options: dict[str, Any], later: float
) -> None:
    await configure(http, "q", **options)
    await http.push("q", 1)
    await database_clock.advance(later)

    assert await pop(http, "q") == []
    await configure(http, "q")  # resets what it does not name
    assert [message["data"] for message in await pop(http, "q", group="g")] == [1]


async def test_a_retry_delay_that_is_asked_for_is_kept(http: Http, database_clock: DatabaseClock) -> None:
    await configure(http, "q", retryDelay=10_000)
    await http.push("q", 1)
    await ack(http, await pop(http, "q"), status="failed")

    assert await pop(http, "q") == []
    await database_clock.advance(12.1)
    assert (await pop(http, "q"))[0]["retryCount"] == 1


async def test_what_expires_is_found_among_the_dead_letters(http: Http, database_clock: DatabaseClock) -> None:
    await configure(http, "q", ttl=60, deadLetterQueue=True)
    await http.push("q", {"total": 12.5})
    await database_clock.advance(61)
    assert await pop(http, "q", group="billing") == []

    async def found() -> list[Any]:
        letters: list[Any] = (await ask(http, "dlq", queue="q", consumerGroup="billing"))["messages"]
        return letters

    async def buried() -> bool:
        return bool(await found())

    await wait_until(buried)  # the worker does it by itself
    (letter,) = await found()
    assert (letter["data"], letter["errorMessage"]) == ({"total": 12.5}, "Expired: ttl of 60 s is over")


async def test_a_partition_is_deleted_by_name(http: Http) -> None:
    await http.push("q", 1, 2, partition="a/b")
    await http.push("q", 3)

    answer = await order(http, "DELETE", "resources", "queues", "q", "partitions", "a/b")

    assert answer == {"deleted": True, "queue": "q", "partition": "a/b", "existed": True, "count": 2}
    again = await order(http, "DELETE", "resources", "queues", "q", "partitions", "a/b")
    assert (again["existed"], again["count"]) == (False, 0)
    assert [message["data"] for message in await pop(http, "q", batch=10, partitions=10)] == [3]
