"""The admin class of the clients: every method of it gets an answer that it can use.

What the answers are is tested over plain HTTP in tests/http. The switches of the server are left alone here, for other
tests run on it.
"""

from __future__ import annotations

import httpx
import pytest

from .support import IS_2, Broker, data


async def worked_on(broker: Broker, group: str) -> str:
    """A queue of three messages: one done by the group, one a dead letter, one pending."""
    name = await broker.create()
    await broker.client.queue(name).push([{"data": number} for number in range(3)])
    (done,) = await broker.pop(name, 1, group=group)
    await broker.ack(done, group=group)
    (dead,) = await broker.pop(name, 1, group=group)
    await broker.ack(dead, "dlq", group=group, error="no use")
    return name


async def test_what_there_is(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin

    assert (await admin.get_overview())["messages"]["total"] >= 3
    assert "namespaces" in await admin.get_namespaces()
    assert "tasks" in await admin.get_tasks()
    assert name in [queue["name"] for queue in (await admin.list_queues(limit=1000))["queues"]]
    assert (await admin.get_queue(name))["totals"]["deadLetter"] == 1
    (partition,) = (await admin.get_partitions(queue=name))["partitions"]
    assert (partition["total"], partition["depth"]) == (3, 1)


async def test_messages_are_seen_and_deleted(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin

    messages = (await admin.list_messages(queue=name))["messages"]

    assert [message["status"] for message in messages] == ["pending", "dead_letter", "completed"]
    pending = messages[0]
    key = (pending["partitionId"], pending["transactionId"])
    assert (await admin.get_message(*key))["payload"] == 2
    assert (await admin.delete_message(*key))["success"] is True
    assert await broker.pop(name, 1, group="g") == []


async def test_a_dead_letter_is_retried(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin
    (letter,) = (await broker.client.queue(name).dlq("g").get())["messages"]
    assert (letter["data"], letter["errorMessage"]) == (1, "no use")

    assert (await admin.retry_message(letter["partitionId"], letter["transactionId"]))["retried"] is True

    assert (await broker.client.queue(name).dlq("g").get())["total"] == 0
    assert data(await broker.pop(name, 10, group="g")) == [2, 1]


@pytest.mark.skipif(IS_2, reason="2.6 dropped these from its class")
async def test_a_message_is_moved_aside_and_a_queue_cleared(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin
    pending = (await admin.list_messages(queue=name, status="pending"))["messages"][0]

    assert (await admin.move_message_to_dlq(pending["partitionId"], pending["transactionId"]))["movedToDLQ"] is True
    assert data(await broker.pop(name, 10)) == [0, 1]
    assert (await admin.clear_queue(name))["count"] == 3
    assert await broker.pop(name, 10) == []


@pytest.mark.skipif(not IS_2, reason="0.15 knows no depth")
async def test_the_depth_of_a_queue(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin

    depth = await admin.get_queue_depth(name, group="g")

    assert (depth["pending"], depth["partitionsPending"], depth["effectivePending"]) == (1, 1, 1)


async def test_traces_are_recorded_and_found(broker: Broker) -> None:
    name, admin = await broker.create(), broker.client.admin
    trace_name = broker.name("-trace")
    await broker.client.queue(name).push([{"data": 1}])

    async def trace(message: dict[str, object] | list[dict[str, object]]) -> None:
        (message,) = message if isinstance(message, list) else [message]
        recorded = await message["trace"]({"traceName": trace_name, "data": {"step": 1}})  # type: ignore[operator]
        assert recorded["success"] is True, recorded

    await broker.client.queue(name).limit(1).consume(trace)

    (found,) = (await admin.get_traces_by_name(trace_name))["traces"]
    assert (found["data"], found["message_payload"]) == ({"step": 1}, 1)
    assert trace_name in [entry["trace_name"] for entry in (await admin.get_trace_names(limit=1000))["trace_names"]]
    traces = (await admin.get_traces_for_message(found["partition_id"], found["transaction_id"]))["traces"]
    assert [entry["data"] for entry in traces] == [{"step": 1}]


async def test_groups_are_listed_and_moved(broker: Broker) -> None:
    group = broker.name("@group.x y")
    name, admin = await worked_on(broker, group), broker.client.admin

    (listed,) = [entry for entry in await admin.list_consumer_groups() if entry["name"] == group]
    assert (listed["queueName"], listed["totalLag"]) == (name, 1)
    assert (await admin.get_consumer_group(group))[name]["partitions"][0]["offsetLag"] == 1
    assert isinstance(await admin.get_lagging_consumers(0), list)
    assert (await admin.seek_consumer_group(group, name, {"toEnd": True}))["partitionsUpdated"] == 1
    assert await broker.pop(name, 10, group=group) == []
    assert (await admin.delete_consumer_group_for_queue(group, name, True))["metadataDeleted"] is True
    assert data(await broker.pop(name, 10, group=group)) == [0, 1, 2]
    at = "2020-01-01T00:00:00Z"
    assert (await broker.client.update_consumer_group_timestamp(group, at))["rowsUpdated"] == 1


async def test_status_and_figures(broker: Broker) -> None:
    name, admin = await worked_on(broker, "g"), broker.client.admin

    assert isinstance(await admin.refresh_consumer_stats(), dict)
    assert (await admin.get_status())["messages"]["total"] >= 3
    assert "queues" in await admin.get_queue_stats(limit=5)
    assert (await admin.get_queue_detail(name))["totals"]["total"] == 3
    assert "dataPoints" in await admin.get_analytics(interval="minute")
    assert "replicas" in await admin.get_system_metrics()
    assert "timeSeries" in await admin.get_worker_metrics()
    assert (await admin.health())["status"] == "healthy"
    assert "requests" in await admin.metrics()


@pytest.mark.skipif(IS_2, reason="2.6 dropped these from its class")
async def test_switches_and_postgresql_are_seen(broker: Broker) -> None:
    admin = broker.client.admin

    assert (await admin.get_maintenance_mode())["maintenanceMode"] is False
    assert (await admin.get_pop_maintenance_mode())["popMaintenanceMode"] is False
    assert (await admin.set_pop_maintenance_mode(False))["popMaintenanceMode"] is False
    assert "tableSizes" in await admin.get_postgres_stats()


async def test_what_is_not_there_is_an_error_with_a_sentence(broker: Broker) -> None:
    with pytest.raises(Exception, match="Queue not found") as caught:
        await broker.client.admin.get_queue(broker.name("-nothing"))

    assert not isinstance(caught.value, httpx.TransportError)
