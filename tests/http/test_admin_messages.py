"""Single messages and dead letters over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import trio

from tests.conftest import DatabaseClock, OpenBroker, wait_until

from .admin_kit import ack, ask, bury, configure, consume, order, pop
from .asgi_driver import Http


async def statuses(http: Http, **query: Any) -> list[tuple[str, str]]:
    return [
        (message["transactionId"], message["status"]) for message in (await ask(http, "messages", **query))["messages"]
    ]


async def push_ids(http: Http, queue: str, *ids: str, partition: str = "Default") -> str:
    """Push a message for each transaction id, its payload the id; the partition's id."""
    items = [{"queue": queue, "partition": partition, "payload": id, "transactionId": id} for id in ids]
    answer = await http.post("/api/v1/push", {"items": items})
    assert answer.status == 201
    partition_id: str = answer.json[0]["partitionId"]
    return partition_id


# -- list ---------------------------------------------------------------------------------------------------------


async def test_the_list_is_newest_first_and_says_where_each_message_stands(http: Http) -> None:
    await configure(http, "q", "shop", "bill", priority=3)
    partition_id = await push_ids(http, "q", "a", "b", "c", partition="p")
    await ack(http, await pop(http, "q", batch=1))
    held = await pop(http, "q", batch=1)

    page = await ask(http, "messages", queue="q")

    assert [message["transactionId"] for message in page["messages"]] == ["c", "b", "a"]
    assert page["mode"] == {"hasQueueMode": True, "busGroupsCount": 0, "type": "queue"}
    pending, processing, completed = page["messages"]
    assert pending == {
        "id": pending["id"],
        "transactionId": "c",
        "partitionId": partition_id,
        "queuePath": "q/p",
        "queue": "q",
        "partition": "p",
        "namespace": "shop",
        "task": "bill",
        "status": "pending",
        "queueStatus": "pending",
        "busStatus": {"consumedBy": 0, "totalGroups": 0},
        "traceId": None,
        "producerSub": None,
        "queuePriority": 3,
        "createdAt": pending["createdAt"],
        "leaseExpiresAt": None,
        "offset": 2,
    }
    assert (processing["id"], processing["status"]) == (held[0]["id"], "processing")
    assert datetime.fromisoformat(processing["leaseExpiresAt"]) > datetime.now(UTC)
    assert completed["status"] == "completed"


async def test_a_message_is_completed_when_every_group_has_consumed_it(http: Http) -> None:
    await push_ids(http, "q", "a", "b")
    for group in ("g", "h"):
        await ack(http, await pop(http, "q", group, batch=1), group)
    await ack(http, await pop(http, "q", "g"), "g")

    page = await ask(http, "messages", queue="q")

    assert page["mode"] == {"hasQueueMode": False, "busGroupsCount": 2, "type": "bus"}
    second, first = page["messages"]
    assert (first["status"], first["queueStatus"], first["busStatus"]) == (
        "completed",
        None,
        {"consumedBy": 2, "totalGroups": 2},
    )
    assert (second["status"], second["busStatus"]) == ("pending", {"consumedBy": 1, "totalGroups": 2})


async def test_a_queue_of_both_modes_counts_by_the_consumers_without_a_group(http: Http) -> None:
    await push_ids(http, "q", "a")
    await consume(http, "q")
    await pop(http, "q", "g", subscriptionMode="new")

    page = await ask(http, "messages", queue="q")

    assert page["mode"]["type"] == "hybrid"
    assert page["messages"][0]["status"] == "completed"


@pytest.mark.parametrize("wanted", ["pending", "processing", "completed", "dead_letter", "failed"])
async def test_the_list_is_filtered_by_status(http: Http, wanted: str) -> None:
    await push_ids(http, "q", "done", "dead", "held", "waiting")
    await ack(http, await pop(http, "q", batch=1))
    await ack(http, await pop(http, "q", batch=1), status="dlq")
    await pop(http, "q", batch=1)

    found = await statuses(http, queue="q", status=wanted)

    expected = {
        "pending": ("waiting", "pending"),
        "processing": ("held", "processing"),
        "completed": ("done", "completed"),
        "dead_letter": ("dead", "dead_letter"),
        "failed": ("dead", "dead_letter"),
    }
    assert found == [expected[wanted]]


async def test_the_list_is_filtered_by_place(http: Http) -> None:
    await configure(http, "a", "n", "t")
    await push_ids(http, "a", "1", partition="x")
    await push_ids(http, "a", "2", partition="y/z ü")
    await push_ids(http, "b", "3", partition="x")

    async def ids(**query: Any) -> list[str]:
        return sorted(id for id, _ in await statuses(http, **query))

    assert await ids() == ["1", "2", "3"]
    assert await ids(queue="a") == ["1", "2"]
    assert await ids(partition="x") == ["1", "3"]
    assert await ids(queue="a", partition="y/z ü") == ["2"]
    assert await ids(namespace="n") == ["1", "2"]
    assert await ids(ns="n", task="t") == ["1", "2"]
    assert await ids(task="other") == []
    assert await ids(queue="nothing") == []


async def test_the_list_shows_the_last_hour_unless_asked_otherwise(http: Http, database_clock: DatabaseClock) -> None:
    await push_ids(http, "q", "older")
    await database_clock.advance(5400)
    await push_ids(http, "q", "old")
    await database_clock.advance(5400)
    await push_ids(http, "q", "new")
    now = datetime.now(UTC)

    assert await statuses(http, queue="q") == [("new", "pending")]
    long_ago = (now - timedelta(days=1)).isoformat()
    assert [id for id, _ in await statuses(http, queue="q", **{"from": long_ago})] == ["new", "old", "older"]
    before = (now - timedelta(hours=1)).isoformat()
    assert [id for id, _ in await statuses(http, queue="q", **{"from": long_ago, "to": before})] == ["old", "older"]
    assert [id for id, _ in await statuses(http, queue="q", to=before)] == ["old"]


async def test_to_covers_its_whole_minute(http: Http) -> None:
    await push_ids(http, "q", "now")
    this_minute = datetime.now(UTC).replace(second=0, microsecond=0).isoformat()

    assert await statuses(http, queue="q", to=this_minute) == [("now", "pending")]


async def test_an_end_at_the_beginning_of_time_is_an_empty_list(http: Http) -> None:
    await push_ids(http, "q", "now")

    assert await statuses(http, queue="q", to="0001-01-01T00:00:00Z") == []


async def test_a_message_says_its_time_in_milliseconds(http: Http) -> None:
    await push_ids(http, "q", "a")
    [message] = (await ask(http, "messages", queue="q"))["messages"]
    [popped] = await pop(http, "q")

    assert message["createdAt"] == popped["createdAt"][:-4] + "Z"
    assert len(message["createdAt"]) == len("2026-01-01T00:00:00.000Z")


async def test_the_list_goes_on_where_the_page_before_ended(http: Http) -> None:
    for number in range(6):
        await push_ids(http, "q", *(f"{number}{letter}" for letter in "abc"), partition=f"p{number % 2}")

    pages = [await statuses(http, queue="q", limit=5, offset=offset) for offset in range(0, 20, 5)]

    assert [len(page) for page in pages] == [5, 5, 5, 3]
    found = [id for page in pages for id, _ in page]
    assert len(set(found)) == 18
    assert [id[0] for id in found] == [str(number) for number in range(5, -1, -1) for _ in "abc"]


async def test_a_payload_is_not_read_for_the_list(http: Http) -> None:
    await http.push("q", {"data": ',"data":"', "big": "x" * 300_000})

    answer = await http.get("/api/v1/messages?queue=q")

    assert len(answer.body) < 2000
    assert len(answer.json["messages"]) == 1


# -- one message --------------------------------------------------------------------------------------------------


async def test_a_message_is_shown_with_its_payload_and_every_group(http: Http) -> None:
    await configure(http, "q", leaseTime=30, retryLimit=2)
    partition_id = await push_ids(http, "q", "order/7 ü", "b")
    await ack(http, await pop(http, "q", "done", batch=1), "done")
    await pop(http, "q", "busy", batch=1)

    shown = await ask(http, "messages", partition_id, "order/7 ü")

    assert (shown["transactionId"], shown["payload"], shown["status"]) == ("order/7 ü", "order/7 ü", "processing")
    assert (shown["isEncrypted"], shown["errorMessage"], shown["retryCount"]) == (False, None, 0)
    assert shown["queueConfig"] == {"leaseTime": 30, "retryLimit": 2, "retryDelay": 1000, "ttl": 3600, "priority": 0}
    assert shown["mode"] == {"hasQueueMode": False, "busGroupsCount": 2, "type": "bus", "consumedByGroups": 1}
    busy, done = shown["consumerGroups"]
    assert (done["name"], done["consumed"], done["leaseExpiresAt"]) == ("done", True, None)
    assert (busy["name"], busy["consumed"]) == ("busy", False)
    assert busy["leaseExpiresAt"] is not None


async def test_an_encrypted_message_is_shown_in_clear(http: Http) -> None:
    await configure(http, "q", encryptionEnabled=True)
    (result,) = await http.push("q", {"secret": 1})

    shown = await ask(http, "messages", result["partitionId"], result["transactionId"])

    assert (shown["payload"], shown["isEncrypted"]) == ({"secret": 1}, True)


async def test_a_dead_letter_is_shown_with_its_error(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a")
    await bury(http, "q", "no such customer")

    shown = await ask(http, "messages", partition_id, "a")

    assert (shown["status"], shown["errorMessage"]) == ("dead_letter", "no such customer")


@pytest.mark.parametrize("partition_id", ["not-a-uuid", "5f0c8c1e-3a52-4d0e-9b57-6f1c2d9e7a40"])
async def test_an_unknown_message_is_not_found(http: Http, partition_id: str) -> None:
    answer = await http.get(f"/api/v1/messages/{partition_id}/a")

    assert (answer.status, answer.error) == (404, "Message not found")


# -- delete -------------------------------------------------------------------------------------------------------


async def test_a_deleted_message_is_delivered_to_nobody(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b", "c")
    await pop(http, "q", "before", batch=1, autoAck="true")

    answer = await order(http, "DELETE", "messages", partition_id, "b")

    assert answer == {
        "success": True,
        "partitionId": partition_id,
        "transactionId": "b",
        "message": "Message deleted",
    }
    assert await consume(http, "q", "before") == ["c"]
    assert await consume(http, "q", "after") == ["a", "c"]
    assert await consume(http, "q") == ["a", "c"]
    assert [id for id, _ in await statuses(http, queue="q")] == ["c", "a"]
    assert (await http.get(f"/api/v1/messages/{partition_id}/b")).status == 404


@pytest.mark.parametrize("ids", [("a", "b", "c"), None], ids=["given ids", "minted ids"])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_batch_with_a_deleted_message_is_complete_without_it(
    http: Http, ids: tuple[str, ...] | None, place: int
) -> None:
    items = [{"queue": "q", "payload": n, **({"transactionId": ids[n]} if ids else {})} for n in range(3)]
    results = (await http.post("/api/v1/push", {"items": items})).json
    await order(http, "DELETE", "messages", results[place]["partitionId"], results[place]["transactionId"])

    messages = await pop(http, "q")

    assert [message["data"] for message in messages] == [n for n in range(3) if n != place]
    assert (await ack(http, messages))[-1]["leaseReleased"]
    assert await pop(http, "q") == []


async def test_a_message_deleted_under_a_lease_does_not_hold_it_up(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b", "c")
    messages = await pop(http, "q", batch=2)

    await order(http, "DELETE", "messages", partition_id, "a")
    await ack(http, messages[1:])

    assert await consume(http, "q") == ["c"]


async def test_the_last_message_of_a_lease_deleted_ends_it(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b")
    (held,) = await pop(http, "q", batch=1)
    assert held["data"] == "a"

    await order(http, "DELETE", "messages", partition_id, "a")

    assert await consume(http, "q") == ["b"]


async def test_a_deleted_message_is_gone_at_a_worker_that_has_read_it_before(
    http: Http, open_broker: OpenBroker
) -> None:
    partition_id = await push_ids(http, "q", *"abcdef")
    async with open_broker() as other:
        first = await other.pop("q", batch=1, auto_ack=True)
        assert first.data == ["a"]  # the rest of the segment is in its cache now

        await order(http, "DELETE", "messages", partition_id, "c")

        assert await other.drain("q") == ["b", "d", "e", "f"]


async def test_every_message_of_a_partition_may_be_deleted(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b")
    for id in ("a", "b"):
        await order(http, "DELETE", "messages", partition_id, id)

    assert await pop(http, "q") == []
    await push_ids(http, "q", "c")
    assert await consume(http, "q") == ["c"]


@pytest.mark.parametrize(
    "id", ["order-1", "0197f0a2-0000-7000-8000-000000000001", "5f0c8c1e-3a52-4d0e-9b57-6f1c2d9e7a40"]
)
async def test_the_id_of_a_deleted_message_may_be_used_again(http: Http, id: str) -> None:
    partition_id = await push_ids(http, "q", id)
    await order(http, "DELETE", "messages", partition_id, id)

    answer = await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": "new", "transactionId": id}]})

    assert answer.json[0]["status"] == "queued"
    assert await consume(http, "q") == ["new"]


async def test_a_deleted_message_is_no_dead_letter_any_more(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a")
    await bury(http, "q")

    await order(http, "DELETE", "messages", partition_id, "a")

    assert (await ask(http, "dlq", queue="q"))["total"] == 0


async def test_a_deleted_message_of_an_encrypted_queue_leaves_the_others_readable(http: Http) -> None:
    await configure(http, "q", encryptionEnabled=True)
    partition_id = await push_ids(http, "q", "a", "b", "c")

    await order(http, "DELETE", "messages", partition_id, "a")

    assert await consume(http, "q") == ["b", "c"]


async def test_deleting_what_is_not_there_says_so(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a")
    await order(http, "DELETE", "messages", partition_id, "a")

    for target in ((partition_id, "a"), (str(uuid4()), "a"), ("nonsense", "a")):
        answer = await order(http, "DELETE", "messages", *target)
        assert (answer["success"], answer["message"]) == (False, "Message not found")


async def test_a_seek_backwards_does_not_bring_a_deleted_message_back(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b", "c")
    await consume(http, "q", "g")
    await order(http, "DELETE", "messages", partition_id, "b")

    await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"timestamp": "2000-01-01"})

    assert await consume(http, "q", "g") == ["a", "c"]


# -- retry and dead letters by hand -------------------------------------------------------------------------------


async def test_a_retried_dead_letter_comes_again_at_the_end(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a")
    await bury(http, "q")
    await push_ids(http, "q", "b")

    answer = await order(http, "POST", "messages", partition_id, "a", "retry")

    assert (answer["retried"], answer["transactionId"]) == (True, "a")
    assert (await ask(http, "dlq", queue="q"))["messages"] == []
    messages = await pop(http, "q")
    assert [message["data"] for message in messages] == ["b", "a"]
    assert messages[1]["transactionId"] == answer["newTransactionId"] != "a"
    await ack(http, messages)


async def test_a_dead_letter_is_retried_after_its_message_has_expired(
    http: Http, database_clock: DatabaseClock
) -> None:
    await configure(http, "q", retentionEnabled=True, retentionSeconds=60)
    (minted,) = await http.push("q", {"kept": True})
    partition_id = await push_ids(http, "q", "given")
    await bury(http, "q")
    await database_clock.advance(100)
    store = http.app.service.context.engine.store
    queue = await store.catalogue.find("q")
    assert queue is not None
    assert await store.expire(queue, 10) == 2

    await order(http, "POST", "messages", partition_id, minted["transactionId"], "retry")
    await order(http, "POST", "messages", partition_id, "given", "retry")

    assert await consume(http, "q") == [{"kept": True}, "given"]


async def test_a_message_that_is_no_dead_letter_is_not_retried(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a")

    answer = await order(http, "POST", "messages", partition_id, "a", "retry")

    assert answer["retried"] is False
    assert await consume(http, "q") == ["a"]


async def test_a_message_moved_to_the_dead_letters_is_skipped_without_a_group(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b", "c")

    answer = await order(http, "POST", "messages", partition_id, "b", "dlq")

    assert answer == {"movedToDLQ": True, "transactionId": "b"}
    assert await consume(http, "q") == ["a", "c"]
    assert await consume(http, "q", "g") == ["a", "b", "c"]
    (letter,) = (await ask(http, "dlq", queue="q"))["messages"]
    assert (letter["transactionId"], letter["data"], letter["consumerGroup"]) == ("b", "b", "__QUEUE_MODE__")


async def test_a_message_moved_to_the_dead_letters_under_a_lease_counts_as_done(http: Http) -> None:
    partition_id = await push_ids(http, "q", "a", "b")
    messages = await pop(http, "q")

    await order(http, "POST", "messages", partition_id, "a", "dlq")
    results = await ack(http, messages[1:])

    assert results[0]["leaseReleased"]


@pytest.mark.parametrize("what", ["retry", "dlq"])
async def test_an_unknown_message_is_neither_retried_nor_moved(http: Http, what: str) -> None:
    partition_id = await push_ids(http, "q", "a")
    for target in ((partition_id, "x"), (str(uuid4()), "a"), ("nonsense", "a")):
        answer = await http.post(f"/api/v1/messages/{target[0]}/{target[1]}/{what}")
        assert (answer.status, answer.error) == (404, "Message not found")


# -- dead letters -------------------------------------------------------------------------------------------------


async def test_a_dead_letter_keeps_its_error_its_payload_and_where_it_was(http: Http) -> None:
    await configure(http, "q", "n", "t")
    (result,) = await http.push("q", {"n": 1}, partition="p", traceId=str(uuid4()))
    await bury(http, "q", "because", "g")

    page = await ask(http, "dlq", queue="q")

    (letter,) = page["messages"]
    assert letter == {
        "id": result["message_id"],
        "messageId": result["message_id"],
        "transactionId": result["transaction_id"],
        "partitionId": result["partition_id"],
        "queue": "q",
        "partition": "p",
        "queueName": "q",
        "partitionName": "p",
        "namespace": "n",
        "task": "t",
        "consumerGroup": "g",
        "errorMessage": "because",
        "retryCount": 0,
        "data": {"n": 1},
        "producerSub": None,
        "traceId": result["trace_id"],
        "createdAt": letter["createdAt"],
        "failedAt": letter["failedAt"],
        "originalCreatedAt": letter["createdAt"],
        "movedToDlqAt": letter["failedAt"],
    }
    assert (page["total"], page["limit"], page["offset"]) == (1, 100, 0)
    assert page["pagination"] == {"limit": 100, "offset": 0}


async def test_dead_letters_are_filtered_and_paged_newest_failure_first(
    http: Http, database_clock: DatabaseClock
) -> None:
    await push_ids(http, "a", "1", partition="x")
    await bury(http, "a", group="g")
    await database_clock.advance(600)
    await push_ids(http, "a", "2", partition="y")
    await push_ids(http, "b", "3", partition="x")
    for queue in ("a", "b"):
        await bury(http, queue)

    async def found(**query: Any) -> tuple[list[str], int]:
        page = await ask(http, "dlq", **query)
        return [letter["transactionId"] for letter in page["messages"]], page["total"]

    ids, total = await found()
    assert (ids[0], set(ids), total) == ("3", {"1", "2", "3"}, 4)
    assert await found(queue="b") == (["3"], 1)
    assert await found(queue="a", consumerGroup="g") == (["1"], 1)
    assert await found(queue="a", partition="y") == (["2"], 1)
    assert (await found(partition="x"))[1] == 3
    recently = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    assert await found(queue="a", to=recently) == (["1"], 1)
    assert (await found(queue="a", **{"from": recently}))[1] == 2
    assert len((await found(limit=2))[0]) == 2
    assert (await found(limit=2, offset=3)) == (ids[3:], 4)
    assert await found(queue="nothing") == ([], 0)


async def test_an_encrypted_dead_letter_is_shown_in_clear(http: Http) -> None:
    await configure(http, "q", encryptionEnabled=True)
    await http.push("q", {"secret": 1})
    await bury(http, "q")

    assert (await ask(http, "dlq", queue="q"))["messages"][0]["data"] == {"secret": 1}


async def test_dead_letters_go_with_their_queue(http: Http) -> None:
    await http.push("q", 1)
    await bury(http, "q")

    await order(http, "DELETE", "resources", "queues", "q")

    assert (await ask(http, "dlq"))["total"] == 0


# -- dead letters, many at once -----------------------------------------------------------------------------------


async def dead_letters_of_three_kinds(http: Http, clock: DatabaseClock) -> None:
    """On queue q: 1 and 2 of partition a timed out long ago, 3 of b is broken, 4 of b timed out for group g."""
    await push_ids(http, "q", "1", "2", partition="a")
    await bury(http, "q", "timed out after 5 s")
    await clock.advance(600)
    await push_ids(http, "q", "3", partition="b")
    await bury(http, "q", "broken")
    await order(http, "POST", "consumer-groups", "g", "queues", "q", "seek", body={"toEnd": True})
    await pop(http, "q", "g", subscriptionMode="new")
    await push_ids(http, "q", "4", partition="b")
    await bury(http, "q", "timed out after 9 s", "g")
    await order(http, "POST", "consumer-groups", "__QUEUE_MODE__", "queues", "q", "seek", body={"toEnd": True})


async def left(http: Http) -> set[str]:
    return {letter["transactionId"] for letter in (await ask(http, "dlq", queue="q"))["messages"]}


@pytest.mark.parametrize(
    ("chosen", "taken"),
    [
        ({}, {"1", "2", "3", "4"}),
        ({"partition": "a"}, {"1", "2"}),
        ({"error": "timed out"}, {"1", "2", "4"}),
        ({"consumerGroup": "g"}, {"4"}),
        ({"limit": 1}, {"1"}),
        ({"error": "%"}, set()),
        ({"partition": "nothing"}, set()),
    ],
)
async def test_dead_letters_are_redriven_by_what_they_are(
    http: Http, database_clock: DatabaseClock, chosen: dict[str, Any], taken: set[str]
) -> None:
    await dead_letters_of_three_kinds(http, database_clock)

    looked = await order(http, "POST", "dlq", "redrive", body={"queue": "q", **chosen, "dryRun": True})
    assert (looked["matched"], looked["redriven"], looked["dryRun"]) == (len(taken), 0, True)
    assert await left(http) == {"1", "2", "3", "4"}
    answer = await order(http, "POST", "dlq", "redrive", body={"queue": "q", **chosen})

    assert (answer["queue"], answer["matched"], answer["redriven"]) == ("q", len(taken), len(taken))
    assert answer["messageIds"] == looked["messageIds"]
    assert await left(http) == {"1", "2", "3", "4"} - taken
    assert set(await consume(http, "q")) == taken


async def test_dead_letters_are_redriven_by_when_they_failed(http: Http, database_clock: DatabaseClock) -> None:
    await dead_letters_of_three_kinds(http, database_clock)
    recently = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()

    answer = await order(http, "POST", "dlq", "redrive", body={"queue": "q", "to": recently})

    assert answer["redriven"] == 2
    assert await left(http) == {"3", "4"}


async def test_many_dead_letters_are_redriven_in_order(http: Http) -> None:
    await http.push("q", *range(350))
    await bury(http, "q")

    answer = await order(http, "POST", "dlq", "redrive", body={"queue": "q"})

    assert (answer["redriven"], len(answer["messageIds"])) == (350, 100)
    assert await consume(http, "q") == list(range(350))


async def test_a_message_that_two_groups_set_aside_is_redriven_once(http: Http) -> None:
    await http.push("q", "once")
    for group in ("g", "h"):
        await bury(http, "q", group=group)

    assert (await order(http, "POST", "dlq", "redrive", body={"queue": "q"}))["redriven"] == 1

    assert await left(http) == set()
    for group in ("g", "h"):
        assert await consume(http, "q", group) == ["once"]


async def test_redriving_wakes_who_waits(http: Http) -> None:
    await http.push("q", 1)
    await bury(http, "q")
    exchange = http.open("GET", "/api/v1/pop/queue/q?wait=true&timeout=60000")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)
        with trio.fail_after(5):
            await order(http, "POST", "dlq", "redrive", body={"queue": "q"})
            await exchange.started.wait()

    assert [message["data"] for message in exchange.answer.json["messages"]] == [1]


async def test_dead_letters_are_removed_by_what_they_are(http: Http, database_clock: DatabaseClock) -> None:
    await dead_letters_of_three_kinds(http, database_clock)

    looked = await order(http, "DELETE", "dlq", queue="q", error="timed out", dryRun="true")
    assert (looked["matched"], looked["removed"], looked["dryRun"]) == (3, 0, True)
    answer = await order(http, "DELETE", "dlq", queue="q", error="timed out")

    assert (answer["matched"], answer["removed"]) == (3, 3)
    assert await left(http) == {"3"}
    assert (await ask(http, "dlq", queue="q"))["total"] == 1
    message_id = (await ask(http, "dlq", queue="q"))["messages"][0]["messageId"]
    assert (await order(http, "DELETE", "dlq", queue="q", messageId=message_id))["removed"] == 1
    assert sorted(await consume(http, "q", "all")) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "queue is required"),
        ({"queue": 7}, "queue must be a string"),
        ({"queue": "q", "from": "yesterday"}, "from must be an ISO 8601 time"),
        ({"queue": "q", "messageId": "x"}, "messageId must be a UUID"),
        ({"queue": "q", "limit": 0}, "limit must be an integer, 1 or more"),
        ({"queue": "q", "limit": "all"}, "limit must be an integer, 1 or more"),
        ({"queue": "q", "dryRun": "yes"}, "dryRun must be true or false"),
    ],
)
async def test_a_filter_that_cannot_be_read_chooses_nothing(http: Http, body: dict[str, Any], error: str) -> None:
    await http.push("q", 1)
    await bury(http, "q")

    answer = await http.post("/api/v1/dlq/redrive", body)

    assert (answer.status, answer.error) == (400, error)
    assert (await ask(http, "dlq", queue="q"))["total"] == 1


async def test_removing_without_a_readable_filter_is_refused(http: Http) -> None:
    for query in ("", "queue=q&limit=x", "queue=q&to=later"):
        assert (await http.request("DELETE", f"/api/v1/dlq?{query}")).status == 400


async def test_a_queue_that_is_not_there_has_no_dead_letters_to_redrive(http: Http) -> None:
    for answer in (
        await http.post("/api/v1/dlq/redrive", {"queue": "nothing"}),
        await http.request("DELETE", "/api/v1/dlq?queue=nothing"),
    ):
        assert (answer.status, answer.error) == (404, "Queue not found")


async def test_old_dead_letters_are_forgotten(http: Http, database_clock: DatabaseClock) -> None:
    await push_ids(http, "q", *map(str, range(150)))
    await bury(http, "q")
    await database_clock.advance(3 * 86400)
    await push_ids(http, "q", "new")
    await bury(http, "q")

    assert await http.app.service.context.engine.store.redrive.expire(2) == 150

    assert await left(http) == {"new"}
    assert (await ask(http, "dlq", queue="q"))["total"] == 1
