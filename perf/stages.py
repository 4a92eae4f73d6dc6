"""What each stage of a push costs in a worker, in microseconds a message: no server, no PostgreSQL, one thread.

A flush of 12 requests of 100 messages, as at 50 connections: without transaction ids, with UUIDv7 ones, with UUIDv4
ones. A stage is told by its best of many rounds; ``lines``, ``seal`` and ``ids`` are parts of ``build``.

python -m perf.stages
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

from queen.model.message import PushResult
from queen.model.queue import Queue, QueueOptions
from queen.routes.wire.push import read_push, write_push
from queen.storage.catalogue import Catalogue
from queen.storage.ids import ranges_of, split_ids, uuid7_texts
from queen.storage.pushes import Flush, PushRequest
from queen.storage.segments import Keyring, build_lines, seal

T = TypeVar("T")

REQUESTS: Final = 12
BATCH: Final = 100
PARTITIONS: Final = 7
ROUNDS: Final = 40
STAGES: Final = ("decode", "sort", "build", "lines", "seal", "ids", "results", "answer")


class OneQueue(Catalogue):
    """Knows one queue, and needs no database."""

    def __init__(self) -> None:
        self._queue = Queue(queue_id=uuid4(), name="q", namespace="", task="", options=QueueOptions(), version=1)

    def cached(self, name: str) -> Queue | None:
        return self._queue


def ids_of(form: str) -> list[str | None]:
    """Transaction ids of one request."""
    if form == "uuid7":
        return [f"{text[:14]}7{uuid4().hex[:3]}-a{uuid4().hex[:3]}-{uuid4().hex[:12]}" for text in uuid7_texts(BATCH)]
    return [str(uuid4()) if form == "uuid4" else None for _ in range(BATCH)]


def body_of(number: int, form: str) -> bytes:
    """A request."""
    items = []
    for at, text in enumerate(ids_of(form)):
        payload = {"n": number * BATCH + at, "r": random.randbytes(6).hex()}
        item: dict[str, Any] = {"queue": "q", "partition": f"p{number % PARTITIONS}", "payload": payload}
        items.append(item if text is None else item | {"transactionId": text})
    return json.dumps({"items": items}, separators=(",", ":")).encode()


def best_of(stage: Callable[[], T]) -> tuple[float, T]:
    """The shortest time of it, in microseconds a message, and its last result."""
    shortest = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        result = stage()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest / (REQUESTS * BATCH) * 1e6, result


def measure(form: str) -> dict[str, float]:
    """The cost of every stage."""
    costs: dict[str, float] = {}
    catalogue, keyring = OneQueue(), Keyring(None)
    bodies = [body_of(number, form) for number in range(REQUESTS)]
    costs["decode"], requests = best_of(lambda: [read_push(body) for body in bodies])
    costs["sort"], flush = best_of(
        lambda: Flush([PushRequest(messages, None) for messages in requests], keyring, buckets=1)
    )
    costs["build"], _ = best_of(lambda: flush.prepare(catalogue))
    parts = list(flush.calls[0].parts)
    costs["lines"], lines = best_of(
        lambda: [
            build_lines(part.partition_id, part.ids, [None] * len(part.messages), part.subs, part.payloads)
            for part in parts
        ]
    )
    costs["seal"], _ = best_of(lambda: [seal(each, UUID(int=0), None) for each in lines])
    now_ms = time.time_ns() // 1_000_000
    given = [part.ids for part in parts if part.ids is not None]
    costs["ids"], _ = best_of(
        lambda: [(split.near and ranges_of(split.near)) for split in (split_ids(ids, now_ms) for ids in given)]
    )
    rows = [
        {"verdict": "stored", "part": number, "id_prefix": (now_ms << 20) + number}
        for number, _ in enumerate(flush.calls[0].segments, start=1)
    ]

    def answer_rows() -> list[list[PushResult]]:
        flush.take(rows)
        return flush.results()

    costs["results"], results = best_of(answer_rows)
    costs["answer"], _ = best_of(lambda: [write_push(*pair) for pair in zip(requests, results, strict=True)])
    return costs


def main() -> None:
    """Print the table."""
    print(f"{'us/message':<12}" + "".join(f"{stage:>9}" for stage in (*STAGES, "sum")))
    for form in ("minted", "uuid7", "uuid4"):
        costs = measure(form)
        total = sum(costs[stage] for stage in ("decode", "sort", "build", "results", "answer"))
        print(f"{form:<12}" + "".join(f"{costs[stage]:>9.3f}" for stage in STAGES) + f"{total:>9.3f}")


if __name__ == "__main__":
    main()
