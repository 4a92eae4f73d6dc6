"""The suite of the first generation, as far as it still holds, in plain HTTP (conformance section 13).

Superseded there and left out: pushes to a queue that was not configured (refused then, created now), its addresses
and its answers. Acknowledgements name their partition here, as they have to since.
"""

from __future__ import annotations

import itertools
import os
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio

Message = dict[str, Any]

WAIT_SECONDS = 15.0  # for something that is due after a second or two, on a busy machine


class Api:
    """The routes, and the queues that one test has made."""

    def __init__(self, http: httpx.AsyncClient, test: str) -> None:
        self.http = http
        self._prefix = f"seed-{re.sub(r'[^a-zA-Z]+', '-', test)[:60]}-{uuid.uuid4().hex[:8]}"
        self.queues: list[str] = []

    def name(self, suffix: str = "") -> str:
        self.queues.append(self._prefix + suffix)
        return self.queues[-1]

    async def configure(self, suffix: str = "", *, namespace: str = "", task: str = "", **options: Any) -> str:
        queue = self.name(suffix)
        body = {"queue": queue, "namespace": namespace, "task": task, "options": options}
        answer = await self.http.post("/api/v1/configure", json=body)
        assert answer.status_code == 200, answer.text
        return queue

    async def push(self, queue: str, *payloads: Any, partition: str = "Default") -> list[dict[str, Any]]:
        items = [{"queue": queue, "partition": partition, "payload": payload} for payload in payloads]
        return await self.push_items(items)

    async def push_items(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answer = await self.http.post("/api/v1/push", json={"items": items})
        assert answer.status_code == 201, answer.text
        results: list[dict[str, Any]] = answer.json()
        return results

    async def take(self, queue: str | None = None, batch: int = 1, **params: Any) -> list[Message]:
        """Pop. `group` is short for consumerGroup; `partition` goes into the path; nothing waits unless asked to."""
        path = "/api/v1/pop" if queue is None else f"/api/v1/pop/queue/{queue}"
        if "partition" in params:
            path += f"/partition/{params.pop('partition')}"
        if "group" in params:
            params["consumerGroup"] = params.pop("group")
        answer = await self.http.get(path, params={"batch": batch, **params})
        assert answer.status_code in (200, 204), answer.text
        messages: list[Message] = answer.json()["messages"] if answer.status_code == 200 else []
        return messages

    async def wait_take(self, queue: str, batch: int = 1, **params: Any) -> list[Message]:
        return await self.take(queue, batch, wait="true", timeout=int(WAIT_SECONDS * 1000), **params)

    async def ack(self, message: Message, status: str = "completed", **extra: Any) -> dict[str, Any]:
        body = {
            "transactionId": message["transactionId"],
            "partitionId": message["partitionId"],
            "leaseId": message["leaseId"],
            "consumerGroup": message["consumerGroup"],
            "status": status,
            **extra,
        }
        answer = await self.http.post("/api/v1/ack", json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()[0]
        return result

    async def ack_all(self, messages: list[Message], status: str = "completed") -> None:
        acknowledgments = [
            {
                "transactionId": message["transactionId"],
                "partitionId": message["partitionId"],
                "leaseId": message["leaseId"],
                "status": status,
            }
            for message in messages
        ]
        body = {"acknowledgments": acknowledgments, "consumerGroup": messages[0]["consumerGroup"]}
        answer = await self.http.post("/api/v1/ack/batch", json=body)
        assert answer.status_code == 200, answer.text
        assert [result["success"] for result in answer.json()] == [True] * len(messages), answer.text


@pytest.fixture
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    # a connection per request: with several workers, each may land on another one
    async with httpx.AsyncClient(
        base_url=os.environ["QUEEN_URL"], headers={"Connection": "close"}, timeout=WAIT_SECONDS + 5
    ) as http:
        api = Api(http, request.node.name)
        yield api
        for queue in api.queues:
            answer = await http.delete(f"/api/v1/resources/queues/{queue}")
            assert answer.status_code == 200, answer.text


def data(messages: list[Message]) -> list[Any]:
    return [message["data"] for message in messages]


# core


async def test_queue_creation_policy(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, "in the first")
    await api.push(queue, "in a new one", partition="on demand")

    assert data(await api.take(queue, partition="on demand")) == ["in a new one"]
    assert data(await api.take(queue)) == ["in the first"]


async def test_single_message_push(api: Api) -> None:
    queue = await api.configure()

    results = await api.push(queue, {"message": "Hello"})

    assert [result["status"] for result in results] == ["queued"]
    assert data(await api.take(queue, 10)) == [{"message": "Hello"}]


async def test_queue_configuration(api: Api) -> None:
    queue = api.name()
    wanted = {"leaseTime": 600, "retryLimit": 5, "priority": 10, "delayedProcessing": 2, "windowBuffer": 3}

    answer = (await api.http.post("/api/v1/configure", json={"queue": queue, "options": wanted})).json()

    assert {option: answer["options"][option] for option in wanted} == wanted
    assert len(answer["options"]) == 15


async def test_take_and_acknowledgment(api: Api) -> None:
    queue = await api.configure(retryLimit=3)
    await api.push(queue, 1, 2)
    first, second = await api.take(queue, 2)

    completed = await api.ack(first)
    failed = await api.ack(second, "failed", error="did not work")

    assert (completed["success"], completed["leaseReleased"]) == (True, False)
    assert (failed["success"], failed["leaseReleased"], failed["dlq"]) == (True, True, False)
    again = await api.take(queue, 2)
    assert data(again) == [2]
    assert again[0]["retryCount"] == 1


async def test_partition_fifo_ordering(api: Api) -> None:
    queue = await api.configure()
    for n in range(10):
        for partition in ("a", "b", "c"):
            await api.push(queue, f"{partition}{n}", partition=partition)

    for partition in ("a", "b", "c"):
        assert data(await api.take(queue, 10, partition=partition)) == [f"{partition}{n}" for n in range(10)]


# partition


@pytest.mark.parametrize("group", [None, "workers"])
async def test_partition_locking(api: Api, group: str | None) -> None:
    queue = await api.configure()
    who = {"group": group} if group else {}
    for partition in ("a", "b"):
        await api.push(queue, f"{partition}1", f"{partition}2", partition=partition)

    first = await api.take(queue, 2, **who)
    second = await api.take(queue, 2, **who)
    third = await api.take(queue, 2, **who)
    assert {first[0]["partition"], second[0]["partition"]} == {"a", "b"}
    assert (len(first), len(second), third) == (2, 2, [])
    await api.push(queue, "more", partition=first[0]["partition"])
    await api.ack_all(first)
    fourth = await api.take(queue, 2, **who)

    assert data(fourth) == ["more"]
    assert fourth[0]["partition"] == first[0]["partition"]


async def test_a_lease_of_one_group_does_not_hold_up_another(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, 1, 2)

    assert data(await api.take(queue, 2, group="one")) == [1, 2]
    assert await api.take(queue, 2, group="one") == []
    assert data(await api.take(queue, 2, group="two")) == [1, 2]
    assert data(await api.take(queue, 2)) == [1, 2]


async def test_namespace_and_task_filtering(api: Api) -> None:
    namespace = uuid.uuid4().hex
    names = [
        await api.configure("-1", namespace=namespace, task="bill"),
        await api.configure("-2", namespace=namespace, task="ship"),
        await api.configure("-3", namespace=f"{namespace}x", task="bill"),
    ]
    for name in names:
        await api.push(name, name)

    by_both = await api.take(None, 10, namespace=namespace, task="ship")
    by_namespace = await api.take(None, 10, namespace=namespace)
    nothing_left = await api.take(None, 10, namespace=namespace)

    assert data(by_both) == [names[1]]
    assert data(by_namespace) == [names[0]]
    assert nothing_left == []
    assert by_namespace[0]["queue"] == names[0]


async def test_namespace_and_task_in_groups(api: Api) -> None:
    namespace = uuid.uuid4().hex
    name = await api.configure(namespace=namespace, task="bill")
    await api.push(name, 1, 2)

    assert data(await api.take(None, 10, namespace=namespace, group="one")) == [1, 2]
    assert await api.take(None, 10, task="bill", namespace=namespace, group="one") == []
    assert data(await api.take(None, 10, task="bill", namespace=namespace, group="two")) == [1, 2]


async def test_queues_of_a_namespace_come_by_priority(api: Api) -> None:
    namespace = uuid.uuid4().hex
    for priority in (1, 10, 5):
        name = await api.configure(f"-{priority}", namespace=namespace, priority=priority)
        await api.push(name, priority)

    received = [data(await api.take(None, 1, namespace=namespace))[0] for _ in range(3)]

    assert received == [10, 5, 1]


async def test_a_pop_by_neither_label_is_refused(api: Api) -> None:
    answer = await api.http.get("/api/v1/pop")

    assert (answer.status_code, answer.json()["error"]) == (400, "namespace or task is required")


# enterprise


async def test_message_encryption(api: Api) -> None:
    queue = await api.configure(encryptionEnabled=True)
    secret = {"ssn": "123-45-6789", "nested": {"list": [1, None, "ü"]}}

    await api.push(queue, secret)

    assert data(await api.take(queue)) == [secret]


async def test_retention_of_pending_messages(api: Api) -> None:
    queue = await api.configure(retentionEnabled=True, retentionSeconds=3)
    await api.push(queue, 1, 2)
    assert data(await api.take(queue, 10, group="at once")) == [1, 2]

    await trio.sleep(3.5)

    assert await api.take(queue, 10) == []


async def test_a_partition_just_made_is_not_cleaned_away(api: Api) -> None:
    queue = await api.configure(retentionEnabled=True, retentionSeconds=1)
    await api.push(queue, "old")
    await trio.sleep(3.5)  # past its age and a sweep, which leaves an empty partition

    await api.push(queue, "young")

    assert data(await api.take(queue, 10)) == ["young"]


async def test_message_eviction(api: Api) -> None:
    queue = await api.configure(maxWaitTimeSeconds=3)
    await api.push(queue, 1)

    await trio.sleep(3.5)

    assert await api.take(queue) == []


async def test_combined_enterprise_features(api: Api) -> None:
    options = {
        "encryptionEnabled": True,
        "retentionEnabled": True,
        "retentionSeconds": 3600,
        "completedRetentionSeconds": 1800,
        "maxWaitTimeSeconds": 600,
        "priority": 7,
        "leaseTime": 60,
    }
    queue = api.name()
    answer = (await api.http.post("/api/v1/configure", json={"queue": queue, "options": options})).json()
    assert {option: answer["options"][option] for option in options} == options

    await api.push(queue, {"n": 1})

    assert data(await api.take(queue)) == [{"n": 1}]


@pytest.mark.parametrize(
    "options",
    [
        {"retentionSeconds": -1},
        {"leaseTime": -5},
        {"retryLimit": -1},
        {"priority": 2**70},
        {"leaseTime": "soon"},
        {"encryptionEnabled": "yes"},
    ],
)
async def test_bad_options_are_refused_or_taken_but_break_nothing(api: Api, options: dict[str, Any]) -> None:
    queue = api.name()

    answer = await api.http.post("/api/v1/configure", json={"queue": queue, "options": options})

    assert answer.status_code == 200 or (answer.status_code == 400 and answer.json()["error"])
    await api.http.post("/api/v1/configure", json={"queue": queue})
    await api.push(queue, 1)
    assert data(await api.take(queue)) == [1]


# bus


async def test_bus_consumer_groups(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, *range(5))

    one, two = await api.take(queue, 3, group="one"), await api.take(queue, 3, group="two")
    await api.ack_all(one)
    rest = await api.take(queue, 3, group="one")

    assert (data(one), data(two), data(rest)) == ([0, 1, 2], [0, 1, 2], [3, 4])


async def test_mixed_mode(api: Api) -> None:
    queue = await api.configure()
    for n in range(6):
        await api.push(queue, n, partition=f"p{n % 2}")

    first, second = await api.take(queue, 3), await api.take(queue, 3)
    analytics = await api.take(queue, 10, group="analytics", partitions=2)
    audit = await api.take(queue, 10, group="audit", partitions=2)

    assert sorted(data(first) + data(second)) == list(range(6))
    assert sorted(data(analytics)) == sorted(data(audit)) == list(range(6))


async def test_consumer_group_subscription_modes(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, "old 1", "old 2", "old 3")
    assert await api.take(queue, 10, group="news", subscriptionMode="new-only") == []
    await api.push(queue, "new 1", "new 2", "new 3")

    everything = await api.take(queue, 10, group="everything", subscriptionMode="all")
    news = await api.take(queue, 10, group="news")

    assert data(everything) == ["old 1", "old 2", "old 3", "new 1", "new 2", "new 3"]
    assert data(news) == ["new 1", "new 2", "new 3"]


# edge cases


async def test_empty_and_null_payloads(api: Api) -> None:
    queue = await api.configure()
    payloads: list[Any] = [None, {}, "", [], 0, False, "null"]

    await api.push(queue, *payloads)

    assert data(await api.take(queue, 10)) == payloads


async def test_very_large_payloads(api: Api) -> None:
    queue = await api.configure()
    large = {"blob": "x" * 10_000_000, "tail": "whole"}

    await api.push(queue, large, "small")

    messages = await api.take(queue, 10)
    assert data(messages) == [large, "small"]


async def test_concurrent_push_operations(api: Api) -> None:
    queue = await api.configure()

    async with trio.open_nursery() as nursery:
        for producer in range(10):
            nursery.start_soon(api.push, queue, *(f"{producer}.{n}" for n in range(10)))

    received = data(await api.take(queue, 1000))
    assert sorted(received) == sorted(f"{producer}.{n}" for producer in range(10) for n in range(10))
    for producer in range(10):
        own = [payload for payload in received if payload.startswith(f"{producer}.")]
        assert own == [f"{producer}.{n}" for n in range(10)]


async def test_many_consumer_groups(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, *range(5))

    for n in range(10):
        messages = await api.take(queue, 10, group=f"group {n}")
        assert data(messages) == list(range(5))
        await api.ack_all(messages)
        assert await api.take(queue, 10, group=f"group {n}") == []


async def test_retry_limit_exhaustion(api: Api) -> None:
    queue = await api.configure(retryLimit=2, leaseTime=1)
    await api.push(queue, "poison")
    verdicts = []

    for _ in range(3):
        (message,) = await api.take(queue)
        verdicts.append((await api.ack(message, "failed", error="no"))["dlq"])

    assert verdicts == [False, False, True]
    assert await api.take(queue) == []


HOSTILE = ["'; DROP TABLE messages; --", '" OR 1=1 --', "$1", "%s {0} \\x00", "a'||pg_sleep(5)||'"]


@pytest.mark.parametrize("text", HOSTILE)
async def test_sql_injection_prevention(api: Api, text: str) -> None:
    queue = api.name(" 'quoted'; --")

    results = await api.push_items([{"queue": queue, "partition": text, "payload": text, "transactionId": text}])

    assert results[0]["status"] == "queued"
    (message,) = await api.take(queue, 10)
    assert (message["data"], message["partition"], message["transactionId"]) == (text, text, text)
    assert (await api.ack(message, "failed", error=text))["success"] is True
    assert data(await api.take(queue, 10, group=text)) == [text]


async def test_xss_prevention(api: Api) -> None:
    queue = await api.configure()
    markup = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", {"a&b": "</script>"}]

    await api.push(queue, *markup)
    answer = await api.http.get(f"/api/v1/pop/queue/{queue}", params={"batch": 10})

    assert data(answer.json()["messages"]) == markup
    assert answer.headers["content-type"].startswith("application/json")
    assert "<script>alert(1)</script>" in answer.text


# advanced patterns


async def test_multi_stage_pipeline(api: Api) -> None:
    stages = [await api.configure(f"-{stage}") for stage in ("ingest", "process", "store")]
    await api.push(stages[0], *range(10))

    for source, target in itertools.pairwise(stages):
        messages = await api.take(source, 100)
        await api.push(target, *(payload + 1 for payload in data(messages)))
        await api.ack_all(messages)

    assert data(await api.take(stages[-1], 100)) == [n + 2 for n in range(10)]


async def test_priority_does_not_reorder_a_partition(api: Api) -> None:
    queue = await api.configure(priority=9)
    for n in range(10):
        await api.push(queue, {"n": n, "priority": n % 3})

    assert [payload["n"] for payload in data(await api.take(queue, 10))] == list(range(10))


async def test_dead_letter_queue_pattern(api: Api) -> None:
    queue, dead = await api.configure("-work", retryLimit=2, leaseTime=2), await api.configure("-dead")
    await api.push(queue, "bad 1", "bad 2", "bad 3")
    attempts: dict[str, int] = {}

    for _ in range(20):  # three messages, three deliveries each, and then nothing
        messages = await api.take(queue)
        if not messages:
            break
        payload = messages[0]["data"]
        attempts[payload] = attempts.get(payload, 0) + 1
        if attempts[payload] == 3:
            await api.push(dead, payload)
        await api.ack(messages[0], "failed")

    assert attempts == {"bad 1": 3, "bad 2": 3, "bad 3": 3}
    assert data(await api.take(dead, 10)) == ["bad 1", "bad 2", "bad 3"]


async def test_rate_limiting(api: Api) -> None:
    """The application takes five at a time; the window of one second makes the burst one quiet batch."""
    queue = await api.configure(windowBuffer=1)
    await api.push(queue, *range(20))
    assert await api.take(queue, 5) == []

    received: list[int] = []
    while len(received) < 20:
        messages = await api.wait_take(queue, 5)
        assert messages
        await api.ack_all(messages)
        received += data(messages)

    assert received == list(range(20))


async def test_message_deduplication(api: Api) -> None:
    queue = await api.configure()
    items = [{"queue": queue, "payload": n, "transactionId": f"order-{n % 4}"} for n in range(12)]

    statuses = [(await api.push_items([item]))[0]["status"] for item in items]

    assert statuses == ["queued"] * 4 + ["duplicate"] * 8
    assert data(await api.take(queue, 100)) == [0, 1, 2, 3]


async def test_event_sourcing(api: Api) -> None:
    queue = await api.configure(leaseTime=1)
    events = [{"version": n, "type": f"event {n}"} for n in range(5)]
    await api.push(queue, *events)

    first = await api.take(queue, 10, group="projection")
    again = await api.wait_take(queue, 10, group="projection")  # not acknowledged: the lease of a second runs out

    assert data(first) == data(again) == events
    assert [message["id"] for message in first] == [message["id"] for message in again]


async def test_queue_metrics(api: Api) -> None:
    """Fifty messages, three of ten fail once: all are done after a bounded number of deliveries."""
    queue = await api.configure(retryLimit=3)
    await api.push(queue, *range(50))
    failed: set[int] = set()
    done = []

    for _ in range(50 + 15 + 1):
        messages = await api.take(queue)
        if not messages:
            break
        n = messages[0]["data"]
        if n % 10 < 3 and n not in failed:
            failed.add(n)
            await api.ack(messages[0], "failed")
        else:
            await api.ack(messages[0])
            done.append(n)

    assert done == list(range(50))
    assert len(failed) == 15


async def test_circuit_breaker(api: Api) -> None:
    """Ten calls fail and open the breaker; what it holds back is given up unharmed (`retry`); then all pass."""
    queue = await api.configure(retryLimit=20)
    await api.push(queue, *range(20))

    for _ in range(10):
        (message,) = await api.take(queue)
        assert (await api.ack(message, "failed"))["dlq"] is False
    (held,) = await api.take(queue)
    assert (await api.ack(held, "retry"))["leaseReleased"] is True

    received = []
    for _ in range(20):
        (message,) = await api.take(queue)
        received.append(message["data"])
        await api.ack(message)
    assert received == list(range(20))


async def test_ten_consumers_of_one_partition_in_order(api: Api) -> None:
    queue = await api.configure()
    await api.push(queue, *range(999))
    received: list[int] = []

    async def consume() -> None:
        while len(received) < 999:
            messages = await api.take(queue, 50, wait="true", timeout=1000)
            received.extend(data(messages))
            if messages:
                await api.ack_all(messages)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(consume)

    assert received == list(range(999))
