"""Priority among queues, and the bound on how long it may starve one."""

from __future__ import annotations

from uuid import UUID

from queen.engine.turns import FAIR_TURN, Turns
from queen.model.message import PopRequest
from queen.model.queue import Queue, QueueOptions


def queue(name: str, priority: int) -> Queue:
    options = QueueOptions(priority=priority)
    return Queue(queue_id=UUID(int=priority), name=name, namespace="n", task="", options=options, version=1)


QUEUES = [queue("low", 1), queue("high", 9), queue("idle", 99)]
WAITED = {0: -60.0, 1: -1.0}  # seconds; the third has nothing
REQUEST = PopRequest(namespace="n")


def names(turns: Turns, request: PopRequest = REQUEST) -> list[str]:
    return [found.name for found in turns.order(request, QUEUES, WAITED)]


def test_what_is_ready_comes_first_and_among_that_the_higher_priority() -> None:
    assert names(Turns()) == ["high", "low", "idle"]


def test_of_one_priority_the_longest_wait_comes_first() -> None:
    equals = [queue("late", 5), queue("later", 5)]

    assert [found.name for found in Turns().order(REQUEST, equals, {0: -1.0, 1: -2.0})] == ["later", "late"]


def test_every_32nd_batch_goes_to_who_has_waited_longest() -> None:
    turns = Turns()
    first = []
    for _ in range(3 * FAIR_TURN):
        first.append(names(turns)[0])
        turns.served(REQUEST)

    assert FAIR_TURN == 32
    assert first == (["high"] * (FAIR_TURN - 1) + ["low"]) * 3


def test_a_look_that_finds_nothing_takes_no_turn() -> None:
    turns = Turns()
    for _ in range(FAIR_TURN - 1):
        turns.served(REQUEST)

    assert [names(turns)[0] for _ in range(3)] == ["low"] * 3


def test_groups_and_labels_have_turns_of_their_own() -> None:
    turns = Turns()
    for _ in range(FAIR_TURN - 1):
        turns.served(REQUEST)

    assert names(turns)[0] == "low"
    assert names(turns, PopRequest(namespace="n", group="g"))[0] == "high"
    assert names(turns, PopRequest(namespace="n", task="t"))[0] == "high"
