"""CPU and memory of process trees, read from /proc. Linux only; reads, never signals.

A tree's CPU is that of its live processes plus, per process, of the children it has reaped (``cutime``): a worker or a
backend that ended meanwhile is counted through its parent. Resolution is one clock tick (10 ms) per process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One line of /proc/<pid>/stat, as far as needed."""

    pid: int
    parent: int
    name: str
    cpu_seconds: float  # own, and of the children it has reaped
    rss_bytes: int


def read(pid: int) -> Process | None:
    """One process, or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name_start, name_end = text.index("(") + 1, text.rindex(")")
    fields = text[name_end + 2 :].split()
    ticks = sum(int(fields[i]) for i in (11, 12, 13, 14))
    return Process(
        pid=pid,
        parent=int(fields[1]),
        name=text[name_start:name_end],
        cpu_seconds=ticks / _TICKS,
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
    )


def tree(root: int, without: int | None = None) -> list[Process]:
    """``root`` and all its descendants that live, except the subtree of ``without``."""
    children: dict[int, list[Process]] = {}
    top = None
    for process in _all():
        children.setdefault(process.parent, []).append(process)
        if process.pid == root:
            top = process
    found: list[Process] = []
    pending = [top] if top is not None else []
    while pending:
        process = pending.pop()
        if process.pid == without:
            continue
        found.append(process)
        pending += children.get(process.pid, [])
    return found


def cpu_seconds(root: int, without: int | None = None) -> float:
    """CPU used so far by a tree."""
    return sum(process.cpu_seconds for process in tree(root, without))


def machine_busy_seconds() -> float:
    """CPU used so far by everything on the machine, steal included: what was not ours was someone else's noise."""
    first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in first[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _all() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := read(int(entry))) is not None:
            yield process
