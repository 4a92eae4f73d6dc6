"""How the server is at one moment: what the control socket answers, and commands and metrics show. Values, no I/O."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

ServerState = Literal["starting", "serving", "degraded", "reloading", "stopping"]
"""``degraded``: it serves, with fewer workers than it should have and no early prospect of more."""

SlotState = Literal["waiting", "booting", "serving", "draining", "parked"]
"""``waiting``: between a death and the next start; ``parked``: too many deaths, tried again only now and then."""

HEALTHY: Final[frozenset[str]] = frozenset({"serving", "reloading"})
"""States of a server that has the workers it should have."""


class SlotSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One slot and its present worker. Counters are of all workers that the slot has had."""

    slot: int
    state: SlotState
    pid: int | None = None
    generation: int = 0  # counts the workers of this server, from 1
    uptime_seconds: float = 0.0  # of the present worker, since it was started
    restarts: int = 0
    last_exit: str = ""  # how the worker before the present one ended, in a sentence; empty: there was none
    rss_bytes: int = 0
    loop_lag_p50_ms: float = 0.0
    loop_lag_p99_ms: float = 0.0
    loop_lag_max_ms: float = 0.0
    connections: int = 0
    requests_in_flight: int = 0
    requests: int = 0
    pushed: int = 0
    popped: int = 0
    acked: int = 0
    requests_per_second: float = 0.0
    messages_per_second: float = 0.0  # pushed and popped


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole server."""

    pid: int
    version: str
    state: ServerState
    uptime_seconds: float
    url: str
    database: str  # where it is, without secrets
    workers_wanted: int
    workers_active: int
    restarts: int
    reloading: bool = False
    upgrading: bool = False  # it tries whether it can go on under the program that is there now
    slots: tuple[SlotSnapshot, ...]

    @property
    def degraded_slots(self) -> tuple[int, ...]:
        """The slots that have no worker and are not about to have one."""
        return tuple(slot.slot for slot in self.slots if slot.state in ("waiting", "parked"))
