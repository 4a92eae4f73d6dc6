"""What the server does at one moment, as a tree: supervisor, workers, connections, requests, writes, SQL. Values."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["supervisor", "worker", "connection", "request", "write", "sql", "more"]
"""``write``: a batch that several requests are part of; ``more``: what was left out, and how much of it."""


class Branch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that is going on, and what goes on below it."""

    kind: Kind
    name: str
    at: str = ""  # what it waits for
    seconds: float = 0.0  # so long
    pid: int | None = None  # of the process, or of PostgreSQL's backend
    blocked_by: tuple[int, ...] = ()  # backends that hold what it waits for
    branches: tuple[Branch, ...] = ()
