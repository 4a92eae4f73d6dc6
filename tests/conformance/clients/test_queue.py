"""Conformance section 1: creating and configuring queues, and deleting them."""

from __future__ import annotations

from .support import Broker, data


async def test_create_queue(broker: Broker) -> None:
    answer = await broker.client.queue(broker.name()).create()

    assert answer["configured"] is True


async def test_configure_queue_echoes_all_fifteen_options(broker: Broker) -> None:
    options = {
        "lease_time": 600,
        "retry_limit": 7,
        "retry_delay": 2500,
        "priority": 9,
        "delayed_processing": 3,
        "window_buffer": 4,
        "max_size": 5000,
        "ttl": 7200,
        "dead_letter_queue": True,
        "dlq_after_max_retries": True,
        "retention_enabled": True,
        "retention_seconds": 86_400,
        "completed_retention_seconds": 3_600,
        "max_wait_time_seconds": 1_800,
        "encryption_enabled": True,
    }

    answer = await broker.client.queue(broker.name()).namespace("shop").task("bill").config(options).create()

    assert answer["options"] == {
        "leaseTime": 600,
        "retryLimit": 7,
        "retryDelay": 2500,
        "priority": 9,
        "delayedProcessing": 3,
        "windowBuffer": 4,
        "maxSize": 5000,
        "ttl": 7200,
        "deadLetterQueue": True,
        "dlqAfterMaxRetries": True,
        "retentionEnabled": True,
        "retentionSeconds": 86_400,
        "completedRetentionSeconds": 3_600,
        "maxWaitTimeSeconds": 1_800,
        "encryptionEnabled": True,
    }
    assert (answer["namespace"], answer["task"]) == ("shop", "bill")


async def test_create_on_an_existing_queue_resets_its_options_and_keeps_its_messages(broker: Broker) -> None:
    queue = await broker.create(window_buffer=30, delayed_processing=30)
    await broker.client.queue(queue).push([{"data": "early"}])
    assert await broker.pop(queue) == []

    await broker.client.queue(queue).create()

    assert data(await broker.pop(queue)) == ["early"]


async def test_a_deleted_queue_takes_its_messages_ids_and_groups_with_it(broker: Broker) -> None:
    queue = await broker.create()
    first = await broker.client.queue(queue).push([{"transactionId": "once", "data": 1}])
    assert len(await broker.pop(queue, group="readers", subscription_mode="new")) == 0

    answer = await broker.client.queue(queue).delete()
    again = await broker.client.queue(queue).push([{"transactionId": "once", "data": 2}])

    assert (answer["deleted"], answer["existed"]) == (True, True)
    assert again[0]["status"] == "queued"
    assert again[0]["message_id"] != first[0]["message_id"]
    assert again[0]["partition_id"] != first[0]["partition_id"]
    assert data(await broker.pop(queue, group="readers")) == [2]


async def test_deleting_a_queue_that_is_not_there_is_no_error(broker: Broker) -> None:
    answer = await broker.client.queue(broker.name()).delete()

    assert (answer["deleted"], answer["existed"]) == (True, False)
