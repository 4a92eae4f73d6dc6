"""Strangers: processes that lost their parent and were given to this one, as happens to the first of a container.

Whoever ends and is waited for by nobody stays as a zombie, and with enough of them no process can be started. Children
of our own are waited for by those who started them, at once; to take their exit codes away would be worse than a
zombie. So a zombie is taken for a stranger only when it is seen twice, some seconds apart.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import structlog
import trio

LOOK_SECONDS: Final = 5.0
"""A child of our own is waited for within a turn of the loop after it has ended."""

log = structlog.get_logger(__name__)


async def run_reaper() -> None:
    """Bury strangers until cancelled."""
    seen: set[int] = set()
    while True:
        await trio.sleep(LOOK_SECONDS)
        zombies = find_zombies()
        for pid in zombies & seen:
            with contextlib.suppress(ChildProcessError):  # somebody was faster after all
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222  it has ended
                log.info("reaped a stranger", pid=pid)
        seen = zombies - seen


def find_zombies() -> set[int]:
    """Children of this process that have ended and were not waited for. Reads /proc, which does not block."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            children = (thread / "children").read_text().split()
        except OSError:  # the thread has ended, or the kernel does not tell
            continue
        found.update(int(pid) for pid in children if _is_zombie(pid))
    return found


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return False
