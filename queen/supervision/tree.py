"""The tree of what a server is doing, from what its workers say of themselves. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from queen.model.snapshot import Snapshot
from queen.model.tree import Branch
from queen.supervision.process import WorkerProcess


def draw_server(server: Snapshot, workers: Sequence[tuple[WorkerProcess, tuple[Branch, ...] | None]]) -> Branch:
    """The whole tree. ``workers``: each with what it said; None: it has said nothing in time."""
    return Branch(
        kind="supervisor",
        name=f"queen-trio {server.version}",
        pid=server.pid,
        at=server.state,
        seconds=server.uptime_seconds,
        branches=tuple(draw_worker(worker, branches) for worker, branches in workers),
    )


def draw_worker(worker: WorkerProcess, branches: tuple[Branch, ...] | None) -> Branch:
    place = "spare" if worker.slot is None else f"in slot {worker.slot}"
    if branches is None:
        at, seconds = "does not answer", worker.silent_seconds
    elif worker.draining.is_set():
        at, seconds = "draining", worker.served_seconds()
    elif worker.ready.is_set():
        at, seconds = "waits for a slot" if worker.slot is None else "serving", worker.served_seconds()
    else:
        at, seconds = "booting", 0.0
    return Branch(
        kind="worker",
        name=f"{place}, generation {worker.generation}",
        pid=worker.pid,
        at=at,
        seconds=round(seconds, 3),
        branches=branches or (),
    )
