"""A look at processes and their sockets through /proc. Reads, never signals."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tests.acceptance.support import is_alive

from .history import Resources

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LISTEN = "0A"


def children(pid: int) -> dict[int, str]:
    """Process id and command line of each live child, from the kernel: the load must not wait for a long look."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            listed = path.read_text().split()
        except OSError:
            continue
        for child in map(int, listed):
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if is_alive(child):
                found[child] = command
    return found


def tcp_sockets() -> list[tuple[int, int, str, str]]:
    """Local port, remote port, state and inode of every IPv4 socket of TCP."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return [(int(row[1][-4:], 16), int(row[2][-4:], 16), row[3], row[9]) for row in rows]


def inodes_of(pid: int) -> set[str]:
    """Inodes of the sockets that a process holds."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(entry.path)
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        return set()
    return found


def worker_pids(supervisor: int) -> list[int]:
    """All worker processes, a spare one too."""
    return [pid for pid, command in children(supervisor).items() if "queen.worker" in command]


def serving_pids(supervisor: int, port: int) -> list[int]:
    """Workers that listen on the port."""
    listening = {inode for local, _, state, inode in tcp_sockets() if local == port and state == LISTEN}
    return [pid for pid in worker_pids(supervisor) if inodes_of(pid) & listening]


def owner_of(local_port: int, port: int, pids: Iterable[int]) -> int | None:
    """Which of the processes has accepted our connection from ``local_port``."""
    inodes = {inode for local, remote, _, inode in tcp_sockets() if (local, remote) == (port, local_port)}
    return next((pid for pid in pids if inodes_of(pid) & inodes), None)


def descriptors_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def rss_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def cpu_seconds_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def backends_of(postmaster: int) -> list[int]:
    """PostgreSQL's processes that serve a client."""
    return [pid for pid, command in children(postmaster).items() if "[local]" in command or "127.0.0.1(" in command]


def resources_of(supervisor: int, postmaster: int) -> Resources:
    workers = worker_pids(supervisor)
    return Resources(
        processes=1 + len(workers),
        supervisor_descriptors=descriptors_of(supervisor),
        worker_descriptors=sum(map(descriptors_of, workers)),
        database_connections=len(backends_of(postmaster)),
        rss_bytes=sum(map(rss_of, workers)),
    )


def family_of(supervisor: int) -> list[int]:
    """Everything below a supervisor, itself included."""
    found, pending = [], [supervisor]
    while pending:
        pid = pending.pop()
        if is_alive(pid):
            found.append(pid)
            pending += children(pid)
    return found
