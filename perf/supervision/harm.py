"""What is done to a contender, and what is seen of it from outside: over its port, and in /proc."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from perf import procstat
from perf.polite import Unanswered, Wire
from perf.server import free_port
from perf.supervision.contenders import GRACE_SECONDS, HANG_SECONDS, WORKERS, Contender, environment_of

HOLD = signal.SIGRTMIN + 5  # as in faulty.py, which runs elsewhere
LEAK = signal.SIGRTMIN + 6
START_SECONDS = 20.0
LOOK_SECONDS = 0.01
CLIENTS = 6
INTERVAL_SECONDS = 0.04  # of one client: 150 requests a second over all
ANSWER_SECONDS = 5.0  # slower is a failed request
SETTLE_SECONDS = 3.0  # after the start: whoever keeps a spare has it by then
NEVER = "never"

Figures = dict[str, Any]


class Contestant:
    """One server under harm, in a directory of its own."""

    def __init__(self, contender: Contender, python: str, directory: Path, *options: str) -> None:
        self._options = options
        self.contender = contender
        self.directory = directory
        self.port = free_port()
        self.failures: Counter[str] = Counter()
        self.answered: list[tuple[float, float]] = []  # (sent, answered)
        self._python = python
        self._processes: list[subprocess.Popen[bytes]] = []
        self._family: set[int] = set()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._processes[-1]

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def boots(self) -> int:
        """How often the application was imported."""
        path = self.directory / "boots"
        return path.stat().st_size if path.exists() else 0

    def spawn(self) -> None:
        with (self.directory / "log").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    [*self.contender.command(self._python, self.port), *self._options],
                    env=environment_of(self.contender, self.directory),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.directory,
                    start_new_session=True,
                )
            )

    async def start(self) -> float | None:
        """Start it, until all workers answer. Seconds until the first answer; None: there was none."""
        began = time.monotonic()
        self.spawn()
        first = None
        with trio.move_on_after(START_SECONDS):
            while first is None:
                if self.process.poll() is not None:
                    return None
                if await self.ask() is not None:
                    first = time.monotonic() - began
                await trio.sleep(LOOK_SECONDS)
            await self.capacity_back(set())
        self.family()
        return first

    def family(self) -> set[int]:
        """Everything below it now; remembered, to find what it leaves."""
        found = {process.pid for process in procstat.tree(self.process.pid)}
        self._family |= found
        return found

    async def ask(self, path: str = "/") -> bytes | None:
        wire = Wire(self.port, answer_seconds=ANSWER_SECONDS)
        try:
            status, body = await wire.exchange("GET", path)
        except Unanswered:
            return None
        finally:
            wire.close()
        return body if status == 200 else None

    async def answering(self) -> set[int]:
        """Process ids of those that answer connections made now, many at a time so that none can take them all."""
        seen: set[int] = set()

        async def probe() -> None:
            if (body := await self.ask()) is not None:
                seen.add(int(body))

        async with trio.open_nursery() as probes:
            for _ in range(12):
                probes.start_soon(probe)
        return seen

    async def capacity_back(self, without: set[int], seconds: float = 15.0) -> float | None:
        """Seconds until as many workers answer as there should be, none of them of ``without``; None: never."""
        began = time.monotonic()
        seen: set[int] = set()
        with trio.move_on_after(seconds):
            while len(seen) < WORKERS:
                seen |= {pid for pid in await self.answering() if pid not in without}
                seen = {pid for pid in seen if alive(pid)}
                await trio.sleep(LOOK_SECONDS)
            return round(time.monotonic() - began, 3)
        return None

    async def load(self) -> None:
        """Clients with a connection each, until cancelled."""

        async def client(number: int) -> None:
            wire = Wire(self.port, answer_seconds=ANSWER_SECONDS)
            due = trio.current_time() + number * INTERVAL_SECONDS / CLIENTS
            while True:
                await trio.sleep_until(due)
                due = max(due + INTERVAL_SECONDS, trio.current_time())
                sent_at = time.monotonic()
                try:
                    status, _ = await wire.exchange("GET", "/")
                except Unanswered as error:
                    self.failures[error.told.split(":")[0]] += 1
                else:
                    if status == 200:
                        self.answered.append((sent_at, time.monotonic()))
                    else:
                        self.failures[f"status {status}"] += 1

        async with trio.open_nursery() as clients:
            for number in range(CLIENTS):
                clients.start_soon(client, number)

    def served(self) -> Figures:
        """Failed requests; the longest time without an answer; the slowest answer."""
        ends = sorted(end for _, end in self.answered)
        gap = max((later - end for end, later in pairwise(ends)), default=0.0)
        slowest = max((end - sent for sent, end in self.answered), default=0.0)
        return {
            "requests": len(self.answered) + self.failures.total(),
            "failed": self.failures.total(),
            "how": dict(self.failures),
            "gap_seconds": round(gap, 3),
            "slowest_seconds": round(slowest, 3),
        }

    async def until(self, look: Callable[[], object], seconds: float) -> float | None:
        """Seconds until that is true; None: it never was."""
        began = time.monotonic()
        with trio.move_on_after(seconds):
            while not look():  # noqa: ASYNC110  # other processes raise no event
                await trio.sleep(LOOK_SECONDS)
            return round(time.monotonic() - began, 3)
        return None

    def end(self) -> None:
        """Leave nothing behind: all that was ever seen below it, and what has our directory in its environment."""
        for process in self._processes:
            if process.poll() is None:
                self.family()
                process.kill()
                process.wait()
        mark = f"CONTEST={self.directory}".encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and mark in environment_of_process(int(entry)):
                self._family.add(int(entry))
        for pid in self._family:
            if alive(pid) and mark in environment_of_process(pid):
                os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """What lives of all that ever was."""
        return [pid for pid in self._family if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment_of_process(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def kill_a_worker(it: Contestant) -> Figures:
    back: list[float | None] = []
    for _ in range(3):
        victim = min(await it.answering())
        os.kill(victim, signal.SIGKILL)
        back.append(await it.capacity_back({victim}))
        it.family()
        await trio.sleep(2.5)
    seconds = [one for one in back if one is not None]
    return {
        "capacity_back_seconds": sorted(seconds)[len(seconds) // 2] if seconds else NEVER,
        "server_survived": it.process.poll() is None,
    }


async def hang_a_worker(it: Contestant) -> Figures:
    victim = min(await it.answering())
    os.kill(victim, HOLD)
    noticed = await it.until(lambda: not alive(victim), HANG_SECONDS + 15)
    back = await it.capacity_back({victim}) if noticed is not None else None
    return {
        "replaced_after_seconds": noticed if noticed is not None else NEVER,
        "capacity_back_seconds": back if back is not None else NEVER,
        "names_the_frame": "hold_the_loop" in it.log,
    }


async def deploy_broken_code(it: Contestant) -> Figures:
    before = await it.answering()
    (it.directory / "bad").touch()
    os.kill(it.process.pid, signal.SIGHUP)
    await trio.sleep(6.0)
    after = await it.answering() if it.process.poll() is None else set()
    (it.directory / "bad").unlink()
    return {
        "server_survived": it.process.poll() is None,
        "workers_answering_after": len(after),
        "old_workers_kept": before == after,
        "says_why": "the new code is broken" in it.log,
    }


async def upgrade_to_broken_code(it: Contestant) -> Figures:
    """SIGUSR2: another master beside the old one with gunicorn, a new program in place of the old one with ours."""
    before = await it.answering()
    (it.directory / "bad").touch()
    os.kill(it.process.pid, signal.SIGUSR2)
    await trio.sleep(6.0)
    it.family()
    after = await it.answering() if it.process.poll() is None else set()
    (it.directory / "bad").unlink()
    return {
        "server_survived": it.process.poll() is None,
        "old_workers_kept": before == after,
        "says_why": "the new code is broken" in it.log,
    }


async def reload_ten_times(it: Contestant) -> Figures:
    done = 0
    took: list[float] = []
    for _ in range(10):
        if it.process.poll() is not None:
            break
        before = await it.answering()
        began = time.monotonic()
        os.kill(it.process.pid, signal.SIGHUP)
        if await it.capacity_back(before, 12.0) is None:
            break
        took.append(time.monotonic() - began)
        it.family()
        done += 1
    await trio.sleep(1.0)
    return {
        "reloads_done": done,
        "reload_seconds": round(sorted(took)[len(took) // 2], 2) if took else NEVER,
        "server_survived": it.process.poll() is None,
    }


async def stop_with_streams(it: Contestant) -> Figures:
    """SIGTERM while streams run that end in time, streams whose client reads nothing, and requests that are parked."""
    each = min(it.contender.threads, 40) if it.contender.threads else 100
    streams = max(1, min(100, each * WORKERS * 3 // 4))
    stalled = max(1, min(10, streams // 10))
    parked = min(50, max(0, each * WORKERS - streams - stalled)) if it.contender.threads else 50
    ends: Counter[str] = Counter()

    async def read(path: str, kind: str) -> None:
        received = bytearray()
        try:
            async with await trio.open_tcp_stream("127.0.0.1", it.port) as stream:
                await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
                if kind == "stalled":
                    await trio.sleep(60.0)
                while chunk := await stream.receive_some(65536):
                    received += chunk
        except (OSError, trio.BrokenResourceError):
            pass
        whole = received.endswith(b"0\r\n\r\n") or (kind == "parked" and b"\r\n\r\n" in received)
        ends[f"{kind} {'answered' if whole else 'cut'}"] += 1

    async with trio.open_nursery() as clients:
        for _ in range(streams):
            clients.start_soon(read, "/stream/4", "stream")
        for _ in range(stalled):
            clients.start_soon(read, "/stream/600", "stalled")
        for _ in range(parked):
            clients.start_soon(read, "/park", "parked")
        await trio.sleep(1.0)
        it.family()
        began = time.monotonic()
        os.kill(it.process.pid, signal.SIGTERM)
        exit_after = await it.until(lambda: it.process.poll() is not None, 40.0)
        await trio.sleep(0.2)
        left = it.left()
        over_at = time.monotonic() - began
        clients.cancel_scope.deadline = trio.current_time() + 1.0
    return {
        "streams": streams,
        "streams_whole": ends["stream answered"],
        "exit_seconds": exit_after if exit_after is not None else f"more than {over_at:.0f}",
        "within_grace": exit_after is not None and exit_after <= GRACE_SECONDS + 1.0,
        "processes_left": len(left),
    }


async def kill_the_parent(it: Contestant) -> Figures:
    family = it.family() - {it.process.pid}
    os.kill(it.process.pid, signal.SIGKILL)
    it.process.wait()
    await trio.sleep(1.0)
    after_1 = [pid for pid in family if alive(pid)]
    port_free = free(it.port)
    await trio.sleep(4.0)
    after_5 = [pid for pid in family if alive(pid)]
    again = await it.start()
    return {
        "orphans_after_1_s": len(after_1),
        "orphans_after_5_s": len(after_5),
        "port_free_after_1_s": port_free,
        "next_start_serves_seconds": round(again, 2) if again is not None else NEVER,
    }


async def leak(it: Contestant) -> Figures:
    victim = min(await it.answering())
    os.kill(victim, LEAK)
    peak = 0
    ended = None
    began = time.monotonic()
    while time.monotonic() < began + 30:
        process = procstat.read(victim)
        if process is None or not alive(victim):
            ended = round(time.monotonic() - began, 1)
            break
        peak = max(peak, process.rss_bytes)
        await trio.sleep(0.1)
    return {"recycled_after_seconds": ended if ended is not None else NEVER, "peak_mb": peak >> 20}


async def crash_loop(it: Contestant) -> Figures:
    """One worker killed while nothing boots; then everything started so."""
    (it.directory / "crash").touch()
    boots = it.boots
    cpu = procstat.machine_busy_seconds()
    seconds = 10.0
    victim = min(await it.answering())
    os.kill(victim, signal.SIGKILL)
    await trio.sleep(1.5)
    for pid in list(await it.answering())[1:]:  # a spare has taken over
        os.kill(pid, signal.SIGKILL)
    await trio.sleep(seconds)
    figures: Figures = {
        "boots_in_10_s": it.boots - boots,
        "busy_cores": round((procstat.machine_busy_seconds() - cpu) / (seconds + 1.5), 2),
        "server_survived": it.process.poll() is None,
        "workers_answering": len(await it.answering()) if it.process.poll() is None else 0,
    }
    (it.directory / "crash").unlink()
    back = await it.capacity_back(set(), 20.0) if it.process.poll() is None else None
    figures["whole_again_seconds"] = back if back is not None else NEVER
    return figures


async def crash_from_the_start(it: Contestant) -> Figures:
    (it.directory / "crash").touch()
    began = time.monotonic()
    it.spawn()
    await it.until(lambda: it.process.poll() is not None, 10.0)
    code = it.process.poll()
    return {
        "gave_up_seconds": round(time.monotonic() - began, 2) if code is not None else NEVER,
        "exit_code": code,
        "boots": it.boots,
    }


Harm = Callable[[Contestant], Awaitable[Figures]]

HARMS: dict[str, tuple[Harm, bool]] = {  # and whether the server is started before, under load
    "kill a worker": (kill_a_worker, True),
    "hang a loop": (hang_a_worker, True),
    "broken deploy": (deploy_broken_code, True),
    "broken upgrade": (upgrade_to_broken_code, True),
    "ten reloads": (reload_ten_times, True),
    "stop with streams": (stop_with_streams, False),
    "kill the parent": (kill_the_parent, False),
    "leak 10 MB/s": (leak, True),
    "crash loop": (crash_loop, True),
    "crash from the start": (crash_from_the_start, False),
}


@contextmanager
def open_contestant(contender: Contender, python: str, harm: str) -> Iterator[Contestant]:
    directory = Path(tempfile.mkdtemp(prefix="queen-contest-"))
    options = contender.against_leaks if HARMS[harm][0] is leak else ()
    it = Contestant(contender, python, directory, *options)
    try:
        yield it
    finally:
        it.end()
        shutil.rmtree(directory, ignore_errors=True)


async def do_harm(name: str, it: Contestant) -> Figures:
    """One harm to one contestant: what it measured, and what the load saw."""
    harm, loaded = HARMS[name]
    if name in ("broken deploy", "ten reloads") and not it.contender.reloads:
        return {"not_offered": "no reload by a signal"}
    if harm is upgrade_to_broken_code and not it.contender.upgrades:
        return {"not_offered": "no upgrade in place"}
    if harm is not crash_from_the_start and await it.start() is None:
        return {"error": f"did not start: {it.log[-500:]}"}
    if not loaded:
        return await harm(it)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.load)
        await trio.sleep(SETTLE_SECONDS)
        try:
            figures = await harm(it)
        except ValueError:  # nobody was left to do harm to
            figures = {"server_survived": it.process.poll() is None, "error": "no worker answers any more"}
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    return figures | it.served()
