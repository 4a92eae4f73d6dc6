"""How a child ended, in a sentence for people. Passive: who watches a child asks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

MEANINGS: Final = {
    signal.SIGSEGV: "a fault in compiled code",
    signal.SIGABRT: "it gave itself up",
    signal.SIGBUS: "memory that is not there, perhaps a full disk under a mapped file",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGXCPU: "over its limit of CPU time",
    signal.SIGXFSZ: "over its limit of a file's size",
    signal.SIGSYS: "a system call that it may not use",
}

_CGROUP: Final = Path("/proc/self/cgroup")
_MOUNT: Final = Path("/sys/fs/cgroup")


def explain_exit(returncode: int | None, *, rss_bytes: int = 0, killed_by_us: bool = False, oom_kills: int = 0) -> str:
    """How a process ended.

    Args:
        rss_bytes: memory it held when last seen; 0: never seen.
        killed_by_us: we sent the SIGKILL; then nobody else is suspected.
        oom_kills: processes of our control group that the kernel has killed for memory while this one lived.
    """
    if returncode is None:
        return "has not ended"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        name = f"signal {-returncode}"
    if -returncode == signal.SIGKILL and not killed_by_us:
        held = f"; it held {rss_bytes / 2**20:.0f} MiB when last seen" if rss_bytes else ""
        return f"was killed by SIGKILL ({'' if oom_kills else 'perhaps '}out of memory{held})"
    if -returncode == signal.SIGKILL:
        return "hung up and did not end: killed by its supervisor"
    meaning = MEANINGS.get(signal.Signals(-returncode)) if name.startswith("SIG") else None
    return f"was killed by {name}{f' ({meaning})' if meaning else ''}"


def count_oom_kills() -> int:
    """Processes of our control group that the kernel has killed because the group had no memory left; 0 where nothing
    says so. Reads a file of the kernel's, which does not block."""
    for path in _event_files():
        try:
            text = path.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdecimal():
                return int(value)
    return 0


def _event_files() -> list[Path]:
    """Where the count is: memory.events of cgroup v2, memory.oom_control of v1."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        below = path.lstrip(os.sep)
        if not controllers:
            # in a container its own group is mounted at the root, whatever the path says
            found += [_MOUNT / below / "memory.events", _MOUNT / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [_MOUNT / "memory" / below / "memory.oom_control", _MOUNT / "memory" / "memory.oom_control"]
    return found
