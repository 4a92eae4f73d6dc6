"""Faults of workers: killed, stopped, stuck, dying at boot, out of memory, out of descriptors."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from perf.polite import Unanswered, Wire
from tests.acceptance.support import is_alive, kill

from . import faulty_app, processes
from .stage import Stage

FAULTY = ("--app", "tests.faults.faulty_app:create_app")
HANG_SECONDS = 6.0
HANGS = {"QUEEN_HANG_SECONDS": str(int(HANG_SECONDS))}
WARM_SECONDS, COLD_SECONDS = 0.3, 1.5
CALM_MS = 25.0  # below this a p99 is the machine's, not the fault's


async def kill_workers(stage: Stage) -> None:
    """F1: kill -9 of a random slot every 3 s."""
    warm: list[float] = []
    cold: list[float] = []  # no spare was ready yet
    calm_ms = stage.p99_ms(stage.began - stage.timing.before, stage.began)
    others: list[float] = []
    end = stage.began + stage.timing.fault
    while trio.current_time() < end:
        killed_at = trio.current_time()
        if workers := stage.workers():
            kind = cold if stage.spare() is None else warm
            os.kill(stage.draw.choice(workers), signal.SIGKILL)
            kind.append(await stage.capacity_back())
        await trio.sleep_until(killed_at + 3.0)
        others.append(stage.p99_ms(killed_at, killed_at + 3.0, settled_before=killed_at))
    stage.figure("capacity back with a spare, s", warm, limit=WARM_SECONDS)
    stage.figure("capacity back without one, s", cold, limit=COLD_SECONDS)
    stage.figure("p99 calm, ms", calm_ms)
    stage.figure("p99 of the other slot, ms", others, limit=2 * max(calm_ms, CALM_MS))


async def freeze_a_worker(stage: Stage) -> None:
    """F3: SIGSTOP past a lease, then SIGCONT: what it still says is fenced. Then SIGSTOP for good: it is replaced."""
    victim = stage.draw.choice(stage.workers())
    probe = await hold_a_message(stage, victim)
    await trio.sleep(0.2)
    os.kill(victim, signal.SIGSTOP)
    stopped_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        answers: list[bytes] = []

        async def ack_late() -> None:
            """Into the stopped worker's socket: it reads this when it goes on."""
            status, answer = await probe.wire.exchange("POST", "/api/v1/ack", probe.ack)
            stage.expect(status in (200, 409), f"a late ack was answered {status}")
            answers.append(answer)

        nursery.start_soon(ack_late)
        taken = await probe.pop_elsewhere(stage, stage.needs.lease_seconds + 3)
        stage.figure("redelivered after, s", trio.current_time() - stopped_at)
        stage.expect(taken, "what a stopped worker had under a lease was not delivered again when it ended")
        if not is_alive(victim):
            stage.wrong(f"a worker stopped for {trio.current_time() - stopped_at:.1f} s was killed already")
        kill(victim, signal.SIGCONT)
    stage.expect(
        answers and b'"success":false' in answers[0].replace(b" ", b""),
        f"an ack under an ended lease was taken: {answers}",
    )
    await trio.sleep(1.0)
    stage.expect(is_alive(victim), "a worker that went on in time was killed")

    victim = stage.draw.choice(stage.workers())
    os.kill(victim, signal.SIGSTOP)
    gone = await stage.gone([victim], HANG_SECONDS + 10)
    stage.expect(gone is not None, "a stopped worker was never replaced")
    stage.figure("noticed and killed, s", gone or 99.0, limit=HANG_SECONDS + 2)
    stage.figure("capacity back after it, s", await stage.capacity_back(), limit=WARM_SECONDS)
    kill(victim, signal.SIGCONT)


class Probe:
    """A message under a lease that was taken over a connection to one certain worker."""

    def __init__(self, wire: Wire, message: dict[str, Any]) -> None:
        self.wire = wire
        self.ack = {name: message[name] for name in ("transactionId", "partitionId", "leaseId")}
        self.ack["consumerGroup"] = "probe"

    async def pop_elsewhere(self, stage: Stage, seconds: float) -> bool:
        """Take it again over a worker that runs."""
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            wire = Wire(stage.port, answer_seconds=0.5)
            try:
                status, _ = await wire.exchange("GET", "/api/v1/pop/queue/probe?consumerGroup=probe")
                if status == 200:
                    return True
            except Unanswered:
                pass  # it fell to the stopped one
            finally:
                wire.close()
            await trio.sleep(0.1)
        return False


async def hold_a_message(stage: Stage, worker: int) -> Probe:
    """Take a message from the queue ``probe`` over that worker."""
    wire = Wire(stage.port)
    options = {"leaseTime": round(stage.needs.lease_seconds)}
    await wire.exchange("POST", "/api/v1/configure", {"queue": "probe", "options": options})
    await wire.exchange("POST", "/api/v1/push", {"items": [{"queue": "probe", "payload": 1}]})
    while processes.owner_of(wire.local_port, stage.port, stage.workers()) != worker:
        wire.close()
        wire = Wire(stage.port)
        await wire.exchange("GET", "/livez")
    status, raw = await wire.exchange("GET", "/api/v1/pop/queue/probe?consumerGroup=probe")
    assert status == 200, raw
    return Probe(wire, json.loads(raw)["messages"][0])


async def block_a_loop(stage: Stage) -> None:
    """F5: the loop of one worker waits in a call that does not come back for 8 s."""
    calm_ms = stage.p99_ms(stage.began - stage.timing.before, stage.began)
    victim = stage.draw.choice(stage.workers())
    stage.mark_log()
    held_at = trio.current_time()
    os.kill(victim, faulty_app.HOLD)
    gone = await stage.gone([victim], HANG_SECONDS + faulty_app.HOLD_SECONDS)
    stage.expect(gone is not None, "a worker with a blocked loop was never killed")
    stage.figure("noticed and killed, s", gone or 99.0, limit=HANG_SECONDS + 2)
    stage.figure("capacity back after it, s", await stage.capacity_back(), limit=WARM_SECONDS)
    stage.expect("hold_the_loop" in stage.new_log, "the log does not name the frame that blocked")
    others_ms = stage.p99_ms(held_at, held_at + HANG_SECONDS, settled_before=held_at)
    stage.figure("p99 of the other slot, ms", others_ms, limit=2 * max(calm_ms, CALM_MS))
    await trio.sleep_until(stage.began + stage.timing.fault)


async def crash_one_slot(stage: Stage) -> None:
    """F6: whatever boots dies: a slot whose worker is killed cannot get another, and the others serve on."""
    fault = Path(stage.needs.environment["FAULTS_AT_BOOT"])
    fault.touch()  # noqa: ASYNC240  # an empty file
    stage.mark_log()
    began = trio.current_time()
    watched = max(20.0, stage.timing.fault)
    last = None
    with trio.move_on_after(5.0):  # the spare is one that has booted: it takes one death along
        while len(workers := stage.workers()) == stage.needs.workers or not stage.new_log.count("died"):
            if last is None or len(workers) == stage.needs.workers:
                last = stage.draw.choice(workers) if last is None else workers[-1]
                kill(last, signal.SIGKILL)
            await trio.sleep(0.7)
    stage.expect(len(stage.workers()) < stage.needs.workers, "workers boot that cannot")
    await trio.sleep_until(began + watched)
    slots = re.findall(r'"worker died", "slot": (\d+), [^\n]*exited with code 9', stage.new_log)
    spares = re.findall(r'"spare worker died", [^\n]*exited with code 9', stage.new_log)
    stage.figure("boots of one place in the crash loop", max(*map(slots.count, ("0", "1")), len(spares)), limit=5.0)
    stage.figure("watched, s", watched)
    status = await stage.status()
    stage.expect(status and status["state"] == "degraded", f"the state is {status and status['state']}, not degraded")
    stage.expect(len(stage.workers()) == stage.needs.workers - 1, f"{len(stage.workers())} workers serve")
    fault.unlink()  # noqa: ASYNC240
    healed_at = trio.current_time()
    stage.expect(await stage.whole(70.0), "the slot did not come back when the cause was gone")
    stage.figure("whole again after the cause is gone, s", trio.current_time() - healed_at)


async def crash_all_slots(stage: Stage) -> None:
    """F6: no worker boots from the start: exit 3 within 5 s, and nothing is left."""
    fault = stage.scratch / "fault"
    await stage.start()  # makes the cluster: what is measured is the crash loop
    await stage.stop()
    fault.touch()
    began = trio.current_time()
    stage.spawn()
    ended = await stage.until(lambda: stage.server.process.poll() is not None, 20.0)
    stage.figure("gave up, s", trio.current_time() - began, limit=5.0)
    stage.expect(ended and stage.server.process.returncode == 3, f"exit code {stage.server.process.returncode}")
    stage.expect("queen-trio: " in stage.server.log.splitlines()[-1], "no last sentence that says why")


MEMORY = Path("/sys/fs/cgroup/memory")


async def run_out_of_memory(stage: Stage) -> None:
    """F24: a leak is ended by recycling, without a failed request; large bodies past a limit are a kill as F1."""
    victim = stage.draw.choice(stage.workers())
    began = trio.current_time()
    os.kill(victim, faulty_app.LEAK)
    gone = await stage.gone([victim], 60.0)
    stage.expect(gone is not None, "a worker that leaks was never recycled")
    stage.figure("leak ended by recycling, s", gone or 99.0)
    stage.expect(await stage.whole(), "no worker in its place")
    failed = stage.failures(began)
    stage.figure("requests failed while recycling", len(failed), limit=0)
    stage.notes += sorted(set(failed))[:3]

    if os.geteuid() != 0 or not (MEMORY / "memory.limit_in_bytes").exists():
        stage.notes.append("no memory limit: only root sets one, on cgroup v1")
        return
    group = MEMORY / f"queen-faults-{os.getpid()}"
    group.mkdir()
    try:
        pids = [stage.pid, *processes.worker_pids(stage.pid)]
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        held = sum(map(processes.rss_of, pids))
        (group / "memory.limit_in_bytes").write_text(str(held + (200 << 20)))
        stage.mark_log()
        body = '{"items":[{"queue":"bulk","payload":"' + "x" * (64 << 20) + '"}]}'
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(push_bytes, stage, body.encode())
        stage.figure("killed for memory", stage.count_in_log(r"SIGKILL"))
        stage.figure("capacity back, s", await stage.capacity_back(), limit=COLD_SECONDS)
        stage.expect(is_alive(stage.pid), "the supervisor was killed for memory")
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (MEMORY / "cgroup.procs").write_text(left)
        group.rmdir()
    await stage.whole()


async def push_bytes(stage: Stage, body: bytes) -> None:
    """One large push, whatever becomes of it."""
    head = f"POST /api/v1/push HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with trio.move_on_after(20):
        try:
            async with await trio.open_tcp_stream("127.0.0.1", stage.port) as stream:
                await stream.send_all(head + body)
                await stream.receive_some()
        except (OSError, trio.BrokenResourceError):
            pass  # killed underneath: the load says whether anything was lost


async def run_out_of_descriptors(stage: Stage) -> None:
    """F36: no descriptor left in a worker: it pauses accepting, does not spin, and goes on. None left in the
    supervisor, then no process to be had: what is there serves on, and is whole again when there is what was missing.
    """
    victim = stage.draw.choice(stage.workers())
    before = resource.prlimit(victim, resource.RLIMIT_NOFILE)
    held = processes.descriptors_of(victim)
    stage.mark_log()
    resource.prlimit(victim, resource.RLIMIT_NOFILE, (held + 20, before[1]))
    crowd: list[socket.socket] = []
    while len(crowd) < 120 or (len(crowd) < 600 and not stage.count_in_log("cannot accept")):
        for _ in range(30):  # while it is the busier one, it gives away what it accepts, and never runs out
            client = socket.create_connection(("127.0.0.1", stage.port))
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
            crowd.append(client)
        await trio.sleep(0.1)
    cpu, seconds = processes.cpu_seconds_of(victim), 4.0
    full = 0
    for _ in range(int(seconds * 10)):
        full += processes.descriptors_of(victim) >= held + 19
        await trio.sleep(0.1)
    stage.expect(full, "the worker never ran out of descriptors: nothing was tested")
    stage.figure(
        "CPU of a worker that cannot accept, cores", (processes.cpu_seconds_of(victim) - cpu) / seconds, limit=0.6
    )
    stage.expect(is_alive(victim), "a worker without descriptors died")
    said = stage.count_in_log("cannot accept")
    stage.expect(0 < said < 5, f"the log says {said} times that a worker cannot accept")
    for client in crowd:
        client.close()
    if is_alive(victim):
        resource.prlimit(victim, resource.RLIMIT_NOFILE, before)
    stage.figure("answers again, s", await stage.capacity_back(), limit=2.0)

    with few_descriptors(stage.pid):
        await lose_workers(stage, "descriptor")
    await come_back(stage, "descriptor")
    if os.geteuid() != 0 or not (PIDS / "cgroup.procs").exists():
        stage.notes.append("no limit of processes: only root sets one, on cgroup v1")
        return
    await stage.until(stage.spare, 15.0)
    with no_more_processes(stage.pid):
        await lose_workers(stage, "process")
    await come_back(stage, "process")


PIDS = Path("/sys/fs/cgroup/pids")


@contextmanager
def few_descriptors(pid: int) -> Iterator[None]:
    """It may have no more descriptors than it has."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (processes.descriptors_of(pid), before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def no_more_processes(pid: int) -> Iterator[None]:
    """It can start neither a process nor a thread."""
    group = PIDS / f"queen-faults-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (group / "pids.max").write_text("max")
        while left := (group / "cgroup.procs").read_text().split():
            for one in left:
                with suppress(OSError):  # it has ended
                    (PIDS / "cgroup.procs").write_text(one)
        group.rmdir()


async def lose_workers(stage: Stage, what: str) -> None:
    """All but one die, and none can be started in their place: the one answers whoever asks."""
    keep, *_ = stage.workers()
    cpu, slowest = processes.cpu_seconds_of(stage.pid), 0.0
    for worker in processes.worker_pids(stage.pid):
        if worker != keep:
            os.kill(worker, signal.SIGKILL)
    began = trio.current_time()
    while (asked_at := trio.current_time()) < began + 3.0:
        stage.expect(await stage.answers(), f"nothing answers while there is no {what} to be had")
        slowest = max(slowest, trio.current_time() - asked_at)
        await trio.sleep(0.1)
    stage.expect(is_alive(stage.pid), f"a supervisor without a {what} to be had died")
    busy = (processes.cpu_seconds_of(stage.pid) - cpu) / (trio.current_time() - began)
    stage.figure(f"slowest answer without a {what}, s", slowest, limit=2.0)
    stage.figure(f"CPU of a supervisor without a {what}, cores", busy, limit=0.3)


async def come_back(stage: Stage, what: str) -> None:
    began = trio.current_time()
    stage.expect(await stage.whole(70.0), f"no worker was started when there was a {what} again")
    stage.figure(f"whole when there is a {what} again, s", trio.current_time() - began)
