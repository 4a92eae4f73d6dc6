"""Producers and consumers that behave as in the field, and write down all they do and are told. Nothing is judged here.

8 partitions, 3 groups, about 400 messages a second; 5 % of deliveries are nacked, 2 % settled in a transaction, 2 % of
pushes are sent again. One group can never process certain messages: they become dead letters.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import trio

from perf.polite import Unanswered, Wire

from .history import Attempt, DeadLetter, Delivery, History, Kind, Outcome, Push, Settlement, Verdict

QUEUE = "faults"
SINK = "faults-sink"
GROUPS = ("steady", "other", "choosy")
CHOOSY = "choosy"  # fails POISON messages every time
PARTITIONS = 8
CONSUMERS = 2  # of each group
RATE = 400.0
BATCH = 4
POP = 60
RETRY_LIMIT = 3
RETRY_SECONDS = 0.05
NACK = 0.05
TRANSACTION = 0.02
AGAIN = 0.02


def is_poison(number: int) -> bool:
    return number % 151 == 13


def payload(partition: int, number: int) -> dict[str, Any]:
    return {"p": partition, "n": number, "text": f"message {number} of partition {partition}: " + "é" * (number % 60)}


class Exchanged(NamedTuple):
    """One request as the wire saw it. ``told`` is empty when it was answered with success."""

    kind: str
    sent_at: float
    ended_at: float
    opened_at: float  # of its connection
    told: str


class Load:
    """The load on one server, which may be started, killed and replaced underneath."""

    def __init__(self, port: int, seed: int, lease_seconds: float) -> None:
        self.port = port
        self.lease_seconds = lease_seconds
        self.history = History(lease_seconds=lease_seconds, groups=list(GROUPS), partitions=PARTITIONS)
        self.exchanged: list[Exchanged] = []
        self._seed = seed
        self._pushed = [0] * PARTITIONS
        self._passed = {(group, partition): 0 for group in GROUPS for partition in range(PARTITIONS)}
        self._stopped = trio.Event()
        self._last_news = 0.0
        self._producing = 0

    async def configure(self) -> None:
        """Make the queues; wants a server that works."""
        wire = Wire(self.port)
        for queue in (QUEUE, SINK):
            body = {"queue": queue, "options": {"leaseTime": round(self.lease_seconds), "retryLimit": RETRY_LIMIT}}
            status, answer = await wire.exchange("POST", "/api/v1/configure", body)
            assert status == 200, answer
        for group in GROUPS:  # a group sees what is pushed after it is known
            await wire.exchange("GET", f"/api/v1/pop/queue/{QUEUE}?consumerGroup={group}")
        wire.close()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._producing = PARTITIONS
            for partition in range(PARTITIONS):
                nursery.start_soon(self._produce, partition)
            for group in GROUPS:
                for number in range(CONSUMERS):
                    nursery.start_soon(self._consume, group, number)

    def stop_pushing(self) -> None:
        self._stopped.set()

    async def drain(self, limit_seconds: float) -> float | None:
        """After stop_pushing: until every group is through and stays so for a lease. Seconds that it took; None: never.

        An ack that was lost shows as one more delivery when its lease has ended.
        """
        began = trio.current_time()
        with trio.move_on_after(limit_seconds + self.lease_seconds + 30):
            while True:
                await trio.sleep(0.05)
                quiet = trio.current_time() - self._last_news > self.lease_seconds + 1
                if not self._producing and quiet and self._through():
                    return max(0.0, self._last_news - began)
        return None

    def _through(self) -> bool:
        return all(self._passed[g, p] >= self._pushed[p] for g in GROUPS for p in range(PARTITIONS))

    async def _attempt(
        self, wire: Wire, kind: str, path: str, body: Any = None, method: str = "POST"
    ) -> tuple[Attempt, Any]:
        """One request. The outcome of a success is for the caller to refine."""
        sent_at = trio.current_time()
        answer: Any = None
        try:
            status, raw = await wire.exchange(method, path, body)
        except Unanswered as error:
            outcome, told = (Outcome.UNKNOWN if error.sent else Outcome.REFUSED), error.told
            if not error.sent:
                told = "refused to connect"
        else:
            outcome, told = Outcome.APPLIED, ""
            if status in (200, 201):
                answer = json.loads(raw)
            elif status != 204:
                told = code_of(raw)
                outcome = Outcome.UNKNOWN if told in ("outcome_unknown", "internal") else Outcome.REFUSED
                told = told if status >= 500 else f"{status} {told}"
        ended_at = trio.current_time()
        self.exchanged.append(Exchanged(kind, sent_at, ended_at, wire.opened_at, told))
        return Attempt(sent_at, ended_at, outcome, told), answer

    async def _until_answered(
        self, wire: Wire, kind: str, path: str, body: Any, attempts: list[Attempt]
    ) -> tuple[Attempt, Any]:
        """Repeat until there is an answer that stands; all attempts but the last go to ``attempts``."""
        while True:
            attempt, answer = await self._attempt(wire, kind, path, body)
            if attempt.outcome is Outcome.APPLIED or attempt.told.startswith("4"):
                return attempt, answer
            attempts.append(attempt)
            await trio.sleep(RETRY_SECONDS)

    async def _produce(self, partition: int) -> None:
        draw = random.Random(f"{self._seed} producer {partition}")
        wire = Wire(self.port)
        interval = BATCH * PARTITIONS / RATE
        due = trio.current_time() + draw.random() * interval
        number = 0
        while not self._stopped.is_set():
            await trio.sleep_until(due)
            due += interval
            numbers = range(number, number + BATCH)
            number += BATCH
            push = Push(items=[(partition, n) for n in numbers])
            self.history.pushes.append(push)
            body = {"items": [self._item(partition, n) for n in numbers]}
            await self._push(wire, push, body)
            self._pushed[partition] = number
            if draw.random() < AGAIN:
                again = Push(items=push.items, again=True)
                self.history.pushes.append(again)
                await self._push(wire, again, body)
        wire.close()
        self._producing -= 1

    async def _push(self, wire: Wire, push: Push, body: Any) -> None:
        attempt, answer = await self._until_answered(wire, "push", "/api/v1/push", body, push.attempts)
        push.attempts.append(attempt)
        if answer is not None:
            push.verdicts = [Verdict(item["status"], item.get("message_id", "")) for item in answer]

    def _item(self, partition: int, number: int) -> dict[str, Any]:
        """Half of the partitions name messages the way that is checked by range, half the way of order numbers."""
        name = str(uuid7()) if partition % 2 else f"order-{partition}-{number}"
        return {
            "queue": QUEUE,
            "partition": f"p{partition}",
            "transactionId": name,
            "payload": payload(partition, number),
        }

    async def _consume(self, group: str, which: int) -> None:
        draw = random.Random(f"{self._seed} consumer {group} {which}")
        wire = Wire(self.port)
        path = f"/api/v1/pop/queue/{QUEUE}?batch={POP}&partitions=4&consumerGroup={group}&wait=true&timeout=1000"
        try:
            while True:
                attempt, answer = await self._attempt(wire, "pop", path, method="GET")
                if answer is None:
                    await trio.sleep(RETRY_SECONDS if attempt.told else 0)
                    continue
                await self._process(wire, draw, group, attempt, answer["messages"])
        finally:
            wire.close()

    async def _process(
        self, wire: Wire, draw: random.Random, group: str, popped: Attempt, messages: list[dict[str, Any]]
    ) -> None:
        runs: list[list[dict[str, Any]]] = []
        for message in messages:
            if runs and runs[-1][0]["data"]["p"] == message["data"]["p"]:
                runs[-1].append(message)
            else:
                runs.append([message])
        acks: list[dict[str, Any]] = []
        settlements: list[Settlement] = []
        for run in runs:
            delivery = Delivery(
                group=group,
                partition=run[0]["data"]["p"],
                lease=run[0]["leaseId"],
                sent_at=popped.sent_at,
                received_at=popped.ended_at,
                numbers=[message["data"]["n"] for message in run],
                ids=[message["id"] for message in run],
                intact=all(message["data"] == payload(message["data"]["p"], message["data"]["n"]) for message in run),
            )
            self._last_news = trio.current_time()
            self.history.deliveries.append(delivery)
            place = len(self.history.deliveries) - 1
            chance = draw.random()
            poison = next((n for n in delivery.numbers if group == CHOOSY and is_poison(n)), None)
            if poison is None and chance < TRANSACTION:
                await self._transact(wire, group, place, run)
                continue
            failed = poison if poison is not None else draw.choice(delivery.numbers) if chance < NACK else None
            settlement = Settlement(
                delivery=place,
                kind=Kind.ACK if failed is None else Kind.NACK,
                completed=[n for n in delivery.numbers if failed is None or n < failed],
                failed=failed,
            )
            settlements.append(settlement)
            acks += [
                acknowledgment(message, failed) for message in run if failed is None or message["data"]["n"] <= failed
            ]
        if settlements:
            await self._settle(wire, group, settlements, acks, messages)

    async def _settle(
        self,
        wire: Wire,
        group: str,
        settlements: list[Settlement],
        acks: list[dict[str, Any]],
        messages: list[dict[str, Any]],
    ) -> None:
        # in the history before they are sent: what is sent may have been applied
        self.history.settlements += settlements
        earlier: list[Attempt] = []
        for settlement in settlements:
            settlement.attempts = earlier  # shared until answered
        body = {"acknowledgments": acks, "consumerGroup": group}
        attempt, answer = await self._until_answered(wire, "ack", "/api/v1/ack/batch", body, earlier)
        at = 0
        for settlement in settlements:
            size = len(settlement.completed) + (settlement.failed is not None)
            verdicts = [] if answer is None else answer[at : at + size]
            at += size
            refused = [verdict["error"] for verdict in verdicts if not verdict["success"]]
            last = attempt
            if refused:
                partial = len(refused) < len(verdicts)
                told = "internal: refused in part" if partial else str(refused[0])
                last = Attempt(attempt.sent_at, attempt.ended_at, Outcome.REFUSED, told)
            settlement.attempts = [*earlier, last]
            if settlement.failed is not None and verdicts and not refused:
                settlement.dead = bool(verdicts[-1]["dlq"])
            self._pass(settlement)
        for settlement in settlements:
            if settlement.dead:
                await self._settle_rest(wire, group, settlement, messages)

    async def _settle_rest(self, wire: Wire, group: str, buried: Settlement, messages: list[dict[str, Any]]) -> None:
        """A dead letter does not end the lease: what came behind it is still ours."""
        delivery = self.history.deliveries[buried.delivery]
        assert buried.failed is not None
        rest = [n for n in delivery.numbers if n > buried.failed]
        if rest:
            settlement = Settlement(delivery=buried.delivery, kind=Kind.ACK, completed=rest)
            mine = [m for m in messages if m["data"]["p"] == delivery.partition and m["data"]["n"] > buried.failed]
            await self._settle(wire, group, [settlement], [acknowledgment(message, None) for message in mine], messages)

    async def _transact(self, wire: Wire, group: str, place: int, run: list[dict[str, Any]]) -> None:
        delivery = self.history.deliveries[place]
        name = str(uuid.uuid4())
        settlement = Settlement(delivery=place, kind=Kind.TRANSACTION, completed=delivery.numbers, sink=name)
        self.history.settlements.append(settlement)
        operations: list[dict[str, Any]] = [
            {"type": "ack", "consumerGroup": group, **acknowledgment(message, None)} for message in run
        ]
        item = {"queue": SINK, "partition": group, "transactionId": name, "payload": {"of": delivery.numbers}}
        operations.append({"type": "push", "items": [item]})
        attempt, answer = await self._until_answered(
            wire, "transaction", "/api/v1/transaction", {"operations": operations}, settlement.attempts
        )
        if answer is not None and not answer["success"]:
            attempt = Attempt(attempt.sent_at, attempt.ended_at, Outcome.REFUSED, str(answer.get("error")))
        settlement.attempts.append(attempt)
        self._pass(settlement)

    def _pass(self, settlement: Settlement) -> None:
        """Note how far a group has come, as far as it can know."""
        self._last_news = trio.current_time()
        if settlement.outcome is Outcome.REFUSED:
            return
        delivery = self.history.deliveries[settlement.delivery]
        lane = (delivery.group, delivery.partition)
        end = max(settlement.completed, default=-1) + 1
        if settlement.dead and settlement.failed is not None:
            end = settlement.failed + 1
        self._passed[lane] = max(self._passed[lane], end)

    async def take_stock(self) -> None:
        """Read what the transactions have pushed and what became dead letters; wants a server that works."""
        wire = Wire(self.port)
        ending = self.history.ending
        while True:
            path = f"/api/v1/pop/queue/{SINK}?batch=1000&partitions=10&autoAck=true&consumerGroup=stock"
            status, raw = await wire.exchange("GET", path)
            if status != 200:
                break
            ending.sink += [message["transactionId"] for message in json.loads(raw)["messages"]]
        for group in GROUPS:
            offset = 0
            while True:
                path = f"/api/v1/dlq?queue={QUEUE}&consumerGroup={group}&limit=1000&offset={offset}"
                _, raw = await wire.exchange("GET", path)
                page = json.loads(raw)["messages"]
                offset += len(page)
                ending.dead += [dead_letter(entry) for entry in page]
                if not page:
                    break
        wire.close()


def acknowledgment(message: dict[str, Any], failed: int | None) -> dict[str, Any]:
    status = "failed" if message["data"]["n"] == failed else "completed"
    return {name: message[name] for name in ("transactionId", "partitionId", "leaseId")} | {"status": status}


def dead_letter(entry: dict[str, Any]) -> DeadLetter:
    partition = int(entry["partition"].removeprefix("p"))
    data = entry["data"] if isinstance(entry["data"], dict) else {}
    number = data.get("n", -1)
    return DeadLetter(entry["consumerGroup"], partition, number, intact=data == payload(partition, number))


def code_of(raw: bytes) -> str:
    """The code of an error."""
    try:
        return str(json.loads(raw)["code"])
    except (ValueError, KeyError, TypeError):
        return f"an error without a code: {raw[:80]!r}"


def uuid7() -> uuid.UUID:
    """A UUIDv7 of now (RFC 9562); Python has one from 3.14 on."""
    value = time.time_ns() // 1_000_000 << 80 | random.getrandbits(80)
    return uuid.UUID(int=value & ~(0xF << 76) & ~(0b11 << 62) | 7 << 76 | 0b10 << 62)


Task = Callable[[], Awaitable[None]]
