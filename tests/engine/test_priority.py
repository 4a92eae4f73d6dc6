"""Several queues in one pop: by priority, and none starves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from queen.engine.turns import FAIR_TURN

if TYPE_CHECKING:
    from tests.conftest import Broker

pytestmark = pytest.mark.buckets


async def test_the_higher_priority_is_served_first(broker: Broker) -> None:
    for priority in (1, 10, 5):
        await broker.configure(f"q{priority}", "n", "t", priority=priority)
        await broker.push(f"q{priority}", priority)

    assert [(await broker.pop(namespace="n")).data for _ in range(4)] == [[10], [5], [1], []]


async def test_a_queue_that_is_always_outranked_is_served_within_the_bound(broker: Broker) -> None:
    await broker.configure("low", "n", priority=1)
    await broker.configure("high", "n", priority=9)
    for at in range(3):
        await broker.push("low", f"low {at}")
    served = []

    for _ in range(3 * FAIR_TURN):
        await broker.push("high", "high")
        await broker.push("high", "high")  # there is always more than one pop takes
        popped = await broker.pop(namespace="n", batch=1, auto_ack=True)
        served += popped.data

    turns = [at for at, value in enumerate(served) if value != "high"]
    assert [served[at] for at in turns] == ["low 0", "low 1", "low 2"]
    assert turns == [FAIR_TURN - 1, 2 * FAIR_TURN - 1, 3 * FAIR_TURN - 1]


async def test_priority_means_nothing_inside_one_queue(broker: Broker) -> None:
    await broker.configure("q", priority=5)
    for at in range(2 * FAIR_TURN):
        await broker.push("q", at)

    assert [(await broker.pop("q", batch=1, auto_ack=True)).data[0] for _ in range(2 * FAIR_TURN)] == list(
        range(2 * FAIR_TURN)
    )
