"""Faults of the supervisor and of its operator: killed, stopped, told to reload, to become code that is broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket

import trio

from perf.polite import Wire
from tests.acceptance.support import PROJECT, is_alive, is_free, kill

from . import processes
from .stage import Stage

GRACE_SECONDS = 5.0
PARKED = 1000
STREAMS = 100
STALLED = 20  # of the streams: their clients read nothing
MESSAGE_BYTES = 256 << 10
STREAM_MESSAGES = 8  # 2 MiB: more than what the kernel's buffers take, and what slow clients can read in time
READ_BYTES = 64 << 10
RELOADS = 10


async def kill_the_supervisor(stage: Stage) -> None:
    """F2: kill -9; what it leaves, and how soon the next one serves."""
    gone_in: list[float] = []
    again_in: list[float] = []
    end = stage.began + stage.timing.fault
    while True:
        family = processes.family_of(stage.pid)
        workers = processes.worker_pids(stage.pid)
        await trio.sleep(stage.draw.random() * 0.5)
        os.kill(stage.pid, signal.SIGKILL)
        gone = await stage.gone(workers, 5.0)
        gone_in.append(gone if gone is not None else 99.0)
        stage.server.process.wait()
        stage.expect(is_free(stage.port), "the port is not free after the workers are gone")
        again_in.append(await stage.start())
        postmaster = stage.server.postgres_pid
        orphans = [pid for pid in family if is_alive(pid) and pid not in (postmaster, *processes.family_of(postmaster))]
        stage.expect(not orphans, f"orphans: {orphans}")
        stage.expect(postmaster in processes.family_of(stage.pid), "PostgreSQL is not the new supervisor's")
        await stage.whole()
        if trio.current_time() + 4 > end:
            break
        await trio.sleep(4)
    stage.figure("workers gone, s", gone_in, limit=1.0)
    stage.figure("serves again, s", again_in, limit=2.0)


async def freeze_the_supervisor(stage: Stage) -> None:
    """F4: SIGSTOP for 30 s: nobody notices; after SIGCONT nobody is killed for having been silent."""
    calm_ms = stage.p99_ms(stage.began - stage.timing.before, stage.began)
    workers = sorted(processes.worker_pids(stage.pid))
    os.kill(stage.pid, signal.SIGSTOP)
    await trio.sleep(max(15.0, stage.timing.fault))  # more than the silence that a worker would be killed for
    went_on_at = trio.current_time()
    os.kill(stage.pid, signal.SIGCONT)
    await trio.sleep(4.0)
    stage.expect(sorted(processes.worker_pids(stage.pid)) == workers, "workers were replaced when it went on")
    failed = stage.failures(stage.began)
    stage.figure("failed requests", len(failed), limit=0)
    stage.notes += sorted(set(failed))[:3]
    stage.figure("p99 calm, ms", calm_ms)
    stage.figure("p99 while stopped, ms", stage.p99_ms(stage.began, went_on_at), limit=2 * max(calm_ms, 25.0))


async def reload_ten_times(stage: Stage) -> None:
    """F8: SIGHUP ten times under load: every worker is another one, and no request failed."""
    calm_ms = stage.p99_ms(stage.began - stage.timing.before, stage.began)
    took: list[float] = []
    for _ in range(RELOADS):
        before = set(stage.workers())
        began = trio.current_time()
        os.kill(stage.pid, signal.SIGHUP)

        def replaced(before: set[int] = before) -> bool:
            now = set(stage.workers())
            return len(now) == stage.needs.workers and not now & before

        if not await stage.until(replaced, 30.0):
            stage.wrong("a reload left old workers after 30 s")
            break
        took.append(trio.current_time() - began)
        await trio.sleep(stage.draw.random())
    await stage.whole()
    await trio.sleep(1.0)
    failed = stage.failures(stage.began)
    stage.figure("failed requests", len(failed), limit=0)
    stage.notes += sorted(set(failed))[:4]
    stage.figure("a reload, s", took)
    stage.figure("p99 calm, ms", calm_ms)
    stage.figure("p99 more than calm, ms", stage.p99_ms(stage.began) - calm_ms, limit=50.0)


def copy_the_code(stage: Stage) -> None:
    """Have the server run from a copy of the package, which can be broken."""
    shutil.copytree(PROJECT / "queen", stage.scratch / "code" / "queen")
    stage.python_path = (stage.scratch / "code",)


async def upgrade_to_broken_code(stage: Stage) -> None:
    """F9: new code that cannot be read, by workers (SIGHUP) or by the supervisor (SIGUSR2): the old serves on."""
    code = stage.scratch / "code" / "queen"
    for number, part, name in (
        (signal.SIGHUP, code / "worker" / "app.py", "a reload"),
        (signal.SIGUSR2, code / "supervisor.py", "an upgrade"),
    ):
        sound = part.read_text()
        workers = sorted(stage.workers())
        part.write_text(sound + "\ndef broken(:\n")
        stage.mark_log()
        os.kill(stage.pid, number)
        await trio.sleep(8.0)
        stage.expect(is_alive(stage.pid), f"{name} to broken code has ended the supervisor")
        stage.expect(sorted(stage.workers()) == workers, f"{name} to broken code has replaced workers")
        stage.expect("SyntaxError" in stage.new_log, f"the log does not say why {name} failed")
        part.write_text(sound)
        await stage.whole()
    failed = stage.failures(stage.began)
    stage.figure("failed requests", len(failed), limit=0)
    stage.notes += sorted(set(failed))[:4]


async def upgrade_to_sound_code(stage: Stage) -> None:
    """The other half of F9: SIGUSR2 with code that works: other processes, the same data, and no request failed."""
    workers = set(stage.workers())
    began = trio.current_time()
    os.kill(stage.pid, signal.SIGUSR2)

    def replaced() -> bool:
        now = set(stage.workers())
        return len(now) == stage.needs.workers and not now & workers

    if await stage.until(replaced, 40.0):
        stage.figure("upgraded, s", trio.current_time() - began)
    else:
        stage.wrong("40 s after an upgrade the old workers are there")
    await stage.whole()
    failed = stage.failures(stage.began)
    stage.figure("failed requests", len(failed), limit=0)
    stage.notes += sorted(set(failed))[:4]


async def stop_with_parked_polls_and_streams(stage: Stage) -> None:
    """F7: SIGTERM with 1,000 parked polls and 100 streams, some of whose clients read nothing; then a new start."""
    await stage.start()
    wire = Wire(stage.port)
    text = "x" * MESSAGE_BYTES
    for queue, seconds in (("wide", 300), ("empty", 300)):
        await wire.exchange("POST", "/api/v1/configure", {"queue": queue, "options": {"leaseTime": seconds}})
    for number in range(STREAM_MESSAGES):
        item = {"queue": "wide", "payload": {"n": number, "text": text}}
        status, _ = await wire.exchange("POST", "/api/v1/push", {"items": [item]})
        assert status == 201
    wire.close()
    await stage.whole()
    ends: dict[str, int] = {}
    late: list[float] = []
    streaming = trio.Event()
    told = trio.Event()
    begun = 0

    async def park() -> None:
        waiting = Wire(stage.port, answer_seconds=60.0)
        try:
            status, _ = await waiting.exchange("GET", "/api/v1/pop/queue/empty?wait=true&timeout=60000")
            end = f"poll {status}"
        except Exception as error:  # noqa: BLE001  # any end is counted
            end = f"poll {error}"
        waiting.close()
        late.append(trio.current_time())
        ends[end] = ends.get(end, 0) + 1

    async def read_stream(group: str, stalled: bool) -> None:
        nonlocal begun
        path = f"/api/v1/pop/queue/wide?batch={STREAM_MESSAGES}&consumerGroup={group}"
        head = f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()
        connecting = trio.socket.socket()
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
        await connecting.connect(("127.0.0.1", stage.port))
        received = bytearray()
        async with trio.SocketStream(connecting) as stream:
            try:
                await stream.send_all(head)
                received += await stream.receive_some(READ_BYTES)
                begun += 1
                if begun == STREAMS:
                    streaming.set()
                await told.wait()
                if stalled:
                    await trio.sleep(GRACE_SECONDS + 3.0)
                while chunk := await stream.receive_some(READ_BYTES):
                    received += chunk
                    if received.endswith(b"0\r\n\r\n"):
                        break
                    await trio.sleep(0.01)
            except trio.BrokenResourceError:
                pass
        whole = received.endswith(b"0\r\n\r\n")
        kind = "stalled stream" if stalled else "stream"
        end = f"{kind} {'whole' if whole else 'cut'} {bytes(received[9:12]).decode()}"
        if not stalled:
            late.append(trio.current_time())
        ends[end] = ends.get(end, 0) + 1

    async with trio.open_nursery() as clients:
        for _ in range(PARKED):
            clients.start_soon(park)
        for number in range(STREAMS):
            clients.start_soon(read_stream, f"g{number}", number < STALLED)
        await streaming.wait()
        await trio.sleep(1.5)
        family = processes.family_of(stage.pid)
        told.set()
        began = trio.current_time()
        kill(stage.pid, signal.SIGTERM)
        await stage.until(lambda: stage.server.process.poll() is not None, 60.0)
        took = trio.current_time() - began
    stage.notes.append(json.dumps(ends))
    stage.figure("exit, s", took, limit=GRACE_SECONDS + 0.1)
    stage.figure("last clean end, s", max(late, default=began) - began, limit=GRACE_SECONDS)
    stage.expect(ends.get("poll 204") == PARKED, f"parked polls ended {ends}")
    stage.expect(ends.get("stream whole 200") == STREAMS - STALLED, f"streams ended {ends}")
    stage.expect(not [end for end in ends if " 5" in end], f"5xx: {ends}")
    left = [pid for pid in family if is_alive(pid)]
    stage.expect(not left, f"processes left: {left}")
    stage.expect(stage.server.process.returncode == 0, f"exit code {stage.server.process.returncode}")

    await stage.start()
    # A poll that ended with nothing holds nothing; an answer that was cut keeps its lease to the end, as documented.
    wire = Wire(stage.port)
    await wire.exchange("POST", "/api/v1/push", {"items": [{"queue": "empty", "payload": 1}]})
    status, raw = await wire.exchange("GET", "/api/v1/pop/queue/empty")
    stage.expect(status == 200, "a parked poll has kept a lease")
    if status == 200:
        stage.expect(json.loads(raw)["messages"][0]["deliveryAttempt"] == 1, "a parked poll counts as a delivery")
    held = 0
    for number in range(STALLED):
        status, raw = await wire.exchange("GET", f"/api/v1/pop/queue/wide?batch=1&consumerGroup=g{number}")
        held += status != 200
    wire.close()
    stage.figure("leases kept by answers that were cut", held)
    await stage.stop()
