"""One client reads 64 KiB a second of a 100,000-message pop while others push and pop: what does it do to them?

Open-loop stretches with the same intended requests, without and with the slow reader in turn; then the p99 of the
others is compared, and the highest memory of each process. Exit code 1 when p99 more than doubled or a process grew by
more than 32 MiB.

python -m perf.slow_reader                 on a server of its own
python -m perf.slow_reader --seconds 20 --payload-bytes 1000
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import trio

from perf import load
from perf.bench import cancel_on_signal, check_pushed
from perf.bodies import PushBodies
from perf.load import Outcome
from perf.server import Server, open_server
from perf.wire import Connection, Disconnected, get

MESSAGES = 100_000
ROUNDS = 2  # alternating, so that what else happens on the machine falls on both sides
READ_BYTES = 64 * 1024
RECEIVE_BUFFER_BYTES = 64 * 1024  # what the kernel takes off the server's hands at once
PER_SECOND = 100.0  # pushes of 10, and as many pops of 10
MAX_GROWTH_MIB = 32.0
MAX_P99_RATIO = 2.0
SAMPLE_SECONDS = 0.1


@dataclass
class Stretch:
    """What the others felt, and the highest memory of each worker."""

    push: Outcome = field(default_factory=Outcome)
    pop: Outcome = field(default_factory=Outcome)
    peak_rss: dict[int, int] = field(default_factory=dict)

    def add(self, other: Stretch) -> None:
        """Pool another stretch of the same kind."""
        for mine, its in ((self.push, other.push), (self.pop, other.pop)):
            mine.latencies += its.latencies
            mine.errors += its.errors
        for pid, peak in other.peak_rss.items():
            self.peak_rss[pid] = max(peak, self.peak_rss.get(pid, 0))


async def stretch(server: Server, queue: str, seconds: float) -> Stretch:
    """The ordinary load, with memory sampled."""
    result = Stretch()
    bodies = PushBodies(server.url, queue, batch=10, partitions=10)

    async def produce() -> None:
        result.push = await load.push(
            server.url, bodies, batch=10, connections=20, seconds=seconds, pacer=load.Pacer(PER_SECOND)
        )

    async def consume() -> None:
        result.pop = await load.pop(
            server.url, queue, batch=10, connections=20, seconds=seconds, wait=False, pacer=load.Pacer(PER_SECOND)
        )

    async def sample() -> None:
        while True:
            for process in server.processes():
                result.peak_rss[process.pid] = max(process.rss_bytes, result.peak_rss.get(process.pid, 0))
            await trio.sleep(SAMPLE_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sample)
        async with trio.open_nursery() as requests:
            requests.start_soon(produce)
            requests.start_soon(consume)
        nursery.cancel_scope.cancel()
    check_pushed(result.push)
    return result


@dataclass
class Progress:
    """How far the slow reader came."""

    received: int = 0


async def read_slowly(server: Server, progress: Progress, *, task_status: trio.TaskStatus[None]) -> None:
    """Ask for everything and take READ_BYTES a second, until cancelled. Reports ``started`` at the first bytes."""
    connection = await Connection.open(server.url, RECEIVE_BUFFER_BYTES)
    try:
        await connection.send(get(server.url, f"/api/v1/pop/queue/big?batch={MESSAGES}&autoAck=true"))
        progress.received += await connection.receive_some(READ_BYTES)
        task_status.started()
        pace = trio.current_time()
        while True:
            pace += 0.25
            await trio.sleep_until(pace)
            wanted = READ_BYTES // 4
            while wanted:
                got = await connection.receive_some(wanted)
                if not got:
                    raise Disconnected(f"the server hung up on the slow reader after {progress.received} bytes")
                progress.received += got
                wanted -= got
    finally:
        connection.close()


async def compare(server: Server, seconds: float, payload_bytes: int) -> int:
    """Measure both kinds of stretch in turn on ``server`` and tell; returns the exit code."""
    # By two connections in small requests: memory that a big push left free would hide what the big pop takes.
    bodies = PushBodies(server.url, "big", batch=100, payload_bytes=payload_bytes)
    check_pushed(await load.push_messages(server.url, bodies, batch=100, connections=2, messages=ROUNDS * MESSAGES))
    await stretch(server, "others-warm-up", seconds / 2)
    without, with_reader = Stretch(), Stretch()
    progress = Progress()
    for number in range(ROUNDS):
        without.add(await stretch(server, f"others-without-{number}", seconds))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(30):
                await nursery.start(read_slowly, server, progress)
            with_reader.add(await stretch(server, f"others-with-{number}", seconds))
            nursery.cancel_scope.cancel()

    growth = max(peak - without.peak_rss.get(pid, peak) for pid, peak in with_reader.peak_rss.items()) / 2**20
    print(f"slow reader: {progress.received / 2**20:.2f} MiB taken in {ROUNDS} times {seconds:.0f} s")
    print(
        f"server: largest growth of a process {growth:.1f} MiB, to {max(with_reader.peak_rss.values()) / 2**20:.0f} MiB"
    )
    failed = growth > MAX_GROWTH_MIB
    for verb in ("push", "pop"):
        before, after = getattr(without, verb), getattr(with_reader, verb)
        ratio = after.percentile_ms(99) / max(before.percentile_ms(99), 0.001)
        failed = failed or ratio > MAX_P99_RATIO or bool(before.errors or after.errors)
        print(
            f"{verb}: p50 {before.percentile_ms(50):.1f} → {after.percentile_ms(50):.1f} ms, "
            f"p99 {before.percentile_ms(99):.1f} → {after.percentile_ms(99):.1f} ms ({ratio:.2f} times), "
            f"{len(before.latencies)} and {len(after.latencies)} requests, errors {dict(before.errors + after.errors)}"
        )
    print("FAILED" if failed else "ok")
    return 1 if failed else 0


async def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.slow_reader", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of each stretch")
    parser.add_argument("--payload-bytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1, help="one: reader and others share it")
    arguments = parser.parse_args()
    code = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
        async with open_server(arguments.workers) as server:
            code = await compare(server, arguments.seconds, arguments.payload_bytes)
        nursery.cancel_scope.cancel()
    return code


if __name__ == "__main__":
    sys.exit(trio.run(main))
