"""When a worker is replaced although nothing is wrong with it, and who is buried by the reaper."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import structlog
import trio
import trio.testing

from queen.supervision.limits import Limits
from queen.supervision.reaper import LOOK_SECONDS, find_zombies, run_reaper

MiB = 1024 * 1024


@pytest.mark.parametrize(
    ("limits", "rss_bytes", "age_seconds", "lot", "why"),
    [
        (Limits(), 10**12, 10**9, 0.0, ""),
        (Limits(rss_bytes=100 * MiB), 100 * MiB, 10**9, 0.0, ""),
        (Limits(rss_bytes=100 * MiB), 130 * MiB, 0.0, 0.0, "it holds 130 MiB of 100 that it may"),
        (Limits(age_seconds=1000.0), 10**12, 1000.0, 0.0, ""),
        (Limits(age_seconds=1000.0), 0, 1001.0, 0.0, "it has served for 1001 s of 1000 that it may"),
        (Limits(age_seconds=1000.0), 0, 1099.0, 0.5, ""),
        (Limits(age_seconds=1000.0), 0, 1101.0, 0.5, "it has served for 1101 s of 1000 that it may"),
    ],
)
def test_why_a_worker_is_replaced(limits: Limits, rss_bytes: int, age_seconds: float, lot: float, why: str) -> None:
    assert limits.exceeded(rss_bytes, age_seconds, lot) == why


def start_and_see_dead(script: str) -> subprocess.Popen[bytes]:
    """A child that has ended and was not waited for."""
    child = subprocess.Popen(["/bin/sh", "-c", script])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


async def test_a_zombie_that_nobody_waits_for_is_buried_when_it_is_seen_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    child = start_and_see_dead("true")
    pid = child.pid
    assert pid in find_zombies()

    with structlog.testing.capture_logs() as logged:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_reaper)
            await trio.sleep(LOOK_SECONDS + 1)
            assert pid in find_zombies()
            await trio.sleep(LOOK_SECONDS)
            nursery.cancel_scope.cancel()

    assert pid not in find_zombies()
    assert [line["pid"] for line in logged] == [pid]
    assert child.wait() == 0  # a Popen that finds nobody to wait for says so


async def test_a_child_that_somebody_waits_for_keeps_its_exit_code(autojump_clock: trio.testing.MockClock) -> None:
    child = start_and_see_dead("kill -TERM $$")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_reaper)
        await trio.sleep(LOOK_SECONDS + 1)
        code = child.wait()
        await trio.sleep(LOOK_SECONDS)
        nursery.cancel_scope.cancel()

    assert code == -signal.SIGTERM
