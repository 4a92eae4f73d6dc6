"""Streams: what registrations, cycles and state answer, and that a cycle is one step."""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from queen.app import QueenApp
from queen.config.settings import Settings

from .asgi_driver import Answer, Http, open_app

NOBODY = "00000000-0000-7000-8000-000000000000"


class Stream:
    """A registered query and what a runner of it would do, one call a method."""

    def __init__(self, http: Http, query_id: str, group: str) -> None:
        self.http = http
        self.query_id = query_id
        self.group = group

    async def pop(self, queue: str, batch: int = 200, **query: Any) -> list[Any]:
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        answer = await self.http.get(f"/api/v1/pop/queue/{queue}?batch={batch}&consumerGroup={self.group}&{asked}")
        return answer.json["messages"] if answer.status == 200 else []

    async def cycle(self, partition_id: str, **others: Any) -> Answer:
        body = {"query_id": self.query_id, "partition_id": partition_id, "consumer_group": self.group} | others
        return await self.http.post("/streams/v1/cycle", body)

    async def apply(self, partition_id: str, **others: Any) -> Any:
        """A cycle that must succeed."""
        answer = await self.cycle(partition_id, **others)
        assert answer.status == 200
        assert answer.json["success"] is True, answer.json
        return answer.json

    async def refuse(self, partition_id: str, **others: Any) -> str:
        """A cycle that must fail; its error."""
        answer = await self.cycle(partition_id, **others)
        assert answer.status == 200
        body = answer.json
        assert body["success"] is False
        assert (body["state_ops_applied"], body["push_results"], body["ack_result"]) == (0, [], None)
        assert body["partition_id"] == partition_id
        return str(body["error"])

    async def state(self, partition_id: str, **filters: Any) -> dict[str, Any]:
        body = {"query_id": self.query_id, "partition_id": partition_id} | filters
        answer = await self.http.post("/streams/v1/state/get", body)
        assert answer.status == 200
        assert answer.json["success"] is True
        return {row["key"]: row["value"] for row in answer.json["rows"]}


async def register(http: Http, name: str = "totals", source: str = "source", **others: Any) -> Answer:
    body = {"name": name, "source_queue": source, "config_hash": "one"} | others
    return await http.post("/streams/v1/queries", body)


@pytest.fixture
async def stream(http: Http) -> Stream:
    answer = await register(http)
    return Stream(http, answer.json["query_id"], "streams.totals")


def put(key: str, value: Any) -> dict[str, Any]:
    return {"type": "upsert", "key": key, "value": value}


def ack_of(message: Any, **others: Any) -> dict[str, Any]:
    return {"transactionId": message["transactionId"], "leaseId": message["leaseId"], "status": "completed"} | others


def data(messages: list[Any]) -> list[Any]:
    return [message["data"] for message in messages]


# -- registrations ------------------------------------------------------------------------------------------------


async def test_a_query_is_registered_once_and_found_again(http: Http) -> None:
    first = await register(http, sink_queue="sink")
    second = await register(http, reset=True)

    assert first.status == second.status == 200
    assert first.json == {
        "success": True,
        "query_id": first.json["query_id"],
        "name": "totals",
        "config_hash": "one",
        "fresh": True,
        "reset": False,
    }
    assert second.json == first.json | {"fresh": False}
    assert str(uuid.UUID(first.json["query_id"])) == first.json["query_id"]


async def test_registering_creates_no_queue(http: Http) -> None:
    await register(http, source="unborn")

    assert (await http.request("DELETE", "/api/v1/resources/queues/unborn")).json["existed"] is False


async def test_the_same_shape_keeps_the_state_even_with_reset(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("k", 1)])

    await register(http, reset=True)

    assert await stream.state(pushed["partition_id"]) == {"k": 1}


async def test_another_shape_is_refused_and_changes_nothing(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("k", 1)])

    refused = await register(http, config_hash="two")

    assert refused.status == 409
    assert refused.json == {
        "success": False,
        "query_id": stream.query_id,
        "name": "totals",
        "error": "config_hash mismatch: operator chain changed for queryId 'totals'. "
        "Pass reset:true to wipe existing state, or use a new queryId.",
    }
    assert (await register(http)).json["fresh"] is False
    assert await stream.state(pushed["partition_id"]) == {"k": 1}


async def test_another_shape_with_reset_wipes_the_state_of_that_query_alone(http: Http, stream: Stream) -> None:
    results = [(await http.push("source", 1, partition=str(n)))[0] for n in range(8)]
    other = Stream(http, (await register(http, name="other")).json["query_id"], "streams.other")
    for result in results:
        await stream.apply(result["partition_id"], state_ops=[put("k", 1)])
        await other.apply(result["partition_id"], state_ops=[put("k", 2)])

    reset = await register(http, config_hash="two", reset=True)

    assert reset.status == 200
    assert (reset.json["query_id"], reset.json["fresh"], reset.json["reset"]) == (stream.query_id, False, True)
    for result in results:
        assert await stream.state(result["partition_id"]) == {}
        assert await other.state(result["partition_id"]) == {"k": 2}


async def test_many_registrations_at_once_are_one_query(http: Http) -> None:
    answers: list[Answer] = []

    async def one() -> None:
        answers.append(await register(http))

    async with trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(one)

    assert len({answer.json["query_id"] for answer in answers}) == 1
    assert sum(answer.json["fresh"] for answer in answers) == 1


@pytest.mark.parametrize("missing", ["name", "source_queue", "config_hash"])
@pytest.mark.parametrize("wrong", [{}, {"value": ""}, {"value": 7}, {"value": None}])
async def test_a_registration_names_what_it_must(http: Http, missing: str, wrong: dict[str, Any]) -> None:
    body: dict[str, Any] = {"name": "n", "source_queue": "s", "config_hash": "h"}
    del body[missing]
    if wrong:
        body[missing] = wrong["value"]

    answer = await http.post("/streams/v1/queries", body)

    assert (answer.status, answer.error) == (400, f"{missing} is required")


@pytest.mark.parametrize("path", ["queries", "cycle", "state/get"])
@pytest.mark.parametrize("body", [b"", b"[]", b"7", b'"text"', b"null"])
async def test_a_body_must_be_an_object(http: Http, path: str, body: bytes) -> None:
    answer = await http.post(f"/streams/v1/{path}", body)

    assert (answer.status, answer.error) == (400, "request body must be a JSON object")


@pytest.mark.parametrize("path", ["queries", "cycle", "state/get"])
@pytest.mark.parametrize("body", [b"{", b'{"query_id":"\xff"}', b'{"query_id":"\\ud800","name":"\\ud800"}'])
async def test_a_body_must_be_json(http: Http, path: str, body: bytes) -> None:
    answer = await http.post(f"/streams/v1/{path}", body)

    assert answer.status == 400
    assert answer.error.startswith("Invalid JSON")


@pytest.mark.parametrize("path", ["cycle", "state/get"])
@pytest.mark.parametrize("missing", ["query_id", "partition_id"])
async def test_ids_are_required(http: Http, path: str, missing: str) -> None:
    body: dict[str, Any] = {"query_id": NOBODY, "partition_id": NOBODY}
    for wrong in ("", None, 7):
        answer = await http.post(f"/streams/v1/{path}", body | {missing: wrong})
        assert (answer.status, answer.error) == (400, f"{missing} is required")


# -- cycles -------------------------------------------------------------------------------------------------------


async def test_a_cycle_commits_state_pushes_and_the_ack(http: Http, stream: Stream) -> None:
    await http.push("source", 1, 2, 3)
    messages = await stream.pop("source")

    applied = await stream.apply(
        messages[0]["partitionId"],
        state_ops=[put("sum", 6), put("gone", 1), {"type": "delete", "key": "gone"}],
        push_items=[{"queue": "sink", "partition": "p", "payload": {"n": n}} for n in range(3)],
        ack=ack_of(messages[-1], count=3),
    )

    assert (applied["queueName"], applied["state_ops_applied"]) == ("source", 3)
    assert applied["ack_result"] == {"success": True, "count": 3, "lease_released": True, "dlq": False}
    assert [result["status"] for result in applied["push_results"]] == ["queued"] * 3
    assert [result["index"] for result in applied["push_results"]] == [0, 1, 2]
    sunk = (await http.get("/api/v1/pop/queue/sink?batch=10")).json["messages"]
    assert [message["id"] for message in sunk] == [result["message_id"] for result in applied["push_results"]]
    assert data(sunk) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert sunk[0]["partition"] == "p"
    assert await stream.state(messages[0]["partitionId"]) == {"sum": 6}
    assert await stream.pop("source") == []


async def test_an_error_anywhere_leaves_nothing_applied(http: Http, stream: Stream) -> None:
    await http.push("source", 1)
    [message] = await stream.pop("source")
    all_of_it: dict[str, Any] = {
        "state_ops": [put("k", 1)],
        "push_items": [{"queue": "sink", "payload": 1}],
        "ack": ack_of(message),
    }
    wrong: dict[str, dict[str, Any]] = {
        "Message not found": {"ack": ack_of(message, transactionId="nobody")},
        "Invalid or expired lease": {"ack": ack_of(message, leaseId=NOBODY)},
        "ack.transactionId is required": {"ack": {"leaseId": message["leaseId"]}},
        "Unknown ack.status: retry": {"ack": ack_of(message, status="retry")},
        "Unknown state_op type: merge": {"state_ops": [put("k", 1), {"type": "merge", "key": "k"}]},
        "Queue must be a string": {"push_items": [{"queue": "sink", "payload": 1}, {"payload": 2}]},
    }

    for error, part in wrong.items():
        assert await stream.refuse(message["partitionId"], **(all_of_it | part)) == error

    assert await stream.state(message["partitionId"]) == {}
    assert (await http.get("/api/v1/pop/queue/sink")).status == 204
    applied = await stream.apply(message["partitionId"], **all_of_it)
    assert applied["ack_result"]["success"] is True


async def test_an_unknown_query_is_told(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)

    for query_id in (NOBODY, "no uuid"):
        stranger = Stream(http, query_id, "g")
        assert await stranger.refuse(pushed["partition_id"], state_ops=[put("k", 1)]) == "Unknown query_id"
        assert await stranger.refuse(pushed["partition_id"]) == "Unknown query_id"
        assert await stranger.state(pushed["partition_id"]) == {}


async def test_cycles_on_one_partition_wait_for_each_other(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)

    async def one(n: int) -> None:
        await stream.apply(
            pushed["partition_id"],
            state_ops=[put("last", n)],
            push_items=[{"queue": "sink", "payload": n}],
        )

    async with trio.open_nursery() as runners:
        for n in range(20):
            runners.start_soon(one, n)

    sunk = data((await http.get("/api/v1/pop/queue/sink?batch=100")).json["messages"])
    assert sorted(sunk) == list(range(20))
    assert await stream.state(pushed["partition_id"]) == {"last": sunk[-1]}


async def test_sink_messages_keep_the_order_of_the_array_in_each_partition(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    items = [{"queue": f"sink-{n % 2}", "partition": f"p{n % 3}", "payload": n} for n in range(60)]

    applied = await stream.apply(pushed["partition_id"], push_items=items)

    assert [result["index"] for result in applied["push_results"]] == list(range(60))
    for queue in range(2):
        for partition in range(3):
            path = f"/api/v1/pop/queue/sink-{queue}/partition/p{partition}?batch=100"
            expected = [n for n in range(60) if n % 2 == queue and n % 3 == partition]
            assert data((await http.get(path)).json["messages"]) == expected


async def test_a_sink_message_that_is_stored_already_is_a_duplicate(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    item = {"queue": "sink", "payload": 1, "transactionId": "once", "messageId": NOBODY}

    first = await stream.apply(pushed["partition_id"], push_items=[item])
    second = await stream.apply(pushed["partition_id"], push_items=[item])

    assert first["push_results"][0]["status"] == "queued"
    assert second["push_results"][0]["status"] == "duplicate"
    assert second["push_results"][0]["message_id"] == first["push_results"][0]["message_id"] != NOBODY


async def test_release_ends_the_lease_whatever_is_left_of_the_batch(http: Http, stream: Stream) -> None:
    await http.push("source", *range(10))
    messages = await stream.pop("source")

    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[3], count=4))

    assert data(await stream.pop("source")) == [4, 5, 6, 7, 8, 9]


async def test_without_release_the_rest_comes_again_in_order_when_the_lease_has_expired(
    http: Http, stream: Stream, database_clock: Any
) -> None:
    await http.post("/api/v1/configure", {"queue": "source", "options": {"leaseTime": 30}})
    await http.push("source", *range(10))
    messages = await stream.pop("source")

    applied = await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[3], count=4), release_lease=False)

    assert applied["ack_result"] == {"success": True, "count": 4, "lease_released": False, "dlq": False}
    assert await stream.pop("source") == []
    await database_clock.advance(31)
    assert data(await stream.pop("source")) == [4, 5, 6, 7, 8, 9]


async def test_a_lease_that_was_kept_serves_the_next_partial_cycle(http: Http, stream: Stream) -> None:
    await http.push("source", *range(4))
    messages = await stream.pop("source")
    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[0]), release_lease=False)

    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[2]))

    assert data(await stream.pop("source")) == [3]


async def test_the_rest_of_a_kept_batch_can_be_acknowledged_the_ordinary_way(http: Http, stream: Stream) -> None:
    await http.push("source", *range(3))
    messages = await stream.pop("source")
    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[1]), release_lease=False)

    last = ack_of(messages[2]) | {"partitionId": messages[2]["partitionId"], "consumerGroup": stream.group}
    [result] = (await http.post("/api/v1/ack", last)).json

    assert (result["success"], result["leaseReleased"]) == (True, True)


@pytest.mark.parametrize("status", ["failed", "dlq"])
@pytest.mark.parametrize("release", [True, False])
async def test_failed_goes_to_the_dead_letters_at_once(http: Http, stream: Stream, status: str, release: bool) -> None:
    await http.push("source", 0, {"bad": True}, 2)
    messages = await stream.pop("source")

    applied = await stream.apply(
        messages[0]["partitionId"],
        ack=ack_of(messages[1], status=status, error="will not do"),
        release_lease=release,
    )

    assert applied["ack_result"] == {"success": True, "count": 1, "lease_released": True, "dlq": True}
    [letter] = (await http.get("/api/v1/dlq?queue=source")).json["messages"]
    assert (letter["data"], letter["errorMessage"], letter["retryCount"]) == ({"bad": True}, "will not do", 0)
    assert letter["consumerGroup"] == stream.group
    assert data(await stream.pop("source")) == [2]


async def test_a_dead_letter_without_a_reason_gets_one(http: Http, stream: Stream) -> None:
    await http.push("source", 0)
    [message] = await stream.pop("source")

    await stream.apply(message["partitionId"], ack=ack_of(message, status="dlq"))

    assert (await http.get("/api/v1/dlq?queue=source")).json["messages"][0]["errorMessage"]


async def test_without_a_lease_id_the_lease_is_not_checked(http: Http, stream: Stream) -> None:
    await http.push("source", 0, 1)
    messages = await stream.pop("source")

    for lease in ("", None):
        await stream.apply(
            messages[0]["partitionId"], ack={"transactionId": messages[0]["transactionId"], "leaseId": lease}
        )

    assert data(await stream.pop("source")) == [1]


async def test_a_lease_of_another_group_or_one_that_expired_does_not_count(
    http: Http, stream: Stream, database_clock: Any
) -> None:
    await http.push("source", 0)
    other = Stream(http, stream.query_id, "another")
    [theirs] = await other.pop("source")
    [ours] = await stream.pop("source")
    partition_id = ours["partitionId"]

    assert await stream.refuse(partition_id, ack=ack_of(theirs)) == "Invalid or expired lease"
    assert await stream.refuse(partition_id, ack=ack_of(ours, leaseId="no uuid")) == "Invalid or expired lease"
    await database_clock.advance(301)
    assert await stream.refuse(partition_id, ack=ack_of(ours)) == "Invalid or expired lease"


async def test_an_ack_may_come_without_a_pop_before(http: Http, stream: Stream) -> None:
    [first, _] = await http.push("source", 1, 2)

    await stream.apply(first["partition_id"], ack={"transactionId": first["transaction_id"]})

    assert data(await stream.pop("source")) == [2]


async def test_an_ack_behind_the_position_does_not_move_it_back(http: Http, stream: Stream) -> None:
    await http.push("source", 0, 1, 2)
    messages = await stream.pop("source")
    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[1]), release_lease=False)

    await stream.apply(messages[0]["partitionId"], ack=ack_of(messages[0]))

    assert data(await stream.pop("source")) == [2]


async def test_a_cycle_without_an_ack_needs_no_lease(http: Http, stream: Stream) -> None:
    await http.push("source", 0)
    [message] = await stream.pop("source")

    applied = await stream.apply(message["partitionId"], state_ops=[put("k", 1)], ack=None)

    assert applied["ack_result"] is None
    assert await stream.pop("source") == []


async def test_a_partition_that_nobody_knows_has_no_queue_name(stream: Stream) -> None:
    applied = await stream.apply(NOBODY, state_ops=[put("k", 1)])

    assert applied["queueName"] is None
    assert await stream.refuse(NOBODY, ack={"transactionId": "t"}) == "Message not found"
    assert await stream.refuse("no uuid") == "partition_id must be a UUID"


async def test_nulls_and_absences_are_defaults(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    nothing = {"consumer_group": None, "state_ops": None, "push_items": None, "ack": None, "release_lease": None}

    applied = await stream.apply(pushed["partition_id"], **nothing)

    assert (applied["state_ops_applied"], applied["push_results"], applied["ack_result"]) == (0, [], None)


async def test_the_default_group_is_that_of_consumers_without_one(http: Http, stream: Stream) -> None:
    [first, _] = await http.push("source", 1, 2)
    body = {"query_id": stream.query_id, "partition_id": first["partition_id"]}

    await http.post("/streams/v1/cycle", body | {"ack": {"transactionId": first["transaction_id"]}})

    assert data((await http.get("/api/v1/pop/queue/source?batch=10")).json["messages"]) == [2]


async def test_a_waiting_consumer_of_the_sink_is_woken(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await http.push("sink", "old")
    await http.get("/api/v1/pop/queue/sink?autoAck=true")
    got: list[Any] = []

    async def consume() -> None:
        got.extend((await http.get("/api/v1/pop/queue/sink?wait=true&timeout=30000")).json["messages"])

    with trio.fail_after(10):
        async with trio.open_nursery() as consumers:
            consumers.start_soon(consume)
            await trio.testing.wait_all_tasks_blocked()
            await stream.apply(pushed["partition_id"], push_items=[{"queue": "sink", "payload": "new"}])

    assert data(got) == ["new"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"state_ops": {}},
        {"state_ops": ["delete"]},
        {"state_ops": [{"type": "upsert"}]},
        {"state_ops": [{"type": "upsert", "key": 1}]},
        {"state_ops": [{"key": "k"}]},
        {"state_ops": [put("k" * 2049, 1)]},
        {"state_ops": [put("ü" * 1025, 1)]},
        {"push_items": {}},
        {"push_items": [7]},
        {"push_items": [{"queue": "q" * 256}]},
        {"push_items": [{"queue": "q", "traceId": "t"}]},
        {"ack": []},
        {"ack": {"transactionId": ""}},
        {"ack": {"transactionId": "t", "leaseId": 7}},
        {"ack": {"transactionId": "t", "status": 7}},
        {"ack": {"transactionId": "t", "count": "7"}},
        {"release_lease": "no"},
        {"consumer_group": 7},
        {"consumer_group": "g" * 256},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
async def test_what_is_wrong_with_a_cycle_is_in_its_answer(http: Http, stream: Stream, wrong: dict[str, Any]) -> None:
    [pushed] = await http.push("source", 1)

    assert await stream.refuse(pushed["partition_id"], **wrong)


# -- repeats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [True, False])
async def test_a_cycle_sent_again_under_its_lease_is_not_applied_again(
    http: Http, stream: Stream, release: bool
) -> None:
    await http.push("source", 1, 2)
    messages = await stream.pop("source")
    cycle = {
        "state_ops": [put("k", 1)],
        "push_items": [{"queue": "sink", "payload": n} for n in range(3)],
        "ack": ack_of(messages[0]),
        "release_lease": release,
    }

    first = await stream.apply(messages[0]["partitionId"], **cycle)
    second = await stream.apply(messages[0]["partitionId"], **cycle)

    assert second == first | {"push_results": [result | {"status": "duplicate"} for result in first["push_results"]]}
    assert len((await http.get("/api/v1/pop/queue/sink?batch=10")).json["messages"]) == 3


async def test_a_flush_sent_again_is_not_applied_again(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("window", 1)])
    flush = {"state_ops": [{"type": "delete", "key": "window"}], "push_items": [{"queue": "sink", "payload": 1}]}

    for _ in range(3):
        await stream.apply(pushed["partition_id"], **flush)

    assert len((await http.get("/api/v1/pop/queue/sink?batch=10")).json["messages"]) == 1


async def test_the_same_flush_of_a_later_window_is_a_flush_of_its_own(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    flush = {"state_ops": [{"type": "delete", "key": "session"}], "push_items": [{"queue": "sink", "payload": 1}]}

    for _ in range(3):
        await stream.apply(pushed["partition_id"], state_ops=[put("session", 1)])
        await stream.apply(pushed["partition_id"], **flush)

    assert len((await http.get("/api/v1/pop/queue/sink?batch=10")).json["messages"]) == 3


async def test_what_names_no_lease_and_removes_nothing_is_applied_each_time(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)

    for _ in range(3):
        await stream.apply(pushed["partition_id"], state_ops=[put("k", 1)], push_items=[{"queue": "sink"}])

    assert len((await http.get("/api/v1/pop/queue/sink?batch=10")).json["messages"]) == 3


async def test_a_refused_cycle_may_be_sent_again(http: Http, stream: Stream) -> None:
    await http.push("source", 1)
    [message] = await stream.pop("source")
    body = {"ack": ack_of(message, leaseId=NOBODY)}

    for _ in range(2):
        assert await stream.refuse(message["partitionId"], **body) == "Invalid or expired lease"


# -- state --------------------------------------------------------------------------------------------------------

VALUES = [
    0,
    -(2**53),
    2**53,
    0.1,
    1e-300,
    123456789.125,
    "",
    "ünï\u001f\n",
    None,
    True,
    [],
    {},
    {"acc": {"n": [1, {"deep": [None, 2.5]}]}, "windowStart": 1735689600000, "windowEnd": 1735689602000},
]


async def test_values_come_back_exactly(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)

    await stream.apply(pushed["partition_id"], state_ops=[put(f"{n:03}", value) for n, value in enumerate(VALUES)])

    state = await stream.state(pushed["partition_id"])
    assert list(state) == [f"{n:03}" for n in range(len(VALUES))]
    assert list(map(repr, state.values())) == list(map(repr, VALUES))


async def test_an_upsert_without_a_value_puts_an_empty_object(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)

    await stream.apply(pushed["partition_id"], state_ops=[{"type": "upsert", "key": "k"}])

    assert await stream.state(pushed["partition_id"]) == {"k": {}}


async def test_a_key_may_hold_any_character(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    keys = [
        "",
        "tumb:60\u001f2025-01-01T00:00:00.000Z\u001fuser",
        "__wm__",
        "a%b_c\\",
        "\0",
        "'; DROP",
        "😀",
        "k" * 2048,
    ]

    await stream.apply(pushed["partition_id"], state_ops=[put(key, key) for key in keys])

    state = await stream.state(pushed["partition_id"])
    assert state == {key: key for key in keys}
    assert list(state) == sorted(keys, key=str.encode)
    for key in keys:
        assert key in await stream.state(pushed["partition_id"], keys=[key])


async def test_of_several_changes_of_a_key_the_last_counts(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    gone = {"type": "delete", "key": "a"}

    applied = await stream.apply(
        pushed["partition_id"], state_ops=[put("a", 1), put("a", 2), put("b", 1), gone, put("a", 3), put("c", 1)]
    )
    await stream.apply(pushed["partition_id"], state_ops=[put("c", 2), {"type": "delete", "key": "c"}])

    assert applied["state_ops_applied"] == 6
    assert await stream.state(pushed["partition_id"]) == {"a": 3, "b": 1}


async def test_state_belongs_to_query_and_partition(http: Http, stream: Stream) -> None:
    [one], [two] = [await http.push("source", 1, partition=name) for name in ("one", "two")]
    other = Stream(http, (await register(http, name="other")).json["query_id"], "streams.other")

    await stream.apply(one["partition_id"], state_ops=[put("k", "one")])
    await stream.apply(two["partition_id"], state_ops=[put("k", "two")])
    await other.apply(one["partition_id"], state_ops=[put("k", "other")])

    assert await stream.state(one["partition_id"]) == {"k": "one"}
    assert await stream.state(two["partition_id"]) == {"k": "two"}
    assert await other.state(one["partition_id"]) == {"k": "other"}
    assert await other.state(two["partition_id"]) == {}


async def test_a_prefix_is_taken_literally(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    keys = ["a%", "a%b", "ab", "a_", "axb", "b", "ü", "üx", "v"]
    await stream.apply(pushed["partition_id"], state_ops=[put(key, 1) for key in keys])

    for prefix, expected in {
        "a%": ["a%", "a%b"],
        "a_": ["a_"],
        "ü": ["ü", "üx"],
        "": sorted(keys, key=str.encode),
        "x": [],
    }.items():
        assert list(await stream.state(pushed["partition_id"], key_prefix=prefix)) == expected
    assert list(await stream.state(pushed["partition_id"], key_prefix="a", keys=["ab", "b"])) == ["ab"]


async def test_ripe_are_the_windows_that_have_a_number_for_an_end(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    values = {
        "early": {"windowEnd": 1000},
        "exact": {"windowEnd": 2000.0},
        "escaped": json.loads('{"window\\u0045nd": 1500}'),
        "late": {"windowEnd": 2000.5},
        "text": {"windowEnd": "1000"},
        "truth": {"windowEnd": True},
        "null": {"windowEnd": None},
        "nested": {"acc": {"windowEnd": 1000}},
        "list": [{"windowEnd": 1000}],
        "number": 1000,
        "huge": {"windowEnd": 10**400},
    }
    await stream.apply(pushed["partition_id"], state_ops=[put(key, value) for key, value in values.items()])

    async def ripe(until: Any, **filters: Any) -> list[str]:
        return list(await stream.state(pushed["partition_id"], ripe_at_or_before=until, **filters))

    assert await ripe(2000) == ["early", "escaped", "exact"]
    assert await ripe(999) == []
    assert await ripe(0) == []
    assert await ripe(2000, key_prefix="e", keys=["early", "late"]) == ["early"]
    assert await ripe(10**500) == ["early", "escaped", "exact", "late"]


async def test_a_window_that_moves_its_end_is_ripe_by_the_new_one(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("k", {"windowEnd": 1000})])
    await stream.apply(pushed["partition_id"], state_ops=[put("k", {"windowEnd": 5000})])

    assert await stream.state(pushed["partition_id"], ripe_at_or_before=2000) == {}


async def test_a_state_row_says_when_it_was_put(http: Http, stream: Stream) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("k", 1)])

    body = {"query_id": stream.query_id, "partition_id": pushed["partition_id"]}
    [row] = (await http.post("/streams/v1/state/get", body)).json["rows"]

    assert row.keys() == {"key", "value", "updated_at"}
    assert row["updated_at"].endswith("Z")
    assert len(row["updated_at"]) == len("2025-01-01T00:00:00.000000Z")


@pytest.mark.parametrize(
    "wrong", [{"keys": "k"}, {"keys": [1]}, {"key_prefix": 1}, {"ripe_at_or_before": "1"}, {"ripe_at_or_before": True}]
)
async def test_a_filter_of_another_kind_is_refused(http: Http, wrong: dict[str, Any]) -> None:
    answer = await http.post("/streams/v1/state/get", {"query_id": NOBODY, "partition_id": NOBODY} | wrong)

    assert answer.status == 400


async def test_state_goes_with_its_source_queue(http: Http, stream: Stream, sql: Any) -> None:
    [pushed] = await http.push("source", 1)
    await stream.apply(pushed["partition_id"], state_ops=[put("k", 1)])

    await http.request("DELETE", "/api/v1/resources/queues/source")
    [again] = await http.push("source", 1)

    assert await stream.state(pushed["partition_id"]) == {}
    assert await stream.state(again["partition_id"]) == {}
    assert await sql.fetchval("SELECT count(*) FROM queen.stream_partitions") == 0
    assert await stream.refuse(pushed["partition_id"], ack={"transactionId": pushed["transaction_id"]})


# -- encryption ---------------------------------------------------------------------------------------------------


async def test_state_and_sink_messages_of_encrypted_queues_are_stored_encrypted(
    http: Http, stream: Stream, sql: Any
) -> None:
    for queue in ("source", "sink"):
        await http.post("/api/v1/configure", {"queue": queue, "options": {"encryptionEnabled": True}})
    [pushed] = await http.push("source", "plain secret")

    await stream.apply(
        pushed["partition_id"],
        state_ops=[put("k", {"seen": "plain secret"})],
        push_items=[{"queue": "sink", "payload": "plain secret"}],
    )

    [stored] = await sql.fetch("SELECT key_id, value FROM queen.stream_state")
    assert stored["key_id"] is not None
    assert b"plain secret" not in stored["value"]
    for row in await sql.fetch("SELECT body FROM queen.segments"):
        assert b"plain secret" not in row["body"]
    assert await stream.state(pushed["partition_id"]) == {"k": {"seen": "plain secret"}}
    assert data((await http.get("/api/v1/pop/queue/sink")).json["messages"]) == ["plain secret"]


async def test_without_a_key_nothing_of_an_encrypted_queue_is_stored(
    app: QueenApp, http: Http, stream: Stream, settings: Settings
) -> None:
    [pushed] = await http.push("source", 1)
    for queue in ("source", "sink"):
        await http.post("/api/v1/configure", {"queue": queue, "options": {"encryptionEnabled": True}})

    async with open_app(msgspec.structs.replace(settings, encryption_key=None)) as keyless:
        elsewhere = Stream(Http(keyless), stream.query_id, stream.group)
        for part in ({"state_ops": [put("k", 1)]}, {"push_items": [{"queue": "sink", "payload": 1}]}):
            assert "encrypted" in await elsewhere.refuse(pushed["partition_id"], **part)

    assert await stream.state(pushed["partition_id"]) == {}
    assert (await http.get("/api/v1/pop/queue/sink")).status == 204
