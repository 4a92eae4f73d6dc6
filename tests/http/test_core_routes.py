"""What each route answers when all is well: the shapes that clients read."""

from __future__ import annotations

import itertools
import re
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from .asgi_driver import Http

UUID_TEXT = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TS6 = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z")


async def test_push_answers_what_became_of_each_item(http: Http) -> None:
    body = {
        "items": [
            {"queue": "orders", "payload": {"n": 1}, "transactionId": "a"},
            {"queue": "orders", "payload": {"n": 2}, "transactionId": "a"},
            {
                "queue": "orders",
                "partition": "p 1",
                "payload": 3,
                "traceId": "0F8BB6C2-4305-509F-BB8B-3D9FC63D7D5D",
            },
        ]
    }

    answer = await http.post("/api/v1/push", body)

    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    first, second, third = answer.json
    assert first == {
        "index": 0,
        "transaction_id": "a",
        "transactionId": "a",
        "status": "queued",
        "message_id": first["messageId"],
        "messageId": first["message_id"],
        "partition_id": first["partitionId"],
        "partitionId": first["partition_id"],
        "trace_id": None,
        "queueName": "orders",
        "queue": "orders",
        "partition": "Default",
    }
    assert UUID_TEXT.fullmatch(first["message_id"])
    assert UUID_TEXT.fullmatch(first["partition_id"])
    assert (second["index"], second["status"], second["message_id"]) == (1, "duplicate", first["message_id"])
    assert third["trace_id"] == "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"
    assert third["partition"] == "p 1"
    assert third["transaction_id"] == third["message_id"]
    assert UUID(third["message_id"]).version == 7


@pytest.mark.parametrize(
    "payload",
    [
        "null", "0", "-0", "1e400", '""', "{}", "[]", "false", '"\\u00e9\\n\\u0000"', '"é\u2028😀"', "1.10",
        "123456789012345678901234567890", '{"a":{"a":1},"a":2}', '"</script>\\u007f"', "[[[[[[]]]]]]",
    ],
)  # fmt: skip
async def test_a_payload_comes_back_exactly_as_it_was_written(http: Http, payload: str) -> None:
    await http.post("/api/v1/push", b'{"items":[{"queue":"q","payload":' + payload.encode() + b"}]}")

    answer = await http.get("/api/v1/pop/queue/q?autoAck=true")

    assert b'"data":' + payload.encode() + b"," in answer.body


async def test_newlines_between_the_tokens_of_a_payload_are_taken_out(http: Http) -> None:
    body = (
        b'{"items":[\n{"queue":"q",\r\n"payload":{\n "a" :\t[ 1.0,\r\n "x \\n y" ] }},{"queue":"q","payload":\n2\n}]}'
    )
    assert (await http.post("/api/v1/push", body)).status == 201

    answer = await http.get("/api/v1/pop/queue/q?batch=5")

    assert [message["data"] for message in answer.json["messages"]] == [{"a": [1.0, "x \n y"]}, 2]
    assert b'"data":{"a":[1.0,"x \\n y"]}' in answer.body


async def test_a_missing_payload_is_null_and_a_null_name_is_its_default(http: Http) -> None:
    item = {"queue": "q", "partition": None, "transactionId": None, "traceId": None}

    [result] = (await http.post("/api/v1/push", {"items": [item, {"queue": "q", "traceId": ""}]})).json[:1]

    assert result["partition"] == "Default"
    messages = (await http.get("/api/v1/pop/queue/q?batch=2")).json["messages"]
    assert [message["data"] for message in messages] == [None, None]


async def test_a_pop_answers_the_envelope_and_its_messages(http: Http) -> None:
    [pushed] = await http.push("orders", {"n": 1}, transactionId="t-1")

    answer = await http.get("/api/v1/pop/queue/orders?consumerGroup=billing&batch=10")

    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    popped = answer.json
    [message] = popped.pop("messages")
    assert popped == {
        "success": True,
        "queue": "orders",
        "partition": "Default",
        "partitionId": pushed["partition_id"],
        "leaseId": popped["leaseId"],
        "consumerGroup": "billing",
        "partitionsClaimed": 1,
    }
    assert UUID_TEXT.fullmatch(popped["leaseId"])
    assert TS6.fullmatch(message["createdAt"])
    assert message == {
        "id": pushed["message_id"],
        "transactionId": "t-1",
        "traceId": None,
        "producerSub": None,
        "data": {"n": 1},
        "createdAt": message["createdAt"],
        "queue": "orders",
        "partition": "Default",
        "partitionId": pushed["partition_id"],
        "leaseId": popped["leaseId"],
        "consumerGroup": "billing",
        "retryCount": 0,
        "deliveryAttempt": 1,
    }


async def test_a_pop_with_auto_ack_has_no_lease_and_nothing_comes_twice(http: Http) -> None:
    await http.push("q", 1)

    popped = (await http.get("/api/v1/pop/queue/q?autoAck=1")).json

    assert popped["leaseId"] == ""
    assert popped["consumerGroup"] == "__QUEUE_MODE__"
    assert popped["messages"][0]["leaseId"] == ""
    assert (await http.get("/api/v1/pop/queue/q")).status == 204


async def test_an_empty_pop_is_204_without_a_body(http: Http) -> None:
    answer = await http.get("/api/v1/pop/queue/nothing-here")

    assert (answer.status, answer.body) == (204, b"")
    assert "content-type" not in answer.headers
    assert "content-length" not in answer.headers


async def test_a_waiting_pop_is_answered_when_something_is_pushed(http: Http) -> None:
    answers = []

    async def wait_for_one() -> None:
        answers.append(await http.get("/api/v1/pop/queue/q?wait=true&timeout=20000"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_one)
        await _until_parked(http)
        await http.push("q", "hello")

    assert answers[0].json["messages"][0]["data"] == "hello"


async def _until_parked(http: Http) -> None:
    with trio.fail_after(10):
        while http.app.service.context.engine.statistics()["parked"] == 0:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_drain_ends_waiting_pops_and_readiness_but_not_pushes(http: Http) -> None:
    answers = []

    async def wait_for_one() -> None:
        answers.append(await http.get("/api/v1/pop/queue/q?wait=true&timeout=60000"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_one)
        await _until_parked(http)
        http.app.extensions["queen"].begin_drain()
        http.app.extensions["queen"].begin_drain()

    assert answers[0].status == 204
    ready = await http.get("/readyz")
    assert (ready.status, ready.json["status"]) == (503, "draining")
    assert (await http.get("/livez")).status == 200
    assert (await http.get("/health")).status == 200
    await http.push("q", 1)


@pytest.mark.parametrize("query", ["namespace=shop", "task=billing", "namespace=shop&task=billing"])
async def test_a_pop_by_labels_finds_the_queues_that_carry_them(http: Http, query: str) -> None:
    await http.push("shop.billing.eu", 1)
    await http.push("other.thing.eu", 2)

    answer = await http.get(f"/api/v1/pop?{query}&batch=10")

    assert [message["queue"] for message in answer.json["messages"]] == ["shop.billing.eu"]


async def test_a_pop_over_partitions_names_each_and_counts_them(http: Http) -> None:
    for partition in ("a", "b", "c"):
        await http.push("q", 1, 2, partition=partition)

    popped = (await http.get("/api/v1/pop/queue/q?batch=100&partitions=3")).json

    assert popped["partitionsClaimed"] == 3
    partitions = [message["partition"] for message in popped["messages"]]
    assert [name for name, _ in itertools.groupby(partitions)] == [popped["partition"], *partitions[2::2]]
    assert [message["data"] for message in popped["messages"]] == [1, 2] * 3
    assert len({message["partitionId"] for message in popped["messages"]}) == 3
    assert {m["leaseId"] for m in popped["messages"]} == {popped["leaseId"]}


@pytest.mark.parametrize(
    ("target", "popped"),
    [
        ("batch=2", 2), ("batch=0", 1), ("batch=-5", 1), ("batch=two", 1), ("batch=", 1), ("batch=1.5", 1),
        ("batch=%202", 2), ("batch=1_0", 1), ("batch=99999999999999999999999", 1), ("batch=999999999999", 3), ("", 1),
        ("autopilot=true", 3), ("autopilot=true&batch=2", 2), ("batch=1&batch=3", 3), ("BATCH=3", 1),
    ],
)  # fmt: skip
async def test_the_batch_of_a_pop_is_read_leniently(http: Http, target: str, popped: int) -> None:
    await http.push("q", 1, 2, 3)

    answer = await http.get(f"/api/v1/pop/queue/q?{target}")

    assert len(answer.json["messages"]) == popped


async def test_an_ack_answers_an_array_of_one(http: Http) -> None:
    await http.push("q", 1, 2)
    message = (await http.get("/api/v1/pop/queue/q")).json["messages"][0]
    ack = {name: message[name] for name in ("transactionId", "partitionId", "leaseId")}

    answer = await http.post("/api/v1/ack", ack)

    assert answer.status == 200
    assert answer.json == [
        {
            "index": 0,
            "transactionId": message["transactionId"],
            "success": True,
            "error": None,
            "queueName": "q",
            "partitionName": "Default",
            "leaseReleased": True,
            "dlq": False,
        }
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"transactionId": "no such"}, "Message not found"),
        ({"partitionId": "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"}, "Message not found"),
        ({"partitionId": "not a uuid"}, "Message not found"),
        ({"transactionId": "nul \0 in it"}, "Message not found"),
        ({"leaseId": "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"}, "Invalid or expired lease"),
        ({"leaseId": "not a uuid"}, "Invalid or expired lease"),
        ({"status": "delivered"}, None),
    ],
)
async def test_a_refused_ack_is_an_answer_not_an_error(http: Http, change: dict[str, str], error: str | None) -> None:
    await http.push("q", 1)
    message = (await http.get("/api/v1/pop/queue/q")).json["messages"][0]

    answer = await http.post("/api/v1/ack", {**{n: message[n] for n in ("transactionId", "partitionId")}, **change})

    assert answer.status == 200
    [result] = answer.json
    assert (result["success"], result["error"]) == (False, error)


@pytest.mark.parametrize("status", [None, 7, {"a": 1}, True, "success", "completed"])
async def test_a_status_that_is_no_string_means_completed(http: Http, status: Any) -> None:
    await http.push("q", 1)
    message = (await http.get("/api/v1/pop/queue/q")).json["messages"][0]
    ack = {"transactionId": message["transactionId"], "partitionId": message["partitionId"], "status": status}

    single = (await http.post("/api/v1/ack", ack)).json
    batch = (await http.post("/api/v1/ack/batch", {"acknowledgments": [ack], "consumerGroup": None})).json

    assert single[0]["success"]
    assert batch[0]["success"]
    assert (await http.get("/api/v1/pop/queue/q")).status == 204


async def test_a_batch_of_acks_is_answered_in_its_order(http: Http) -> None:
    await http.push("q", *range(5))
    messages = (await http.get("/api/v1/pop/queue/q?batch=5&consumerGroup=g")).json["messages"]
    acks = [{n: message[n] for n in ("transactionId", "partitionId", "leaseId")} for message in messages]

    answer = await http.post("/api/v1/ack/batch", {"acknowledgments": acks, "consumerGroup": "g"})

    assert [result["index"] for result in answer.json] == list(range(5))
    assert [result["transactionId"] for result in answer.json] == [m["transactionId"] for m in messages]
    assert [result["success"] for result in answer.json] == [True] * 5
    assert answer.json[-1]["leaseReleased"]


async def test_the_error_of_a_failed_ack_may_hold_anything(http: Http) -> None:
    await http.post("/api/v1/configure", {"queue": "q", "options": {"retryLimit": 0}})
    await http.push("q", 1)
    message = (await http.get("/api/v1/pop/queue/q")).json["messages"][0]
    ack = {"transactionId": message["transactionId"], "partitionId": message["partitionId"], "status": "failed"}

    [result] = (await http.post("/api/v1/ack", {**ack, "error": "boom \0 é \u2028"})).json

    assert result["dlq"]
    assert (await http.get("/api/v1/dlq?queue=q")).json["messages"][0]["errorMessage"] == "boom \ufffd é \u2028"


async def test_a_transaction_answers_each_message_and_ack_in_order(http: Http) -> None:
    await http.push("a", 1)
    message = (await http.get("/api/v1/pop/queue/a")).json["messages"][0]
    operations = [
        {"type": "push", "items": [{"queue": "b", "payload": 1}, {"queue": "c", "partition": "p", "payload": 2}]},
        {"type": "ack", **{n: message[n] for n in ("transactionId", "partitionId", "leaseId")}},
        {"type": "push", "queue": "b", "payload": {"inline": True}, "transactionId": "t"},
    ]

    answer = await http.post("/api/v1/transaction", {"operations": operations})

    assert answer.status == 200
    outcome = answer.json
    assert outcome["success"] is True
    assert "error" not in outcome
    assert UUID_TEXT.fullmatch(outcome["transactionId"])
    first, second, third, fourth = outcome["results"]
    assert first == {
        "index": 0,
        "type": "push",
        "success": True,
        "status": "queued",
        "transactionId": first["transactionId"],
        "messageId": first["messageId"],
        "partitionId": first["partitionId"],
        "queueName": "b",
    }
    assert (second["index"], second["queueName"]) == (1, "c")
    assert third == {
        "index": 2,
        "type": "ack",
        "success": True,
        "transactionId": message["transactionId"],
        "error": None,
        "dlq": False,
    }
    assert (fourth["transactionId"], fourth["queueName"]) == ("t", "b")
    assert [m["data"] for m in (await http.get("/api/v1/pop/queue/b?batch=5")).json["messages"]] == [
        1,
        {"inline": True},
    ]


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ({"type": "merge"}, "Unknown operation type: merge"),
        (
            {"type": "ack", "transactionId": "x", "partitionId": "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"},
            "ACK operation failed: Message not found",
        ),
        ({"type": "ack", "transactionId": "x", "partitionId": "?"}, "ACK operation failed: Message not found"),
    ],
)
async def test_a_transaction_that_fails_is_200_and_leaves_nothing(http: Http, operation: Any, error: str) -> None:
    push = {"type": "push", "items": [{"queue": "b", "payload": 1}]}

    answer = await http.post("/api/v1/transaction", {"operations": [push, operation]})

    assert answer.status == 200
    outcome = answer.json
    assert (outcome["success"], outcome["error"], outcome["results"]) == (False, error, [])
    assert UUID_TEXT.fullmatch(outcome["transactionId"])
    assert (await http.get("/api/v1/pop/queue/b")).status == 204


async def test_a_transaction_whose_required_lease_is_gone_is_refused(http: Http) -> None:
    push = {"type": "push", "items": [{"queue": "b", "payload": 1}]}
    gone = "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"

    outcome = (await http.post("/api/v1/transaction", {"operations": [push], "requiredLeases": [gone, "?"]})).json

    assert outcome["success"] is False
    assert (await http.get("/api/v1/pop/queue/b")).status == 204


@pytest.mark.parametrize("body", [b"", b"{}", b'{"seconds":30}', b'{"seconds":null}'])
async def test_extending_a_live_lease_answers_its_new_end(http: Http, body: bytes) -> None:
    await http.push("q", 1)
    lease_id = (await http.get("/api/v1/pop/queue/q")).json["leaseId"]

    answer = await http.post(f"/api/v1/lease/{lease_id}/extend", body)

    assert answer.status == 200
    extended = answer.json
    assert TS6.fullmatch(extended["newExpiresAt"])
    assert extended == {
        "leaseId": lease_id,
        "success": True,
        "renewed": 1,
        "newExpiresAt": extended["newExpiresAt"],
        "expiresAt": extended["newExpiresAt"],
        "lease_expires_at": extended["newExpiresAt"],
    }


@pytest.mark.parametrize("lease_id", ["0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d", "nonsense", "", "a%00b", "%C3%A9"])
async def test_extending_what_is_no_lease_is_200_and_renews_nothing(http: Http, lease_id: str) -> None:
    answer = await http.post(f"/api/v1/lease/{lease_id}/extend")

    assert answer.status == 200
    extended = answer.json
    assert (extended["success"], extended["renewed"], extended["newExpiresAt"]) == (False, 0, None)
    assert extended["error"] == "Lease not found"


OPTIONS = {
    "leaseTime": 7,
    "retryLimit": 0,
    "retryDelay": 5,
    "priority": -3,
    "delayedProcessing": 1,
    "windowBuffer": 2,
    "maxSize": 10,
    "ttl": 60,
    "deadLetterQueue": True,
    "dlqAfterMaxRetries": True,
    "retentionEnabled": True,
    "retentionSeconds": 11,
    "completedRetentionSeconds": 12,
    "maxWaitTimeSeconds": 13,
    "encryptionEnabled": True,
}
DEFAULTS = {
    "leaseTime": 300,
    "retryLimit": 3,
    "retryDelay": 1000,
    "priority": 0,
    "delayedProcessing": 0,
    "windowBuffer": 0,
    "maxSize": 0,
    "ttl": 3600,
    "deadLetterQueue": False,
    "dlqAfterMaxRetries": False,
    "retentionEnabled": False,
    "retentionSeconds": 0,
    "completedRetentionSeconds": 0,
    "maxWaitTimeSeconds": 0,
    "encryptionEnabled": False,
}


async def test_configure_echoes_every_option_and_the_next_one_resets_them(http: Http) -> None:
    body = {"queue": "q", "namespace": "n", "task": 7, "options": {**OPTIONS, "unknown": [1]}}

    first = await http.post("/api/v1/configure", body)
    second = await http.post("/api/v1/configure", {"queue": "q", "namespace": None, "options": None})

    assert first.status == 200
    configured = first.json
    assert UUID_TEXT.fullmatch(configured["queueId"])
    assert UUID_TEXT.fullmatch(configured["partitionId"])
    assert configured == {
        "configured": True,
        "queueId": configured["queueId"],
        "partitionId": configured["partitionId"],
        "queue": "q",
        "namespace": "n",
        "task": "",
        "options": OPTIONS,
    }
    assert second.json == {**configured, "namespace": "", "options": DEFAULTS}
    assert (await http.push("q", 1))[0]["partition_id"] == configured["partitionId"]


async def test_deleting_a_queue_tells_whether_it_was_there(http: Http) -> None:
    await http.push("q", 1)

    first = await http.request("DELETE", "/api/v1/resources/queues/q")
    second = await http.request("DELETE", "/api/v1/resources/queues/q")

    assert (first.status, first.json) == (200, {"deleted": True, "queue": "q", "existed": True})
    assert (second.status, second.json) == (200, {"deleted": True, "queue": "q", "existed": False})
    assert (await http.get("/api/v1/pop/queue/q")).status == 204


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("", ""),
        ("a/b", "a%2Fb"),
        ("a/b", "a%2fb"),
        ("a+b", "a+b"),
        ("a+b", "a%2Bb"),
        ("a b", "a%20b"),
        ("user@host.example/x?y#z", "user%40host.example%2Fx%3Fy%23z"),
        ("100%", "100%25"),
        ("100%", "100%"),
        ("%2F", "%252F"),
        ("größe ✓", "gr%C3%B6%C3%9Fe%20%E2%9C%93"),
        ("..", ".."),
        ("partition", "partition"),
        ("x" * 255, "x" * 255),
        ("😀" * 255, "%F0%9F%98%80" * 255),
    ],
)
async def test_a_name_in_a_path_is_decoded_exactly_once(http: Http, name: str, encoded: str) -> None:
    assert (await http.post("/api/v1/configure", {"queue": name})).json["queue"] == name
    await http.push(name, 1)
    await http.push(name, 2, partition=name)

    wildcard = await http.get(f"/api/v1/pop/queue/{encoded}?batch=10&partitions=9&autoAck=true&consumerGroup=g")
    one = await http.get(f"/api/v1/pop/queue/{encoded}/partition/{encoded}?batch=10&autoAck=true")
    deleted = await http.request("DELETE", f"/api/v1/resources/queues/{encoded}")

    assert {(m["queue"], m["partition"], m["data"]) for m in wildcard.json["messages"]} == {
        (name, "Default", 1),
        (name, name, 2),
    }
    assert [(m["queue"], m["partition"], m["data"]) for m in one.json["messages"]] == [(name, name, 2)]
    assert deleted.json == {"deleted": True, "queue": name, "existed": True}


async def test_a_group_name_in_a_query_is_form_encoded(http: Http) -> None:
    await http.push("q", 1)

    popped = (await http.get("/api/v1/pop/queue/q?consumer_group=a+b%2Bc%26d")).json

    assert popped["consumerGroup"] == "a b+c&d"


async def test_health_tells_of_the_database_and_of_us(http: Http) -> None:
    answer = await http.get("/health")

    assert answer.status == 200
    health = answer.json
    assert isinstance(health.pop("version"), str)
    assert isinstance(health.pop("uptime"), str)
    assert health == {
        "status": "healthy",
        "database": "connected",
        "server": "running",
        "worker_id": 0,
        "shared_state": {"enabled": False},
        "queen": {"worker_id": 0, "status": "active"},
    }
    assert (await http.get("/livez")).json == {"status": "alive"}
    assert (await http.get("/readyz")).json == {"status": "ready", "database": "connected"}


async def test_the_statistics_count_what_was_done(http: Http) -> None:
    await http.push("q", 1, 2, transactionId="same")
    message = (await http.get("/api/v1/pop/queue/q?batch=5")).json["messages"][0]
    await http.post("/api/v1/ack", {n: message[n] for n in ("transactionId", "partitionId")})
    await http.get("/nowhere")

    done = http.app.extensions["queen"].statistics()

    assert (done.requests, done.pushed, done.popped, done.acked) == (4, 1, 1, 1)
    assert (done.failed_requests, done.requests_in_flight) == (0, 0)
