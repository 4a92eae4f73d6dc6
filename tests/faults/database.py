"""Faults of PostgreSQL and of the way to it: restarted, its backends ended, a reply to COMMIT lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio

from queen.storage import embedded
from tests.acceptance.support import kill

from . import processes
from .proxy import Proxy
from .stage import Stage

KILLS_A_SECOND = 5.0


async def restart_postgres(stage: Stage) -> None:
    """F10: PostgreSQL is stopped fast and immediately in turn, underneath."""
    back: list[float] = []
    end = stage.began + stage.timing.fault
    for turn in range(100):
        number = (signal.SIGINT, signal.SIGQUIT)[turn % 2]
        postmaster = stage.server.postgres_pid
        os.kill(postmaster, number)
        await stage.gone([postmaster], 10.0)
        began = trio.current_time()
        while not await stage.answers():  # noqa: ASYNC110  # another process raises no event
            await trio.sleep(0.02)
        back.append(trio.current_time() - began)
        await trio.sleep(3.0)
        if trio.current_time() + 2 > end:
            break
    stage.figure("answers again, s", back, limit=5.0)
    wrong = [told for told in stage.failures(stage.began) if "internal" in told or ": 4" in told]
    stage.expect(not wrong, f"answers that do not say what is wrong: {sorted(set(wrong))}")


async def kill_backends(stage: Stage) -> None:
    """F11: five times a second, the connection of a worker to PostgreSQL is ended by PostgreSQL."""
    calm = len(stage.seen(stage.began - stage.timing.before, stage.began, kind="push")) / stage.timing.before
    killed = 0
    due = trio.current_time()
    while trio.current_time() < stage.began + stage.timing.fault:
        if backends := processes.backends_of(stage.server.postgres_pid):
            kill(stage.draw.choice(backends), signal.SIGTERM)  # what pg_terminate_backend() sends
            killed += 1
        due += 1 / KILLS_A_SECOND
        await trio.sleep_until(due)
    pushed = [one for one in stage.seen(stage.began, kind="push") if not one.told]
    rate = len(pushed) / (trio.current_time() - stage.began)
    stage.figure("backends killed", killed)
    stage.figure("throughput, % of calm", 100 * rate / calm, limit=70.0, at_least=True)
    stage.figure("failed requests", len(stage.failures(stage.began)))


async def lose_commit_replies(stage: Stage) -> None:
    """F12: PostgreSQL commits and says so, and the worker never hears: a repeat finds the first."""
    proxy = stage.proxy
    assert proxy is not None
    lost_before = proxy.replies_lost
    half = stage.timing.fault / 2
    proxy.lose_replies(b"COMMIT", 0.15)
    await trio.sleep(half)
    proxy.lose_replies(b"", 0.02)  # any request: what is one statement commits by itself
    await trio.sleep(half)
    proxy.heal()
    stage.figure("replies lost", proxy.replies_lost - lost_before, limit=10.0, at_least=True)
    told = stage.failures(stage.began)
    stage.figure("answered outcome_unknown", sum("outcome_unknown" in one for one in told))
    found = [
        push
        for push in stage.load.history.pushes
        if push.verdicts and not push.again and any(verdict.status == "duplicate" for verdict in push.verdicts)
    ]
    stage.figure("repeats that found the first", len(found))


@asynccontextmanager
async def open_foreign(stage: Stage) -> AsyncIterator[None]:
    """A PostgreSQL of our own, which the server reaches through a proxy: ``stage.proxy``."""
    hurry = trio.Event()
    async with embedded.open_cluster(stage.home) as cluster, trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                trio.run_process,
                cluster.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
                deliver_cancel=partial(embedded.stop_server, hurry=hurry),
                **cluster.popen_options(),
            )
        )
        path = cluster.socket_directory / f".s.PGSQL.{embedded.PORT}"
        await stage.until(path.exists, 10.0)
        proxy = Proxy(partial(trio.open_unix_socket, str(path)), stage.seed)
        await nursery.start(proxy.run)
        stage.proxy = proxy
        stage.needs = msgspec.structs.replace(
            stage.needs,
            flags=(
                *stage.needs.flags,
                *("--database-url", f"postgresql://queen@127.0.0.1:{proxy.port}/postgres"),
                *("--control-socket", str(stage.home / "control.sock")),
            ),
        )
        yield
        nursery.cancel_scope.cancel()
