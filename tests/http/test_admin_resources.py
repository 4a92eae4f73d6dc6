"""What there is and how much is in it, over HTTP."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tests.conftest import DatabaseClock

from .admin_kit import ack, ask, bury, configure, consume, order, pop
from .asgi_driver import Http


def six(total: int = 0, pending: int = 0, processing: int = 0, completed: int = 0, dead: int = 0) -> dict[str, int]:
    return {
        "total": total,
        "pending": pending,
        "processing": processing,
        "completed": completed,
        "failed": 0,
        "deadLetter": dead,
    }


# -- queues -------------------------------------------------------------------------------------------------------


async def test_queues_are_listed_newest_first_with_what_is_in_them(http: Http) -> None:
    await configure(http, "old", "n", "t")
    await http.push("new", 1, 2, partition="p")
    await pop(http, "new", batch=1)

    new, old = (await ask(http, "resources", "queues"))["queues"]

    assert UUID(new["id"])
    assert new == {
        "id": new["id"],
        "name": "new",
        "namespace": "",
        "task": "",
        "createdAt": new["createdAt"],
        "partitions": 1,
        "messages": {"total": 2, "pending": 1, "processing": 1},
    }
    assert (old["name"], old["namespace"], old["task"], old["partitions"]) == ("old", "n", "t", 1)
    assert old["messages"] == {"total": 0, "pending": 0, "processing": 0}


async def test_queues_are_filtered_and_paged(http: Http) -> None:
    for number in range(5):
        await configure(http, f"q{number}", "even" if number % 2 == 0 else "odd", f"t{number}")

    async def names(**query: Any) -> list[str]:
        return [queue["name"] for queue in (await ask(http, "resources", "queues", **query))["queues"]]

    assert await names() == ["q4", "q3", "q2", "q1", "q0"]
    assert await names(limit=2, offset=1) == ["q3", "q2"]
    assert await names(limit="many", offset="none") == ["q4", "q3", "q2", "q1", "q0"]
    assert await names(namespace="odd") == ["q3", "q1"]
    assert await names(task="t2") == ["q2"]
    assert await names(namespace="odd", task="t2") == []


async def test_a_queue_shows_its_partitions_and_totals(http: Http) -> None:
    await http.push("a/b c", 1, 2, 3, partition="one")
    await http.push("a/b c", 4, partition="two")
    messages = await pop(http, "a/b c", "g", partition="one")
    await ack(http, messages[:1], "g", "dlq")

    shown = await ask(http, "resources", "queues", "a/b c")

    assert (shown["name"], shown["namespace"], shown["task"]) == ("a/b c", "", "")
    one, two = shown["partitions"]
    assert (one["name"], two["name"]) == ("one", "two")
    assert one["stats"] == six(total=3, processing=2, completed=1, dead=1)
    assert two["stats"] == six(total=1, pending=1)
    assert shown["totals"] == six(total=4, pending=1, processing=2, completed=1, dead=1)
    assert one["oldestMessage"] is not None
    assert one["newestMessage"] is not None


async def test_an_empty_partition_has_no_oldest_message(http: Http) -> None:
    await configure(http, "q")

    (partition,) = (await ask(http, "resources", "queues", "q"))["partitions"]

    assert (partition["name"], partition["oldestMessage"], partition["newestMessage"]) == ("Default", None, None)


async def test_the_slowest_group_decides_what_is_pending(http: Http) -> None:
    await http.push("q", 1, 2, 3)
    await consume(http, "q", "fast")
    await ack(http, await pop(http, "q", "slow", batch=1), "slow")

    assert (await ask(http, "resources", "queues", "q"))["totals"] == six(total=3, pending=2, completed=1)


@pytest.mark.parametrize("holder", ["a", "b"])
async def test_of_two_groups_that_are_as_slow_the_one_that_holds_a_lease_says_what_is_processed(
    http: Http, holder: str
) -> None:
    await configure(http, "q")
    for group in ("a", "b"):
        assert await pop(http, "q", group) == []
    await http.push("q", 1, 2, 3)
    await pop(http, "q", holder, batch=2)

    shown = await ask(http, "resources", "queues", "q")
    assert shown["totals"] == six(total=3, pending=1, processing=2)
    assert shown["partitions"][0]["stats"] == six(total=3, pending=1, processing=2)
    (entry,) = (await ask(http, "resources", "queues"))["queues"]
    assert entry["messages"] == {"total": 3, "pending": 1, "processing": 2}


@pytest.mark.parametrize("path", ["resources/queues/x", "resources/queues/x/depth", "status/queues/x"])
async def test_a_queue_that_is_not_there_is_not_found(http: Http, path: str) -> None:
    answer = await http.get(f"/api/v1/{path}")

    assert (answer.status, answer.error) == (404, "Queue not found")


async def test_counts_go_with_retention(http: Http, database_clock: DatabaseClock) -> None:
    await configure(http, "q", retentionEnabled=True, retentionSeconds=60)
    await http.push("q", 1, 2)
    await database_clock.advance(100)
    await http.push("q", 3)
    store = http.app.service.context.engine.store
    queue = await store.catalogue.find("q")
    assert queue is not None
    await store.expire(queue, 10)

    assert (await ask(http, "resources", "queues", "q"))["totals"] == six(total=1, pending=1)


# -- depth --------------------------------------------------------------------------------------------------------


async def test_the_depth_of_a_queue_is_what_the_slowest_group_has_before_it(http: Http) -> None:
    await http.push("q", 1, 2, 3, partition="a")
    await http.push("q", 4, partition="b")
    await consume(http, "q", "fast")
    await ack(http, await pop(http, "q", "slow", batch=1), "slow")

    depth = await ask(http, "resources", "queues", "q", "depth")

    assert (depth["queue"], depth["group"], depth["conflation"]) == ("q", None, False)
    assert depth["pending"] == depth["effectivePending"] == 3
    assert sum(partition["pending"] for partition in depth["partitions"]) == 3
    assert depth["partitionsPending"] == len(depth["partitions"])
    assert await ask(http, "resources", "queues", "q", "depth", group="fast") == {
        "queue": "q",
        "group": "fast",
        "pending": 0,
        "partitionsPending": 0,
        "conflation": False,
        "effectivePending": 0,
        "partitions": [],
    }


async def test_a_group_that_has_never_popped_has_everything_before_it(http: Http) -> None:
    await http.push("q", 1, 2, partition="a")
    await http.push("q", 3, partition="b")

    depth = await ask(http, "resources", "queues", "q", "depth", group="new")

    assert (depth["pending"], depth["partitionsPending"]) == (3, 2)
    assert depth["partitions"] == [{"partition": "a", "pending": 2}, {"partition": "b", "pending": 1}]


# -- partitions, labels, overview ---------------------------------------------------------------------------------


async def test_partitions_are_listed_with_their_queue(http: Http) -> None:
    await configure(http, "q", "n", "t", priority=5)
    await http.push("q", 1, 2, partition="p")
    await pop(http, "q", batch=1)
    await http.push("other", 1)

    partitions = (await ask(http, "resources", "partitions", queue="q"))["partitions"]

    by_name = {partition["name"]: partition for partition in partitions}
    assert set(by_name) == {"p", "Default"}
    shown = by_name["p"]
    assert shown == {
        "id": shown["id"],
        "name": "p",
        "queue": "q",
        "namespace": "n",
        "task": "t",
        "queuePriority": 5,
        "createdAt": shown["createdAt"],
        "depth": 1,
        "processing": 1,
        "total": 2,
    }
    everywhere = (await ask(http, "resources", "partitions"))["partitions"]
    assert {(partition["queue"], partition["name"]) for partition in everywhere} == {
        ("q", "p"),
        ("q", "Default"),
        ("other", "Default"),
    }


async def test_partitions_are_filtered_by_what_is_pending(http: Http) -> None:
    for number in range(1, 4):
        await http.push("q", *range(number), partition=f"p{number}")
    await consume(http, "q", "g")
    await http.push("q", *range(3), partition="p1")
    await http.push("q", 1, partition="p2")

    async def names(**query: Any) -> set[str]:
        return {partition["name"] for partition in (await ask(http, "resources", "partitions", **query))["partitions"]}

    assert await names(minDepth=1) == {"p1", "p2"}
    assert await names(queue="q", minDepth=2) == {"p1"}
    assert await names(minDepth=4) == set()
    assert len(await names(limit=2)) == 2
    assert await names(queue="nothing") == set()


async def test_namespaces_and_tasks_sum_their_queues(http: Http) -> None:
    await configure(http, "a", "shop", "bill")
    await configure(http, "b", "shop", "mail")
    await http.push("a", 1, 2)
    await http.push("b", 3)
    await consume(http, "b")
    await http.push("x", 1)

    namespaces = await ask(http, "resources", "namespaces")
    tasks = await ask(http, "resources", "tasks")

    assert namespaces == {
        "namespaces": [
            {"namespace": "", "queues": 1, "partitions": 1, "messages": {"total": 1, "pending": 1}},
            {"namespace": "shop", "queues": 2, "partitions": 2, "messages": {"total": 3, "pending": 2}},
        ]
    }
    assert [(task["task"], task["messages"]) for task in tasks["tasks"]] == [
        ("", {"total": 1, "pending": 1}),
        ("bill", {"total": 2, "pending": 2}),
        ("mail", {"total": 1, "pending": 0}),
    ]


async def test_the_overview_sums_everything(http: Http, database_clock: DatabaseClock) -> None:
    await configure(http, "a", "n", "t")
    await http.push("a", 1, 2, 3, 4)
    await consume(http, "a", "done")
    await ack(http, await pop(http, "a", "late", batch=1), "late", "dlq")
    await database_clock.advance(100)
    await pop(http, "a", "late", batch=1)
    await http.push("b", 1)

    overview = await ask(http, "resources", "overview")

    assert (overview["queues"], overview["partitions"], overview["namespaces"], overview["tasks"]) == (2, 2, 1, 1)
    assert overview["messages"] == six(total=5, pending=3, processing=1, completed=1, dead=1)
    lag = overview["lag"]
    assert lag["offset"] == {"avg": 1.5, "median": 1.5, "min": 0, "max": 3}
    assert 100 <= lag["time"]["max"] < 160
    assert lag["time"]["min"] == 0
    assert set(overview["throughput"]) == {"ingestedPerSecond", "processedPerSecond"}
    assert overview["statsAge"] == 0


async def test_an_empty_server_has_an_overview(http: Http) -> None:
    overview = await ask(http, "resources", "overview")

    assert (overview["queues"], overview["messages"]) == (0, six())
    assert overview["lag"]["offset"] == {"avg": 0, "median": 0, "min": 0, "max": 0}


# -- clear --------------------------------------------------------------------------------------------------------


async def test_clearing_a_queue_removes_messages_and_dead_letters_and_keeps_the_groups(http: Http) -> None:
    for partition in ("a", "b"):
        await http.push("q 1", 1, 2, partition=partition)
    await bury(http, "q 1", group="g")
    await http.push("q 1", 3, partition="a")
    assert await pop(http, "q 1", "h", batch=1) != []

    answer = await order(http, "DELETE", "queues", "q 1", "clear")

    assert answer == {"cleared": True, "count": 5, "queue": "q 1", "partition": "all"}
    assert (await ask(http, "resources", "queues", "q 1"))["totals"] == six()
    assert (await ask(http, "dlq", queue="q 1"))["total"] == 0
    for group in ("g", "h"):
        assert await pop(http, "q 1", group) == []
    await http.push("q 1", 4, partition="a")
    for group in ("g", "h"):
        assert await consume(http, "q 1", group) == [4]


async def test_one_partition_is_cleared_alone(http: Http) -> None:
    await http.push("q", 1, 2, partition="a b")
    await http.push("q", 3, partition="c")

    answer = await order(http, "DELETE", "queues", "q", "clear", partition="a b")

    assert (answer["count"], answer["partition"]) == (2, "a b")
    assert await consume(http, "q") == [3]
    assert (await order(http, "DELETE", "queues", "q", "clear", partition="nothing"))["count"] == 0


async def test_a_transaction_id_may_be_used_again_after_clearing(http: Http) -> None:
    await http.push("q", 1, transactionId="x")
    await order(http, "DELETE", "queues", "q", "clear")

    (result,) = await http.push("q", 2, transactionId="x")

    assert result["status"] == "queued"


async def test_clearing_a_queue_that_is_not_there_is_refused(http: Http) -> None:
    answer = await http.request("DELETE", "/api/v1/queues/nothing/clear")

    assert (answer.status, answer.error) == (404, "Queue not found")
