"""Traces over HTTP: recorded, found by message and by name."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio

from .admin_kit import ask, configure, order
from .asgi_driver import Http


async def record(http: Http, message: Any, data: Any = None, **fields: Any) -> Any:
    body = {
        "transactionId": message["transactionId"],
        "partitionId": message["partitionId"],
        "data": {} if data is None else data,
        **fields,
    }
    return await order(http, "POST", "traces", body=body, status=201)


async def test_a_trace_is_recorded_and_shown_with_its_message(http: Http) -> None:
    (message,) = await http.push("q", {"n": 1}, transactionId="a/b ü")
    first = await record(http, message, {"step": 1}, consumerGroup="g", eventType="start", workerId="w")
    await record(http, message, {"step": 2})

    traces = (await ask(http, "traces", message["partitionId"], "a/b ü"))["traces"]

    assert first["success"] is True
    assert UUID(first["traceId"])
    assert [trace["data"] for trace in traces] == [{"step": 1}, {"step": 2}]
    assert traces[0] == {
        "id": first["traceId"],
        "event_type": "start",
        "data": {"step": 1},
        "consumer_group": "g",
        "worker_id": "w",
        "created_at": traces[0]["created_at"],
        "trace_names": [],
    }
    assert (traces[1]["event_type"], traces[1]["consumer_group"], traces[1]["worker_id"]) == ("info", None, None)


async def test_traces_of_a_name_are_found_oldest_first_with_their_messages(http: Http) -> None:
    messages = await http.push("q", 0, 1, 2, partition="p")
    for message, number in zip(messages, range(3), strict=True):
        await record(http, message, {"n": number}, traceNames=["order/1 ü"])

    page = await ask(http, "traces", "by-name", "order/1 ü", limit=2, offset=1)

    assert (page["total"], page["pagination"]) == (3, {"limit": 2, "offset": 1})
    assert [trace["data"]["n"] for trace in page["traces"]] == [1, 2]
    trace = page["traces"][0]
    assert (trace["queue_name"], trace["partition_name"], trace["message_payload"]) == ("q", "p", 1)
    assert (trace["transaction_id"], trace["partition_id"]) == (
        messages[1]["transactionId"],
        messages[1]["partitionId"],
    )
    assert trace["trace_names"] == ["order/1 ü"]


async def test_the_payload_of_a_traced_message_of_an_encrypted_queue_is_shown_in_clear(http: Http) -> None:
    await configure(http, "q", encryptionEnabled=True)
    (message,) = await http.push("q", {"secret": 1})
    await record(http, message, traceNames="n")

    (trace,) = (await ask(http, "traces", "by-name", "n"))["traces"]

    assert trace["message_payload"] == {"secret": 1}


async def test_names_count_their_traces_and_messages_latest_first(http: Http) -> None:
    one, two = await http.push("q", 1, 2)
    await record(http, one, traceNames="rare")
    for message in (one, one, two):
        await record(http, message, traceNames=["often", "often", ""])

    page = await ask(http, "traces", "names")

    assert [(name["trace_name"], name["trace_count"], name["message_count"]) for name in page["trace_names"]] == [
        ("often", 3, 2),
        ("rare", 1, 1),
    ]
    assert (page["total"], page["pagination"]) == (2, {"limit": 50, "offset": 0})
    assert page["trace_names"][0]["last_seen"] >= page["trace_names"][1]["last_seen"]
    assert len((await ask(http, "traces", "names", limit=1, offset=1))["trace_names"]) == 1


async def test_names_and_by_name_are_no_messages(http: Http) -> None:
    assert "trace_names" in await ask(http, "traces", "names")
    assert (await ask(http, "traces", "by-name", "nothing")) == {
        "traces": [],
        "total": 0,
        "pagination": {"limit": 100, "offset": 0},
    }


async def test_many_traces_at_once_are_all_recorded(http: Http) -> None:
    messages = await http.push("q", *range(20))
    async with trio.open_nursery() as consumers:
        for message in messages:
            consumers.start_soon(partial(record, http, message, traceNames=["same"]))

    (name,) = (await ask(http, "traces", "names"))["trace_names"]
    assert (name["trace_count"], name["message_count"]) == (20, 20)


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("transactionId", "transactionId is required"),
        ("partitionId", "partitionId is required"),
        ("data", "data is required"),
    ],
)
async def test_a_trace_must_say_what_of(http: Http, missing: str, error: str) -> None:
    body = {"transactionId": "a", "partitionId": str(uuid4()), "data": {}}
    for wrong in ({name: value for name, value in body.items() if name != missing}, {**body, missing: None}):
        answer = await http.post("/api/v1/traces", wrong)
        assert (answer.status, answer.error) == (400, error)


async def test_the_data_of_a_trace_is_an_object(http: Http) -> None:
    answer = await http.post("/api/v1/traces", {"transactionId": "a", "partitionId": "b", "data": [1]})

    assert (answer.status, answer.error) == (400, "data must be an object")


@pytest.mark.parametrize("partition_id", ["nonsense", "5f0c8c1e-3a52-4d0e-9b57-6f1c2d9e7a40"])
async def test_a_trace_of_an_unknown_message_is_not_recorded(http: Http, partition_id: str) -> None:
    answer = await http.post("/api/v1/traces", {"transactionId": "a", "partitionId": partition_id, "data": {}})

    assert (answer.status, answer.json) == (404, {"success": False, "error": "Message not found"})
    assert (await ask(http, "traces", partition_id, "a"))["traces"] == []


async def test_odd_trimmings_do_not_fail_a_trace(http: Http) -> None:
    (message,) = await http.push("q", 1)

    await record(http, message, traceNames={"no": "names"}, consumerGroup=7, eventType=None, workerId=[])

    (trace,) = (await ask(http, "traces", message["partitionId"], message["transactionId"]))["traces"]
    assert (trace["trace_names"], trace["consumer_group"], trace["event_type"]) == ([], None, "info")


async def test_traces_go_with_their_message_and_with_their_queue(http: Http) -> None:
    one, two = await http.push("q", 1, 2)
    for message in (one, two):
        await record(http, message, traceNames=["n"])

    await order(http, "DELETE", "messages", one["partitionId"], one["transactionId"])
    assert (await ask(http, "traces", "by-name", "n"))["total"] == 1
    assert (await ask(http, "traces", "names"))["trace_names"][0]["message_count"] == 1

    await order(http, "DELETE", "resources", "queues", "q")
    assert (await ask(http, "traces", "names"))["trace_names"] == []


async def test_old_traces_are_forgotten(http: Http) -> None:
    (message,) = await http.push("q", 1)
    await record(http, message, traceNames=["n"])
    store = http.app.service.context.engine.store

    assert await store.traces.expire(1) == 0
    assert await store.traces.expire(0) == 1
    assert (await ask(http, "traces", "names"))["trace_names"] == []
