"""Consumer groups over HTTP: lists, lag, seek, delete."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio

from tests.conftest import DatabaseClock, OpenBroker, wait_until

from .admin_kit import ack, ask, configure, consume, order, pop
from .asgi_driver import Http

ODD = "team/a@b.c d+é"


async def group_of(http: Http, queue: str, name: str) -> Any:
    (found,) = [
        group for group in await ask(http, "consumer-groups") if (group["queueName"], group["name"]) == (queue, name)
    ]
    return found


# -- lists --------------------------------------------------------------------------------------------------------


async def test_the_list_is_a_bare_array_with_an_entry_for_each_group_and_queue(http: Http) -> None:
    await http.push("a", 1, 2, 3)
    await http.push("b", 1)
    await consume(http, "a", ODD)
    await pop(http, "a")
    await pop(http, "b", ODD)

    groups = await ask(http, "consumer-groups")

    assert [(group["queueName"], group["name"]) for group in groups] == [
        ("a", "__QUEUE_MODE__"),
        ("a", ODD),
        ("b", ODD),
    ]
    done = groups[1]
    assert done == {
        "name": ODD,
        "queueName": "a",
        "topics": ["a"],
        "members": done["members"],
        "partitionsWithLag": 0,
        "totalLag": 0,
        "maxTimeLag": 0.0,
        "state": "Stable",
        "subscriptionMode": "all",
        "subscriptionTimestamp": None,
        "subscriptionCreatedAt": done["subscriptionCreatedAt"],
    }
    leased = groups[0]
    assert (leased["totalLag"], leased["partitionsWithLag"], leased["members"]) == (3, 1, 1)
    assert leased["state"] == "Stable"


async def test_a_group_lags_by_messages_and_by_the_age_of_its_oldest(http: Http, database_clock: DatabaseClock) -> None:
    await http.push("q", 1)
    await consume(http, "q", "g")
    await http.push("q", 2, 3)
    await database_clock.advance(400)
    await http.push("q", 4)
    (message,) = await pop(http, "q", "g", batch=1)

    group = await group_of(http, "q", "g")

    assert (group["totalLag"], group["partitionsWithLag"], group["state"]) == (3, 1, "Lagging")
    assert 400 <= group["maxTimeLag"] < 460
    assert message["data"] == 2


async def test_a_group_with_lag_that_nobody_consumes_for_is_dead(http: Http) -> None:
    await http.push("q", 1)
    await consume(http, "q", "g")
    await http.push("q", 2)

    assert (await group_of(http, "q", "g"))["state"] == "Dead"


async def test_a_waiting_pop_is_a_member(http: Http) -> None:
    await http.push("q", 1)
    await consume(http, "q", "g")
    exchange = http.open("GET", "/api/v1/pop/queue/q?consumerGroup=g&wait=true&timeout=60000")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)

        group = await group_of(http, "q", "g")
        exchange.hang_up()

    assert (group["members"], group["state"]) == (1, "Stable")


async def test_lagging_shows_partitions_that_are_at_least_so_far_behind_worst_first(
    http: Http, database_clock: DatabaseClock
) -> None:
    await http.push("q", 1, partition="old")
    await pop(http, "q", "g", batch=1)
    await database_clock.advance(7200)
    await http.push("q", 2, 3, partition="younger")
    await database_clock.advance(3700)
    await http.push("q", 4, partition="young")

    lagging = await ask(http, "consumer-groups", "lagging")

    assert [entry["partition_name"] for entry in lagging] == ["old", "younger"]
    first = lagging[0]
    assert set(first) == {
        "consumer_group",
        "queue_name",
        "partition_name",
        "partition_id",
        "worker_id",
        "offset_lag",
        "time_lag_seconds",
        "lag_hours",
        "oldest_unconsumed_at",
        "last_consumed_at",
    }
    assert (first["consumer_group"], first["queue_name"], first["offset_lag"]) == ("g", "q", 1)
    assert (lagging[1]["offset_lag"], first["lag_hours"]) == (2, 3.03)
    everything = await ask(http, "consumer-groups", "lagging", minLagSeconds=0)
    assert {entry["partition_name"] for entry in everything} == {"old", "younger", "young"}


async def test_lagging_is_no_group(http: Http) -> None:
    await http.push("q", 1)
    await pop(http, "q", "lagging")

    assert isinstance(await ask(http, "consumer-groups", "lagging"), list)


async def test_a_group_shows_where_it_stands_in_each_partition(http: Http) -> None:
    await http.push("q", 1, 2, partition="p1")
    await http.push("q", 3, partition="p2")
    await consume(http, "q", ODD)
    await http.push("q", 4, 5, partition="p2")
    messages = await pop(http, "q", ODD, batch=1)

    shown = await ask(http, "consumer-groups", ODD)

    first, second = shown["q"]["partitions"]
    assert (first["partition"], first["totalConsumed"], first["offsetLag"], first["leaseActive"]) == ("p1", 2, 0, False)
    assert first["workerId"] is None
    assert first["lastConsumedAt"] is not None
    assert (second["totalConsumed"], second["offsetLag"], second["leaseActive"]) == (1, 2, True)
    assert second["workerId"] == messages[0]["leaseId"]


async def test_an_unknown_group_shows_nothing(http: Http) -> None:
    assert await ask(http, "consumer-groups", "nobody") == {}


# -- delete -------------------------------------------------------------------------------------------------------


async def test_a_deleted_group_starts_over_with_everything_that_is_retained(http: Http) -> None:
    await http.push("q", *range(10))
    assert await consume(http, "q", ODD) == list(range(10))

    answer = await order(http, "DELETE", "consumer-groups", ODD, deleteMetadata="true")

    assert answer == {"success": True, "consumerGroup": ODD, "deletedPartitions": 1, "metadataDeleted": True}
    assert await ask(http, "consumer-groups") == []
    assert await consume(http, "q", ODD) == list(range(10))


async def test_a_deleted_group_may_subscribe_anew(http: Http) -> None:
    await http.push("q", 1)
    await consume(http, "q", "g")
    await order(http, "DELETE", "consumer-groups", "g")

    assert await pop(http, "q", "g", subscriptionMode="new") == []

    await http.push("q", 2)
    assert await consume(http, "q", "g") == [2]


async def test_without_metadata_a_group_goes_back_to_the_start_of_its_subscription(http: Http) -> None:
    await http.push("q", "old")
    await pop(http, "q", "g", subscriptionMode="new")
    await http.push("q", "new 1", "new 2")
    assert await consume(http, "q", "g") == ["new 1", "new 2"]

    answer = await order(http, "DELETE", "consumer-groups", "g", deleteMetadata="false")

    assert (answer["deletedPartitions"], answer["metadataDeleted"]) == (1, False)
    assert (await group_of(http, "q", "g"))["subscriptionMode"] == "new"
    assert await consume(http, "q", "g") == ["new 1", "new 2"]


async def test_a_group_is_deleted_from_one_queue_alone(http: Http) -> None:
    for queue in ("a b", "c"):
        await http.push(queue, 1)
        await consume(http, queue, "g")

    answer = await order(http, "DELETE", "consumer-groups", "g", "queues", "a b", deleteMetadata="true")

    assert answer == {
        "success": True,
        "consumerGroup": "g",
        "queueName": "a b",
        "deletedPartitions": 1,
        "metadataDeleted": True,
    }
    assert await consume(http, "a b", "g") == [1]
    assert await consume(http, "c", "g") == []


async def test_deleting_releases_leases_and_wakes_who_waits(http: Http) -> None:
    await http.push("q", 1)
    assert await pop(http, "q", "g") != []
    exchange = http.open("GET", "/api/v1/pop/queue/q?consumerGroup=g&wait=true&timeout=60000")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)
        with trio.fail_after(5):
            await order(http, "DELETE", "consumer-groups", "g")
            await exchange.started.wait()

    assert [message["data"] for message in exchange.answer.json["messages"]] == [1]


async def test_a_deleted_group_starts_over_at_another_worker_too(http: Http, open_broker: OpenBroker) -> None:
    await http.push("q", 1)
    async with open_broker() as other:
        assert await other.drain("q", group="g") == [1]
        await order(http, "DELETE", "consumer-groups", "g")

        assert await other.drain("q", group="g") == [1]


async def test_deleting_what_is_not_there_deletes_nothing(http: Http) -> None:
    for parts in (("g",), ("g", "queues", "nothing")):
        answer = await order(http, "DELETE", "consumer-groups", *parts)
        assert (answer["success"], answer["deletedPartitions"]) == (True, 0)


# -- subscription -------------------------------------------------------------------------------------------------


async def test_a_changed_subscription_counts_when_the_group_starts_over(http: Http) -> None:
    await http.push("q", "early")
    await pop(http, "q", "g", subscriptionMode="new")
    at = (datetime.now(UTC) - timedelta(hours=1)).isoformat()

    answer = await order(http, "POST", "consumer-groups", "g", "subscription", body={"subscriptionTimestamp": at})

    assert (answer["success"], answer["consumerGroup"], answer["rowsUpdated"]) == (True, "g", 1)
    assert datetime.fromisoformat(answer["newTimestamp"]) == datetime.fromisoformat(at)
    assert await consume(http, "q", "g") == []
    await order(http, "DELETE", "consumer-groups", "g", deleteMetadata="false")
    assert await consume(http, "q", "g") == ["early"]


@pytest.mark.parametrize(
    "body", [b"", {}, {"subscriptionTimestamp": None}, {"subscriptionTimestamp": 7}, {"subscriptionTimestamp": ""}]
)
async def test_a_subscription_without_a_time_is_refused(http: Http, body: Any) -> None:
    answer = await http.post("/api/v1/consumer-groups/g/subscription", body)

    assert (answer.status, answer.error) == (400, "Missing subscriptionTimestamp in request body")


async def test_a_subscription_with_a_time_that_is_none_is_refused(http: Http) -> None:
    answer = await http.post("/api/v1/consumer-groups/g/subscription", {"subscriptionTimestamp": "yesterday"})

    assert (answer.status, answer.error) == (400, "subscriptionTimestamp must be an ISO 8601 time")


async def test_after_a_refresh_every_worker_knows_who_waits(http: Http, open_broker: OpenBroker) -> None:
    await configure(http, "q")
    exchanges = [http.open("GET", "/api/v1/pop/queue/q?consumerGroup=g&wait=true&timeout=60000") for _ in range(3)]
    async with open_broker() as other, trio.open_nursery() as consumers:
        for exchange in exchanges:
            consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 3)
        await order(http, "POST", "stats", "refresh")

        (group,) = await other.engine.admin.groups()
        assert (group.name, group.members) == ("g", 3)
        consumers.cancel_scope.cancel()


# -- seek ---------------------------------------------------------------------------------------------------------


async def test_a_seek_backwards_gives_everything_again(http: Http, database_clock: DatabaseClock) -> None:
    await http.push("q", *range(10))
    assert await consume(http, "q", ODD) == list(range(10))
    before = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()

    answer = await order(http, "POST", "consumer-groups", ODD, "queues", "q", "seek", body={"timestamp": before})

    assert answer["partitionsUpdated"] == 1
    assert (answer["success"], answer["seekToEnd"], answer["queueName"]) == (True, False, "q")
    assert datetime.fromisoformat(answer["targetTimestamp"]) == datetime.fromisoformat(before)
    assert await consume(http, "q", ODD) == list(range(10))


async def test_a_seek_to_a_time_goes_behind_what_was_created_up_to_it(
    http: Http, database_clock: DatabaseClock
) -> None:
    for number in range(40):
        await http.push("q", number)
        await database_clock.advance(10)
    messages = await pop(http, "q", "g", batch=100)

    at = messages[24]["createdAt"]
    moved = await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"timestamp": at})

    assert moved["partitionsUpdated"] == 1
    assert await consume(http, "q", "g") == list(range(25, 40))


@pytest.mark.parametrize("body", [{"toEnd": True}, {"timestamp": "now"}])
async def test_a_seek_to_the_end_passes_everything(http: Http, body: dict[str, object]) -> None:
    await http.push("q", 1, partition="a")
    await http.push("q", 2, partition="b")
    assert await pop(http, "q", "g", batch=1) != []

    answer = await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body=body)

    assert (answer["seekToEnd"], answer["targetTimestamp"], answer["partitionsUpdated"]) == (True, None, 2)
    assert await pop(http, "q", "g") == []
    await http.push("q", 3, partition="a")
    assert await consume(http, "q", "g") == [3]


async def test_a_seek_works_without_a_group_too(http: Http) -> None:
    await http.push("q", 1, 2)
    assert await consume(http, "q") == [1, 2]

    await order(
        http, "POST", "consumer-groups", "__QUEUE_MODE__", "queues", "q", "seek", body={"timestamp": "2000-01-01"}
    )

    assert await consume(http, "q") == [1, 2]


async def test_a_seek_goes_back_before_the_start_of_a_subscription(http: Http) -> None:
    await http.push("q", "before")
    await pop(http, "q", "g", subscriptionMode="new")
    await http.push("q", "after")
    assert await consume(http, "q", "g") == ["after"]

    await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"timestamp": "2000-01-01"})

    assert await consume(http, "q", "g") == ["before", "after"]


async def test_a_seek_ends_leases_and_forgets_failures(http: Http) -> None:
    await configure(http, "q", retryLimit=1)
    await http.push("q", 1)
    messages = await pop(http, "q", "g")
    await http.post(
        "/api/v1/ack",
        {
            "transactionId": messages[0]["transactionId"],
            "partitionId": messages[0]["partitionId"],
            "consumerGroup": "g",
            "status": "failed",
        },
    )
    held = await pop(http, "q", "g")
    assert held[0]["retryCount"] == 1

    await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"timestamp": "2000-01-01"})

    (again,) = await pop(http, "q", "g")
    assert (again["retryCount"], again["deliveryAttempt"]) == (0, 1)
    assert again["leaseId"] != held[0]["leaseId"]


async def test_a_seek_by_offset_is_exact(http: Http) -> None:
    await http.push("q", *range(10))
    await consume(http, "q", "g")

    await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"offset": 7})
    assert await consume(http, "q", "g") == [7, 8, 9]

    moved = await order(
        http, "POST", "consumer-groups", "g", "queues", "q", "partitions", "Default", "seek", body={"offset": 9}
    )
    assert moved["updated"]
    assert await consume(http, "q", "g") == [9]


async def test_a_partition_is_moved_to_its_end_by_an_empty_body(http: Http) -> None:
    results = await http.push("q", 1, 2, partition="a/b c")
    await http.push("q", 3, partition="other")
    await ack(http, await pop(http, "q", "g", batch=1), "g", "retry")

    answer = await order(http, "POST", "consumer-groups", "g", "queues", "q", "partitions", "a/b c", "seek")

    assert answer == {
        "success": True,
        "consumerGroup": "g",
        "queueName": "q",
        "partitionName": "a/b c",
        "updated": True,
        "cursorMovedTo": results[1]["message_id"],
    }
    assert await consume(http, "q", "g") == [3]


async def test_a_partition_goes_back_before_the_subscription_and_the_others_do_not(http: Http) -> None:
    for partition in ("a", "b"):
        await http.push("q", f"{partition} before", partition=partition)
        await http.push("q", f"{partition} meanwhile", partition=partition)
    created_at = (await ask(http, "messages", queue="q"))["messages"][0]["createdAt"]
    await ack(http, await pop(http, "q", "g", subscriptionFrom=created_at), "g", "retry")

    await order(http, "POST", "consumer-groups", "g", "queues", "q", "partitions", "a", "seek", body={"offset": 0})

    got = await consume(http, "q", "g")
    assert sorted(got) == ["a before", "a meanwhile", "b meanwhile"]


@pytest.mark.parametrize("body", [b"", {}, {"toEnd": False}, {"toEnd": "yes"}, {"timestamp": None}, {"timestamp": ""}])
async def test_a_seek_to_nowhere_is_refused(http: Http, body: Any) -> None:
    answer = await http.post("/api/v1/consumer-groups/g/queues/q/seek", body)

    assert (answer.status, answer.error) == (400, "Must specify either 'toEnd': true or 'timestamp'")


async def test_a_seek_to_a_bad_offset_is_refused(http: Http) -> None:
    for offset in (-1, 1.5, True, 2**63):
        answer = await http.post("/api/v1/consumer-groups/g/queues/q/seek", {"offset": offset})
        assert (answer.status, answer.error) == (400, "offset must be an integer, 0 or more")


async def test_a_seek_of_what_is_not_there_moves_nothing(http: Http) -> None:
    await http.push("q", 1)
    for group, queue in (("nobody", "q"), ("g", "nothing")):
        moved = await order(http, "POST", "consumer-groups", group, "queues", queue, "seek", body={"toEnd": True})
        assert (moved["success"], moved["partitionsUpdated"]) == (True, 0)
    moved = await order(http, "POST", "consumer-groups", "g", "queues", "q", "partitions", "nothing", "seek")
    assert (moved["updated"], moved["cursorMovedTo"]) == (False, None)


async def test_a_seek_is_seen_at_once_by_a_waiting_pop_of_another_worker(http: Http, open_broker: OpenBroker) -> None:
    await http.push("q", 1)
    assert await consume(http, "q", "g") == [1]
    async with open_broker() as other:
        got: list[Any] = []

        async def wait() -> None:
            got.extend((await other.pop("q", group="g", wait=30)).data)

        with trio.fail_after(10):
            async with trio.open_nursery() as consumers:
                consumers.start_soon(wait)
                await other.wait_parked(1)
                await order(
                    http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"timestamp": "2000-01-01"}
                )

    assert got == [1]
