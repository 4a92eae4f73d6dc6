"""What the tests of the admin routes say often: consume, acknowledge, ask and expect 200."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode

from .asgi_driver import Http

API = "/api/v1"


def path_of(*parts: str) -> str:
    """A path below the API, each part encoded as one segment."""
    return "/".join([API, *(quote(part, safe="") for part in parts)])


async def ask(http: Http, *parts: str, **query: Any) -> Any:
    """GET, 200, JSON."""
    target = path_of(*parts) + (f"?{urlencode(query)}" if query else "")
    answer = await http.get(target)
    assert answer.status == 200, (target, answer.status, answer.body)
    return answer.json


async def order(http: Http, method: str, *parts: str, body: Any = b"", status: int = 200, **query: Any) -> Any:
    """A change, answered with ``status`` and JSON."""
    target = path_of(*parts) + (f"?{urlencode(query)}" if query else "")
    answer = await http.request(method, target, body)
    assert answer.status == status, (target, answer.status, answer.body)
    return answer.json


async def configure(http: Http, queue: str, namespace: str = "", task: str = "", **options: Any) -> None:
    body = {"queue": queue, "namespace": namespace, "task": task, "options": options}
    assert (await http.post(f"{API}/configure", body)).status == 200


async def pop(
    http: Http, queue: str, group: str | None = None, partition: str | None = None, **query: Any
) -> list[Any]:
    """The messages of one pop; none for a 204."""
    parameters = {"batch": 100, **({} if group is None else {"consumerGroup": group}), **query}
    parts = ("pop", "queue", queue, *(() if partition is None else ("partition", partition)))
    answer = await http.get(f"{path_of(*parts)}?{urlencode(parameters)}")
    assert answer.status in (200, 204), answer.body
    messages: list[Any] = answer.json["messages"] if answer.status == 200 else []
    return messages


async def ack(
    http: Http, messages: list[Any], group: str | None = None, status: str = "completed", error: str | None = None
) -> list[Any]:
    acknowledgments = [
        {
            "transactionId": message["transactionId"],
            "partitionId": message["partitionId"],
            "leaseId": message["leaseId"],
            "status": status,
            "error": error,
        }
        for message in messages
    ]
    answer = await http.post(f"{API}/ack/batch", {"acknowledgments": acknowledgments, "consumerGroup": group})
    assert answer.status == 200, answer.body
    results: list[Any] = answer.json
    assert all(result["success"] for result in results), results
    return results


async def consume(http: Http, queue: str, group: str | None = None) -> list[Any]:
    """The payloads of everything there is, taken and acknowledged."""
    data: list[Any] = []
    while messages := await pop(http, queue, group):
        await ack(http, messages, group)
        data += [message["data"] for message in messages]
    return data


async def bury(http: Http, queue: str, error: str = "boom", group: str | None = None) -> list[Any]:
    """Make dead letters of everything there is; what they were."""
    buried = []
    while messages := await pop(http, queue, group):
        await ack(http, messages, group, "dlq", error)
        buried += messages
    return buried
