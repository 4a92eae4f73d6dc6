"""What `queen-trio check` makes of what it sees. Each thing that is not as it should be is found, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from queen.cli.judge import GIB, MIB, judge
from queen.cli.machine import filesystem_of, look_at_place
from queen.config.settings import Settings
from queen.model.checkup import DatabaseFacts, Finding, MachineFacts, Place, Setting, Slot, Table, Transaction

SETTINGS = Settings(workers=2, db_pool_size=20)

GOOD = DatabaseFacts(
    version=180006,
    settings={
        "fsync": Setting("on"),
        "full_page_writes": Setting("on"),
        "synchronous_commit": Setting("on"),
        "autovacuum": Setting("on"),
        "track_counts": Setting("on"),
        "wal_compression": Setting("off"),
        "max_wal_size": Setting("4GB", 4 * GIB),
        "checkpoint_timeout": Setting("15min", 900),
        "shared_buffers": Setting("256MB", 256 * MIB),
        "max_connections": Setting("200", 200),
        "autovacuum_freeze_max_age": Setting("200000000", 200_000_000),
    },
    standby=False,
    encoding="UTF8",
    frozen_age=1_000,
    clock_ahead_seconds=0.001,
    clock_doubt_seconds=0.001,
    connections=5,
    role_connections=-1,
    database_connections=-1,
    may_create=True,
    may_see_others=True,
    statements_available=True,
    statements_installed=True,
    tables=(Table("cursors", logged=True, live=10, dead=5),),
    migration=60,
    known_migration=60,
)

DISK = Place(
    name="spool",
    path="/var/lib/queen-trio/spool",
    there=True,
    open_to="",
    filesystem="ext4",
    device=1,
    free_bytes=50 * GIB,
    all_bytes=90 * GIB,
)
MACHINE = MachineFacts(places=(DISK,), descriptors=65536)


def found(facts: DatabaseFacts = GOOD, machine: MachineFacts = MACHINE, **options: Any) -> list[Finding]:
    findings = judge(facts, machine, SETTINGS, **{"embedded": False, **options})
    return [finding for finding in findings if finding.level != "well"]


def with_setting(name: str, text: str, number: float = 0.0) -> DatabaseFacts:
    return msgspec.structs.replace(GOOD, settings={**GOOD.settings, name: Setting(text, number)})


def test_what_is_as_it_should_be_is_well() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("synchronous_commit", "off"),
        ("zero_damaged_pages", "on"),
        ("ignore_checksum_failure", "on"),
        ("ignore_system_indexes", "on"),
    ],
)
def test_a_setting_that_loses_messages_is_a_danger_also_of_the_embedded_server(setting: str, text: str) -> None:
    for embedded in (False, True):
        (finding,) = found(with_setting(setting, text), embedded=embedded)

        assert (finding.level, finding.about, finding.found) == ("danger", setting, text)
        assert finding.do


@pytest.mark.parametrize(
    ("setting", "text", "number"),
    [
        ("max_wal_size", "1GB", GIB),
        ("checkpoint_timeout", "5min", 300),
        ("wal_compression", "pglz", 0),
        ("shared_buffers", "128MB", 128 * MIB),
    ],
)
def test_a_setting_that_slows_is_worth_advice_where_somebody_can_change_it(
    setting: str, text: str, number: float
) -> None:
    facts = with_setting(setting, text, number)

    assert [(finding.level, finding.about) for finding in found(facts)] == [("advice", setting)]
    assert found(facts, embedded=True) == []


@pytest.mark.parametrize(
    ("change", "level", "about"),
    [
        ({"version": 140012}, "change", "version"),
        ({"standby": True}, "change", "role"),
        ({"encoding": "SQL_ASCII"}, "change", "encoding"),
        ({"migration": None, "may_create": False}, "change", "schema"),
        ({"migration": 61}, "change", "schema"),
        ({"migration": 59}, "advice", "schema"),
        ({"clock_ahead_seconds": -2.0}, "change", "clock"),
        ({"role_connections": 10}, "change", "connections"),
        ({"database_connections": 3}, "change", "connections"),
        ({"transactions": (Transaction("process 7", 301.0),)}, "change", "long transaction"),
        ({"transactions": (Transaction("process 7", 1.0, 1_000_001),)}, "change", "long transaction"),
        ({"prepared": (Transaction("gid", 3600.0),)}, "change", "prepared transaction"),
        ({"slots": (Slot("old", active=False, held_bytes=2 * GIB),)}, "change", "replication slot"),
        ({"tables": (Table("cursors", logged=True, live=10, dead=60_000),)}, "change", "dead rows"),
        ({"tables": (Table("segments", logged=False),)}, "danger", "tables"),
        ({"frozen_age": 300_000_000}, "change", "transaction ids"),
        ({"replicas": ("async", "async")}, "change", "replicas"),
        ({"checkpoints_timed": 1, "checkpoints_requested": 50}, "advice", "checkpoints"),
        ({"statements_installed": False}, "advice", "pg_stat_statements"),
    ],
)
def test_each_thing_that_is_not_as_it_should_be_is_found(change: dict[str, Any], level: str, about: str) -> None:
    (finding,) = found(msgspec.structs.replace(GOOD, **change))

    assert (finding.level, finding.about) == (level, about)
    assert finding.do


@pytest.mark.parametrize(
    "change",
    [
        {"migration": None},
        {"clock_ahead_seconds": 1.5, "clock_doubt_seconds": 1.0},
        {"transactions": (Transaction("process 7", 20.0),)},
        {"slots": (Slot("backup", active=True, held_bytes=5 * GIB), Slot("new", active=False, held_bytes=5))},
        {"replicas": ("async", "quorum")},
    ],
)
def test_what_only_looks_like_it_is_well(change: dict[str, Any]) -> None:
    assert found(msgspec.structs.replace(GOOD, **change)) == []


def test_connections_are_counted_for_all_servers_on_a_database() -> None:
    assert found(servers=5) == []
    (finding,) = found(servers=7)

    assert (finding.level, finding.about) == ("change", "connections")
    assert finding.found.startswith("203 wanted of 200 (max_connections)")


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"filesystem": "tmpfs"}, "danger"),
        ({"filesystem": "overlay"}, "change"),
        ({"filesystem": "nfs4"}, "change"),
        ({"free_bytes": 3 * GIB}, "change"),
        ({"open_to": "others may read there"}, "change"),
    ],
)
def test_a_directory_that_is_not_fit_is_found(change: dict[str, Any], level: str) -> None:
    machine = msgspec.structs.replace(MACHINE, places=(msgspec.structs.replace(DISK, **change),))

    assert [(finding.level, finding.about) for finding in found(machine=machine)] == [(level, "spool")]


def test_one_disk_for_both_is_worth_advice_and_few_descriptors_a_change() -> None:
    both = (DISK, msgspec.structs.replace(DISK, name="data directory"))
    assert [finding.about for finding in found(machine=msgspec.structs.replace(MACHINE, places=both))] == ["disks"]
    assert [finding.about for finding in found(machine=msgspec.structs.replace(MACHINE, descriptors=1024))] == [
        "descriptors"
    ]


def test_the_gravest_comes_first() -> None:
    facts = msgspec.structs.replace(with_setting("fsync", "off"), migration=59, standby=True)

    assert [finding.level for finding in found(facts)] == ["danger", "change", "advice"]


def test_a_filesystem_is_that_of_the_nearest_mount_above() -> None:
    mounts = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 22 0:25 / /run rw,nosuid - tmpfs tmpfs rw\n"
        "31 30 254:1 / /run/my\\040data rw - xfs /dev/vdb rw\n"
    )

    assert filesystem_of(Path("/var/lib"), mounts) == "ext4"
    assert filesystem_of(Path("/run/queen"), mounts) == "tmpfs"
    assert filesystem_of(Path("/run/my data/spool"), mounts) == "xfs"


def test_a_directory_that_is_still_to_be_made_is_judged_by_what_is_above_it(tmp_path: Path) -> None:
    place = look_at_place("spool", tmp_path / "not" / "there")

    assert place is not None
    assert not place.there
    assert place.open_to == ""
    assert 0 < place.free_bytes <= place.all_bytes


def test_a_directory_that_everybody_may_write_is_seen_where_everybody_gets_to_it() -> None:
    with tempfile.TemporaryDirectory() as above:  # what lies above tmp_path is closed
        inner = Path(above, "inner")
        inner.mkdir()
        inner.chmod(0o777)
        Path(above).chmod(0o755)
        open_place = look_at_place("data directory", inner)
        Path(above).chmod(0o700)
        place = look_at_place("data directory", inner)

    assert open_place is not None
    assert open_place.open_to == "everybody may write there"
    assert place is not None
    assert place.open_to == ""
