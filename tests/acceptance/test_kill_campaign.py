"""Load over HTTP while processes are killed underneath: nothing acknowledged lost, no order broken.

A small one of what `nox -s campaign` does for hours; and that the ledger which judges it can tell right from wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from .support import PROJECT

sys.path.append(str(PROJECT))  # perf is not installed; last, so that the queen under test stays the one installed

from perf.campaign import AckVerdict, Ledger, Payload

OK, REFUSED = AckVerdict(success=True), AckVerdict(success=False, error="Invalid or expired lease")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "harm",
    [
        ("--worker-every", "1.5"),
        ("--worker-every", "4", "--postgres-every", "5", "--supervisor-every", "7", "--stop-every", "11"),
    ],
    ids=["workers", "everything"],
)
def test_nothing_is_lost_or_reordered_while_processes_are_killed(harm: tuple[str, ...]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "perf.campaign", "--messages", "24000", "--rate", "2000", "--partitions", "60"),
            *(
                "--batch",
                "100",
                "--spread",
                "5",
                "--lease-seconds",
                "4",
                "--seed",
                "1",
                "--limit-seconds",
                "240",
                *harm,
            ),
        ],
        cwd=PROJECT,
        capture_output=True,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["pushed"] == 24_000
    assert counts["workers killed"] > 0
    assert counts["violations"] == 0


def payloads(*numbers: int) -> list[Payload]:
    return [Payload(0, n) for n in numbers]


def pushed(count: int = 10) -> Ledger:
    ledger = Ledger(1, lease_seconds=10)
    ledger.sending(0, count)
    ledger.pushed(0, count)
    return ledger


def deliver_and_ack(ledger: Ledger, *numbers: int, now: float = 0.0) -> None:
    (run,) = ledger.delivered(payloads(*numbers), ledger.event, now, now)
    ledger.settling(run, ack=True)
    ledger.acked(run, [OK] * len(numbers), retried=False, now=now)


def test_the_ledger_has_nothing_to_say_of_a_campaign_that_went_well() -> None:
    ledger = pushed(10)
    deliver_and_ack(ledger, 0, 1, 2)
    (run,) = ledger.delivered(payloads(3, 4), ledger.event, 1.0, 1.0)
    ledger.settling(run, ack=False)  # nacked: comes again at once
    deliver_and_ack(ledger, 3, 4, 5, now=1.1)
    ledger.delivered(payloads(6, 7), ledger.event, 2.0, 2.0)  # never acked: comes again after its lease
    deliver_and_ack(ledger, 6, 7, 8, 9, now=12.0)
    ledger.close(10)

    assert ledger.drained
    assert ledger.violations == []
    assert ledger.counts["redelivered"] == 4


def lose(ledger: Ledger) -> None:
    deliver_and_ack(ledger, 0, 1)
    ledger.close(10)


def skip(ledger: Ledger) -> None:
    deliver_and_ack(ledger, 0, 1)
    deliver_and_ack(ledger, 3, 4)


def leave_a_gap(ledger: Ledger) -> None:
    ledger.delivered(payloads(0, 1, 3), 0, 0.0, 0.0)


def swap(ledger: Ledger) -> None:
    ledger.delivered(payloads(1, 0), 0, 0.0, 0.0)


def store_twice(ledger: Ledger) -> None:
    ledger.delivered(payloads(0, 1, 1, 2), 0, 0.0, 0.0)


def deliver_again_after_an_ack(ledger: Ledger) -> None:
    deliver_and_ack(ledger, 0, 1)
    ledger.delivered(payloads(1, 2), ledger.event, 1.0, 1.0)


def deliver_to_two_at_once(ledger: Ledger) -> None:
    ledger.delivered(payloads(0, 1), 0, 0.0, 0.0)
    ledger.delivered(payloads(0, 1), 0, 5.0, 5.0)


def invent(ledger: Ledger) -> None:
    ledger.delivered(payloads(*range(11)), 0, 0.0, 0.0)


def refuse_an_ack_in_time(ledger: Ledger) -> None:
    (run,) = ledger.delivered(payloads(0), 0, 0.0, 0.0)
    ledger.settling(run, ack=True)
    ledger.acked(run, [REFUSED], retried=False, now=5.0)


@pytest.mark.parametrize(
    "crime",
    [
        lose,
        skip,
        leave_a_gap,
        swap,
        store_twice,
        deliver_again_after_an_ack,
        deliver_to_two_at_once,
        invent,
        refuse_an_ack_in_time,
    ],
)
def test_the_ledger_tells_of(crime: Callable[[Ledger], None]) -> None:
    ledger = pushed(10)

    crime(ledger)

    assert ledger.violations


def test_the_ledger_forgives_a_delivery_of_a_pop_that_was_sent_before_the_ack_was_answered() -> None:
    ledger = pushed(10)
    (run,) = ledger.delivered(payloads(0, 1), 0, 0.0, 0.0)
    ledger.settling(run, ack=True)  # on its way, and then the worker is killed: applied or not, unknown
    sent_before = ledger.event
    (again,) = ledger.delivered(payloads(0, 1), sent_before, 11.0, 11.0)
    ledger.acked(run, [REFUSED, REFUSED], retried=True, now=11.1)
    ledger.settling(again, ack=True)
    ledger.acked(again, [OK, OK], retried=False, now=11.2)

    assert ledger.violations == []
