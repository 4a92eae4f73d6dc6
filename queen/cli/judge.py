"""What `queen-trio check` makes of what it sees: a finding for each thing, with what to change and why. No I/O.

What advice is worth was measured: docs/how-to/tune-postgresql.md has the figures. Not a command itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from queen.cli.show import size
from queen.config.settings import Settings
from queen.model.checkup import LEVELS, DatabaseFacts, Finding, MachineFacts, Place

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB

CLOCK_SECONDS: Final = 1.0  # leases and delays are PostgreSQL's time; what people compare is not
LONG_SECONDS: Final = 300.0  # a transaction that is open for so long keeps vacuum from its work
OLD_XMIN: Final = 1_000_000
HELD_BYTES: Final = GIB  # of WAL, by a slot that nobody reads
LISTENERS: Final = 3  # connections of a worker beside the pool: LISTEN, the pulse, and one that looks
DESCRIPTORS: Final = 4096
FREE_SHARE: Final = 0.1
VOLATILE: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
PASSING: Final = frozenset({"overlay", "aufs"})
REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "afs", "ceph"})


def judge(
    facts: DatabaseFacts, machine: MachineFacts, settings: Settings, *, embedded: bool, servers: int = 1
) -> list[Finding]:
    """All findings, the gravest first.

    Args:
        embedded: PostgreSQL is run by us; its settings are ours and need no advice.
        servers: that share the database.
    """
    found = [
        *_machine(machine, facts),
        *_durability(facts),
        *_surroundings(facts),
        *_connections(facts, settings, servers),
        *_hindrances(facts),
    ]
    if not embedded:
        found += _speed(facts)
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _durability(facts: DatabaseFacts) -> Iterator[Finding]:
    reasons = {
        "fsync": "a crash of the machine can lose or corrupt what was acknowledged",
        "full_page_writes": "a crash while a page is written corrupts it, unless the filesystem never tears one",
        "synchronous_commit": "a crash loses what was acknowledged in the last moments; our connections ask for on, "
        "and something between them and PostgreSQL takes it back",
    }
    for name, why in reasons.items():
        value = _text(facts, name)
        if value == "off":
            yield Finding("danger", name, value, f"set it to on: {why}")
        elif value:
            yield Finding("well", name, value)
    for name in ("zero_damaged_pages", "ignore_checksum_failure", "ignore_system_indexes"):
        if _text(facts, name) == "on":
            yield Finding("danger", name, "on", "set it to off: it hides damage, and with it messages")
    unlogged = [table.name for table in facts.tables if not table.logged]
    if unlogged:
        yield Finding(
            "danger", "tables", f"unlogged: {', '.join(unlogged)}", "ALTER TABLE … SET LOGGED: a crash empties them"
        )
    if _text(facts, "data_checksums") == "off":
        yield Finding(
            "advice", "data_checksums", "off", "pg_checksums --enable: damage on the disk is found when it is read"
        )
    if facts.replicas:
        together = [state for state in facts.replicas if state in ("sync", "quorum")]
        if together:
            yield Finding("well", "replicas", f"{len(facts.replicas)}, of which {len(together)} are waited for")
        else:
            yield Finding(
                "change",
                "replicas",
                f"{len(facts.replicas)}, none of which is waited for",
                "set synchronous_standby_names if a failover must not lose what was acknowledged a moment before",
            )


def _surroundings(facts: DatabaseFacts) -> Iterator[Finding]:
    version = f"{facts.version // 10000}.{facts.version % 10000}"
    if facts.version < 150000:
        yield Finding("change", "version", version, "upgrade: 15 is the oldest that queen-trio works with")
    else:
        yield Finding("well", "version", version)
    if facts.standby or _text(facts, "default_transaction_read_only") == "on":
        yield Finding("change", "role", "it takes no writes", "name the primary: no server works on a standby")
    else:
        yield Finding("well", "role", "primary")
    if facts.encoding == "UTF8":
        yield Finding("well", "encoding", facts.encoding)
    else:
        yield Finding("change", "encoding", facts.encoding, "use a database in UTF8: names may be any text")
    if facts.migration is None:
        if facts.may_create:
            yield Finding("well", "schema", "not there yet; the first start makes it")
        else:
            yield Finding(
                "change",
                "schema",
                "not there, and our role may not make it",
                "grant the role CREATE on the database, or run queen-trio migrate once as its owner",
            )
    elif facts.migration > facts.known_migration:
        yield Finding(
            "change",
            "schema",
            f"migration {facts.migration}; this version knows {facts.known_migration}",
            "install the version that made it: this one does not start",
        )
    elif facts.migration < facts.known_migration:
        yield Finding(
            "advice",
            "schema",
            f"migration {facts.migration} of {facts.known_migration}",
            "the next start brings it up to date, or queen-trio migrate beforehand",
        )
    else:
        yield Finding("well", "schema", f"up to date, migration {facts.migration}")
    ahead = facts.clock_ahead_seconds
    clock = f"PostgreSQL is {abs(ahead):.3f} s {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) > CLOCK_SECONDS + facts.clock_doubt_seconds:
        yield Finding(
            "change",
            "clock",
            clock,
            "synchronise both: times in answers and ids that are minted here are off by it",
        )
    else:
        yield Finding("well", "clock", clock)
    zone = _text(facts, "TimeZone")
    yield Finding("well", "time zone", f"{zone}, for our connections")


def _connections(facts: DatabaseFacts, settings: Settings, servers: int) -> Iterator[Finding]:
    workers = settings.workers + (1 if _has_spare(settings) else 0)
    wanted = servers * (max(2 * settings.workers, settings.db_pool_size) + workers * LISTENERS)
    reserved = _number(facts, "superuser_reserved_connections") + _number(facts, "reserved_connections")
    limits = {"max_connections": _number(facts, "max_connections") - reserved}
    if facts.role_connections >= 0:
        limits["the limit of our role"] = facts.role_connections
    if facts.database_connections >= 0:
        limits["the limit of the database"] = facts.database_connections
    name, room = min(limits.items(), key=lambda limit: limit[1])
    found = f"{wanted} wanted of {room:.0f} ({name}), {facts.connections} open now"
    if wanted > room:
        yield Finding("change", "connections", found, f"raise {name}, or lower DB_POOL_SIZE ({settings.db_pool_size})")
    else:
        yield Finding("well", "connections", found)


def _has_spare(settings: Settings) -> bool:
    return settings.spare if settings.spare is not None else settings.workers > 1


def _hindrances(facts: DatabaseFacts) -> Iterator[Finding]:
    why = "vacuum keeps what it could see: rows of cursors pile up, and pops slow down"
    old = [each for each in facts.transactions if each.seconds > LONG_SECONDS or each.xmin_age > OLD_XMIN]
    for each in old:
        yield Finding("change", "long transaction", f"{each.who}, for {each.seconds:.0f} s", f"end it: {why}")
    if not old:
        unseen = "" if facts.may_see_others else "; grant pg_read_all_stats to see those of other roles too"
        yield Finding("well", "long transactions", f"none{unseen}")
    for each in facts.prepared:
        if each.seconds > LONG_SECONDS:
            yield Finding(
                "change",
                "prepared transaction",
                f"{each.who}, for {each.seconds:.0f} s",
                f"COMMIT PREPARED or ROLLBACK PREPARED it: {why}",
            )
    for slot in facts.slots:
        if not slot.active and (slot.held_bytes > HELD_BYTES or slot.xmin_age > OLD_XMIN):
            yield Finding(
                "change",
                "replication slot",
                f"{slot.name} is read by nobody and holds {size(slot.held_bytes)} of WAL",
                "drop it, or set max_slot_wal_keep_size: it fills the disk" + (f", and {why}" if slot.xmin_age else ""),
            )
    bloated = [table for table in facts.tables if table.dead > 50_000 and table.dead > 10 * table.live]
    for table in bloated:
        yield Finding(
            "change",
            "dead rows",
            f"{table.name} has {table.dead}, and {table.live} live ones",
            "VACUUM it, and find out what keeps autovacuum from it",
        )
    if facts.tables and not bloated:
        cursors = next((table for table in facts.tables if table.name == "cursors"), None)
        yield Finding("well", "dead rows", "few" if cursors is None else f"{cursors.dead} of cursors")
    limit = _number(facts, "autovacuum_freeze_max_age")
    if limit and facts.frozen_age > limit:
        yield Finding(
            "change",
            "transaction ids",
            f"{facts.frozen_age} since the last freeze, past autovacuum_freeze_max_age",
            "VACUUM (FREEZE) the database: before two thousand million PostgreSQL stops to take writes",
        )
    if _text(facts, "autovacuum") == "off" or _text(facts, "track_counts") == "off":
        yield Finding(
            "change",
            "autovacuum",
            "off",
            "turn autovacuum and track_counts on: every ack leaves a dead row of a cursor, and nothing else removes it",
        )
    else:
        yield Finding("well", "autovacuum", f"on, every {_text(facts, 'autovacuum_naptime')}")


def _speed(facts: DatabaseFacts) -> Iterator[Finding]:
    if _number(facts, "max_wal_size") < 4 * GIB:
        yield Finding(
            "advice",
            "max_wal_size",
            _text(facts, "max_wal_size"),
            "4GB: under load checkpoints come by size, and after each the first write of a page is a whole page of WAL",
        )
    else:
        yield Finding("well", "max_wal_size", _text(facts, "max_wal_size"))
    if _number(facts, "checkpoint_timeout") < 900:
        yield Finding(
            "advice", "checkpoint_timeout", _text(facts, "checkpoint_timeout"), "15min: the same, where load is light"
        )
    else:
        yield Finding("well", "checkpoint_timeout", _text(facts, "checkpoint_timeout"))
    if facts.checkpoints_requested > max(10, facts.checkpoints_timed):
        yield Finding(
            "advice",
            "checkpoints",
            f"{facts.checkpoints_requested} for want of room, {facts.checkpoints_timed} in their time",
            "raise max_wal_size until most come in their time",
        )
    if _text(facts, "wal_compression") in ("on", "pglz"):
        yield Finding(
            "advice",
            "wal_compression",
            _text(facts, "wal_compression"),
            "off, or lz4 or zstd where WAL travels far: pglz takes as much of the rate as it saves of the WAL",
        )
    else:
        yield Finding("well", "wal_compression", _text(facts, "wal_compression"))
    buffers = _number(facts, "shared_buffers")
    if buffers < 256 * MIB:
        yield Finding(
            "advice",
            "shared_buffers",
            _text(facts, "shared_buffers"),
            "256MB or more: what was pushed is popped from there, if it is popped soon",
        )
    else:
        yield Finding("well", "shared_buffers", _text(facts, "shared_buffers"))
    if buffers >= 2 * GIB and _text(facts, "huge_pages_status") == "off":
        yield Finding(
            "advice",
            "huge_pages",
            "not in use",
            "set vm.nr_hugepages: with so many buffers each connection has a page table of its own, of megabytes",
        )
    if not facts.statements_available:
        yield Finding(
            "advice", "pg_stat_statements", "not installed on the server", "install it to see where time goes"
        )
    elif not facts.statements_installed:
        yield Finding(
            "advice",
            "pg_stat_statements",
            "available",
            "add it to shared_preload_libraries and CREATE EXTENSION it, to see where time goes",
        )
    else:
        yield Finding("well", "pg_stat_statements", "installed")


def _machine(machine: MachineFacts, facts: DatabaseFacts) -> Iterator[Finding]:
    for place in machine.places:
        yield from _place(place, facts)
    by_device: dict[int, list[str]] = {}
    for place in machine.places:
        by_device.setdefault(place.device, []).append(place.name)
    for names in by_device.values():
        if len(names) > 1:
            yield Finding(
                "advice",
                "disks",
                f"one for {' and '.join(names)}",
                "give the spool (FILE_BUFFER_DIR) another: pushes go on there when that of PostgreSQL is full",
            )
    if machine.descriptors < DESCRIPTORS:
        yield Finding(
            "change",
            "descriptors",
            str(machine.descriptors),
            "raise ulimit -n (LimitNOFILE=): each connection of a client takes one; past it they wait",
        )
    else:
        yield Finding("well", "descriptors", str(machine.descriptors))


def _place(place: Place, facts: DatabaseFacts) -> Iterator[Finding]:
    free = f"{size(place.free_bytes)} free of {size(place.all_bytes)}, {place.filesystem or 'unknown filesystem'}"
    if place.filesystem in VOLATILE:
        yield Finding(
            "danger", place.name, f"{place.path} is in memory ({place.filesystem})", "move it: a reboot empties it"
        )
    elif place.filesystem in PASSING:
        yield Finding(
            "change",
            place.name,
            f"{place.path} lies in the writable layer of a container ({place.filesystem})",
            "mount a volume there: that layer goes away with the container",
        )
    elif place.filesystem in REMOTE:
        yield Finding(
            "change",
            place.name,
            f"{place.path} lies on a network filesystem ({place.filesystem})",
            "use a local disk: locks and fsync are weaker there, and an outage of the network is one of the disk",
        )
    wal = _number(facts, "max_wal_size")
    if place.free_bytes < max(FREE_SHARE * place.all_bytes if place.all_bytes < 100 * GIB else 10 * GIB, wal):
        yield Finding(
            "change", place.name, f"{place.path}: {free}", "make room: PostgreSQL stops when its disk is full"
        )
    elif place.open_to:
        yield Finding("change", place.name, f"{place.path}: {place.open_to}", "close it to all but its owner")
    elif place.filesystem not in VOLATILE | PASSING | REMOTE:
        yield Finding("well", place.name, f"{place.path}: {free}")


def _text(facts: DatabaseFacts, name: str) -> str:
    """A setting; empty when it is not there or not for our role to see."""
    setting = facts.settings.get(name)
    return "" if setting is None else setting.text


def _number(facts: DatabaseFacts, name: str) -> float:
    setting = facts.settings.get(name)
    return 0.0 if setting is None else setting.number
