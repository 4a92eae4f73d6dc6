"""What `queen-trio check` sees of this machine: directories, the disks below them, limits. Not a command itself."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from pathlib import Path

from queen.model.checkup import MachineFacts, Place


def look_at_machine(places: Iterable[tuple[str, Path]], server_pid: int | None) -> MachineFacts:
    """Args:
    server_pid: of a server that runs, whose limits count rather than ours.
    """
    return MachineFacts(
        places=tuple(place for name, path in places if (place := look_at_place(name, path)) is not None),
        descriptors=_descriptors_of(server_pid) or resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def look_at_place(name: str, path: Path) -> Place | None:
    """A directory, or what is nearest above it; None when we may not even look."""
    try:
        there = path.exists()
        nearest = path
        while not nearest.exists():
            nearest = nearest.parent
        mode, device = nearest.stat().st_mode, nearest.stat().st_dev
        disk = os.statvfs(nearest)
        reachable = _reachable(nearest)
    except OSError:
        return None
    open_to = "everybody may write there" if mode & 0o002 else "others may read there" if mode & 0o004 else ""
    return Place(
        name=name,
        path=str(path),
        there=there,
        open_to=open_to if there and reachable else "",
        filesystem=filesystem_of(nearest, Path("/proc/self/mountinfo").read_text()),
        device=device,
        free_bytes=disk.f_bavail * disk.f_frsize,
        all_bytes=disk.f_blocks * disk.f_frsize,
    )


def _reachable(path: Path) -> bool:
    """Whether everybody may pass through all that is above it."""
    return all(above.stat().st_mode & 0o001 for above in path.absolute().parents)


def filesystem_of(path: Path, mountinfo: str) -> str:
    """The type of the filesystem that a path lies in: of the longest mount point above it, the last one mounted."""
    path = path.resolve()
    found, length = "", -1
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= length:
            found, length = after.split()[0], len(point.parts)
    return found


def _descriptors_of(pid: int | None) -> int | None:
    """The hard limit of a process, which our workers raise the soft one to."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text()
    except OSError:
        return None
    for line in limits.splitlines():
        if line.startswith("Max open files"):
            most = line.split()[4]
            return int(most) if most.isdecimal() else 1 << 30
    return None
