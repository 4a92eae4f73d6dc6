"""What a database and a machine are like, as far as a server of ours depends on it, and what was found. Values."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Level = Literal["well", "advice", "change", "danger"]
"""``advice``: it would be faster, or easier to look into; ``change``: it stands in the way, or will one day;
``danger``: what was acknowledged can be lost."""

LEVELS: Final[tuple[Level, ...]] = ("danger", "change", "advice", "well")


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. ``found``: how it is; ``do``: what to change, and why; empty when it is well."""

    level: Level
    about: str
    found: str
    do: str = ""


class Setting(msgspec.Struct, frozen=True):
    """``text`` as an operator writes it; ``number`` in bytes or seconds where it has such a unit."""

    text: str
    number: float = 0.0


class Transaction(msgspec.Struct, frozen=True):
    """One that is open, or prepared. ``xmin_age``: transactions since the oldest that it still sees."""

    who: str
    seconds: float
    xmin_age: int = 0


class Slot(msgspec.Struct, frozen=True):
    """A replication slot."""

    name: str
    active: bool
    held_bytes: int
    xmin_age: int = 0


class Table(msgspec.Struct, frozen=True):
    """A table of ours."""

    name: str
    logged: bool
    live: int = 0
    dead: int = 0


class DatabaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A PostgreSQL and our database in it, as seen with the server's own connection settings."""

    version: int  # server_version_num
    settings: dict[str, Setting]  # those that our role may see
    standby: bool
    encoding: str
    frozen_age: int
    clock_ahead_seconds: float  # of PostgreSQL's clock before ours
    clock_doubt_seconds: float  # it may be off by this
    connections: int
    role_connections: int  # limit of our role; -1: none
    database_connections: int
    may_create: bool
    may_see_others: bool  # what other roles' sessions do
    transactions: tuple[Transaction, ...] = ()  # the oldest, others' and ours
    prepared: tuple[Transaction, ...] = ()
    slots: tuple[Slot, ...] = ()
    replicas: tuple[str, ...] = ()  # how each is synchronised
    statements_available: bool = False
    statements_installed: bool = False
    tables: tuple[Table, ...] = ()
    migration: int | None = None  # the newest applied; None: not ours yet
    known_migration: int = 0
    checkpoints_timed: int = 0
    checkpoints_requested: int = 0


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that a server keeps something in. ``there`` False: it is still to be made, and the rest is of the
    nearest directory above it."""

    name: str
    path: str
    there: bool
    open_to: str  # who beside its owner may write or read it; empty: nobody
    filesystem: str
    device: int
    free_bytes: int
    all_bytes: int


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """This machine, as far as a server on it is concerned."""

    places: tuple[Place, ...]
    descriptors: int  # that a process may have open
