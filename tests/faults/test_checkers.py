"""Every checker has nothing to say of a run that went well, and finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .checkers import CHECKERS, judge
from .history import (
    Attempt,
    DeadLetter,
    Delivery,
    Ending,
    History,
    Kind,
    Outcome,
    Push,
    Resources,
    Settlement,
    Verdict,
)

HELD = Resources(
    processes=3, supervisor_descriptors=20, worker_descriptors=80, database_connections=20, rss_bytes=200 << 20
)


def push(at: float, *numbers: int, status: str = "queued", again: bool = False) -> Push:
    return Push(
        items=[(0, n) for n in numbers],
        attempts=[Attempt(at, at + 0.1, Outcome.APPLIED)],
        verdicts=[Verdict(status, f"id-{n:04}") for n in numbers],
        again=again,
    )


def deliver(history: History, at: float, *numbers: int, lease: str | None = None) -> int:
    history.deliveries.append(
        Delivery(
            group="g",
            partition=0,
            lease=lease or f"lease-{len(history.deliveries)}",
            sent_at=at,
            received_at=at + 0.1,
            numbers=list(numbers),
            ids=[f"id-{n:04}" for n in numbers],
        )
    )
    return len(history.deliveries) - 1


def settle(history: History, place: int, at: float, *, failed: int | None = None, dead: bool = False) -> Settlement:
    numbers = history.deliveries[place].numbers
    made = Settlement(
        delivery=place,
        kind=Kind.ACK if failed is None else Kind.NACK,
        completed=[n for n in numbers if failed is None or n < failed],
        failed=failed,
        attempts=[Attempt(at, at + 0.1, Outcome.APPLIED)],
        dead=dead,
    )
    history.settlements.append(made)
    return made


def good() -> History:
    """Of ten: three acked, one failed twice and dead, three in a transaction, three after a lease that ran out."""
    history = History(lease_seconds=5.0, groups=["g"], partitions=1)
    history.pushes += [push(0.0, *range(5)), push(0.2, *range(5, 10)), push(0.4, 1, status="duplicate", again=True)]
    settle(history, deliver(history, 1.0, 0, 1, 2), 1.2)
    settle(history, deliver(history, 1.4, 3, 4), 1.6, failed=3)
    settle(history, deliver(history, 1.8, 3, 4), 2.0, failed=3, dead=True)
    transaction = settle(history, deliver(history, 2.2, 4, 5, 6), 2.4)
    transaction.kind, transaction.sink = Kind.TRANSACTION, "t1"
    deliver(history, 2.6, 7, 8)
    settle(history, deliver(history, 7.7, 7, 8, 9), 7.9)
    history.ending = Ending(
        sink=["t1"],
        dead=[DeadLetter("g", 0, 3, intact=True)],
        drain_seconds=1.0,
        drain_limit_seconds=5.0,
        before=HELD,
        after=HELD,
    )
    return history


def test_nothing_is_said_of_a_run_that_went_well() -> None:
    assert judge(good()) == []


def lose_a_push(history: History) -> None:
    history.pushes.append(push(0.5, 10))


def damage_a_payload(history: History) -> None:
    history.deliveries[0].intact = False


def deliver_after_an_ack(history: History) -> None:
    settle(history, deliver(history, 9.0, 9), 9.2)


def ack_under_two_leases(history: History) -> None:
    settle(history, deliver(history, 1.15, 2), 1.35)


def skip(history: History) -> None:
    history.deliveries[0].numbers = [1, 2, 3]


def leave_a_gap(history: History) -> None:
    history.deliveries[0].numbers = [0, 1, 3]


def mix_up_ids(history: History) -> None:
    history.deliveries[0].ids.reverse()


def share_a_lease(history: History) -> None:
    history.deliveries[-1].sent_at, history.deliveries[-1].received_at = 3.0, 3.1


def refuse_an_ack_in_time(history: History) -> None:
    history.settlements[0].attempts = [Attempt(1.2, 1.3, Outcome.REFUSED, "Invalid or expired lease")]


def take_an_ack_of_an_ended_lease(history: History) -> None:
    settle(history, 4, 8.5)


def lose_the_push_of_a_transaction(history: History) -> None:
    history.ending.sink = []


def store_it_twice(history: History) -> None:
    history.ending.sink = ["t1", "t1"]


def keep_the_push_of_a_refused_transaction(history: History) -> None:
    history.settlements[3].attempts = [Attempt(2.4, 2.5, Outcome.REFUSED, "ACK operation failed")]


def lose_the_ack_of_a_transaction(history: History) -> None:
    history.settlements[3].attempts = [Attempt(2.4, 2.5, Outcome.UNKNOWN, "reset")]
    deliver(history, 20.0, 4, 5, 6)


def push_out_of_nowhere(history: History) -> None:
    history.ending.sink.append("t2")


def store_a_repeated_push(history: History) -> None:
    history.pushes[2].verdicts = [Verdict("queued", "id-0001")]


def give_it_another_id(history: History) -> None:
    history.pushes[2].verdicts = [Verdict("duplicate", "id-9999")]


def deliver_it_under_another_id(history: History) -> None:
    history.deliveries[-1].ids[0] = "id-0000-again"


def lose_a_dead_letter(history: History) -> None:
    history.ending.dead = []


def lose_what_failed(history: History) -> None:
    history.ending.dead, history.settlements[2].dead = [], False


def bury_twice(history: History) -> None:
    history.ending.dead *= 2


def bury_the_living(history: History) -> None:
    history.ending.dead.append(DeadLetter("g", 0, 8, intact=True))


def bury_without_its_payload(history: History) -> None:
    history.ending.dead = [DeadLetter("g", 0, 3, intact=False)]


def bury_what_was_completed(history: History) -> None:
    history.settlements[2].dead = False
    settle(history, deliver(history, 2.1, 3), 2.15)


def never_drain(history: History) -> None:
    history.ending.drain_seconds = None


def drain_late(history: History) -> None:
    history.ending.drain_seconds = 6.0


def leak(history: History, **more: int) -> None:
    held = {name: getattr(HELD, name) for name in HELD.__struct_fields__}
    history.ending.after = Resources(**held | more)


def leak_a_process(history: History) -> None:
    leak(history, processes=4)


def leak_descriptors(history: History) -> None:
    leak(history, supervisor_descriptors=30)


def leak_descriptors_of_workers(history: History) -> None:
    leak(history, worker_descriptors=100)


def leak_connections(history: History) -> None:
    leak(history, database_connections=30)


def leak_memory(history: History) -> None:
    leak(history, rss_bytes=400 << 20)


def not_look(history: History) -> None:
    history.ending.after = None


def apply_what_was_refused(history: History) -> None:
    history.pushes[0].attempts.insert(0, Attempt(0.0, 0.0, Outcome.REFUSED, "draining"))
    history.pushes[0].verdicts = [Verdict("duplicate", f"id-{n:04}") for n in range(5)]


def find_a_first_push_stored(history: History) -> None:
    history.pushes[0].verdicts = [Verdict("duplicate", f"id-{n:04}") for n in range(5)]


def store_a_part(history: History) -> None:
    assert history.pushes[0].verdicts is not None
    history.pushes[0].attempts.insert(0, Attempt(0.0, 0.0, Outcome.UNKNOWN, "reset"))
    history.pushes[0].verdicts[0] = Verdict("duplicate", "id-0000")


def answer_400(history: History) -> None:
    history.pushes[0].attempts.insert(0, Attempt(0.0, 0.0, Outcome.REFUSED, "400 invalid_request"))


def answer_500(history: History) -> None:
    history.settlements[0].attempts.insert(0, Attempt(1.2, 1.2, Outcome.UNKNOWN, "internal"))


def lie(history: History) -> None:
    history.ending.status_lies.append("slot 0 is said to be process 7, which does not run")


CRIMES: list[tuple[str, Callable[[History], None]]] = [
    ("I1", lose_a_push),
    ("I1", damage_a_payload),
    ("I2", deliver_after_an_ack),
    ("I2", ack_under_two_leases),
    ("I3", skip),
    ("I3", leave_a_gap),
    ("I3", mix_up_ids),
    ("I4", share_a_lease),
    ("I4", refuse_an_ack_in_time),
    ("I4", take_an_ack_of_an_ended_lease),
    ("I5", lose_the_push_of_a_transaction),
    ("I5", store_it_twice),
    ("I5", keep_the_push_of_a_refused_transaction),
    ("I5", lose_the_ack_of_a_transaction),
    ("I5", push_out_of_nowhere),
    ("I6", store_a_repeated_push),
    ("I6", give_it_another_id),
    ("I6", deliver_it_under_another_id),
    ("I7", lose_a_dead_letter),
    ("I7", lose_what_failed),
    ("I7", bury_twice),
    ("I7", bury_the_living),
    ("I7", bury_without_its_payload),
    ("I7", bury_what_was_completed),
    ("I8", never_drain),
    ("I8", drain_late),
    ("I9", leak_a_process),
    ("I9", leak_descriptors),
    ("I9", leak_descriptors_of_workers),
    ("I9", leak_connections),
    ("I9", leak_memory),
    ("I9", not_look),
    ("I10", apply_what_was_refused),
    ("I10", find_a_first_push_stored),
    ("I10", store_a_part),
    ("I10", answer_400),
    ("I10", answer_500),
    ("I11", lie),
]


@pytest.mark.parametrize(("invariant", "crime"), CRIMES, ids=lambda value: getattr(value, "__name__", value))
def test_each_checker_finds_its_crime(invariant: str, crime: Callable[[History], None]) -> None:
    history = good()

    crime(history)

    assert list(CHECKERS[invariant](history))


def test_no_checker_is_without_a_crime() -> None:
    assert {invariant for invariant, _ in CRIMES} == CHECKERS.keys()


def test_a_refusal_after_an_attempt_without_an_answer_says_nothing() -> None:
    history = good()
    history.settlements[0].attempts = [
        Attempt(1.2, 1.25, Outcome.UNKNOWN, "reset"),
        Attempt(1.26, 1.3, Outcome.REFUSED, "Invalid or expired lease"),
    ]

    assert history.settlements[0].outcome is Outcome.UNKNOWN
    assert judge(history) == []
