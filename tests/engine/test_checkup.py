"""`queen-trio check` against a real PostgreSQL: the one of the tests, which runs without fsync."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
import trio

from queen.storage import embedded
from queen.storage.queries import load_migrations
from tests.conftest import plain_runner


@pytest.fixture(autouse=True)
def _no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QUEEN_DATA_DIR", "QUEEN_DATABASE_URL", "PG_HOST", "QUEEN_WORKERS", "NUM_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FILE_BUFFER_DIR", str(tmp_path / "spool"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: it sets up logging, once for all."""
    command = [sys.executable, "-m", "queen", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check(url: str) -> tuple[int, dict[str, Any]]:
    told = run("--json", "--database-url", url, "--workers", "2")
    assert told.stdout, told.stderr
    report: dict[str, Any] = msgspec.json.decode(told.stdout)
    return told.returncode, {finding["about"]: finding for finding in report["findings"]} | {"fit": report["fit"]}


def test_a_database_that_forgets_is_not_fit(database_url: str) -> None:
    code, findings = check(database_url)

    assert code == 1
    assert findings["fit"] is False
    assert findings["fsync"]["level"] == findings["full_page_writes"]["level"] == "danger"
    assert findings["synchronous_commit"] == {
        "level": "well",
        "about": "synchronous_commit",
        "found": "on",
        "do": "",
    }
    newest = max(migration.number for migration in load_migrations())
    assert findings["schema"]["found"] == f"up to date, migration {newest}"
    assert findings["encoding"]["found"] == "UTF8"
    assert findings["clock"]["level"] == "well"
    assert findings["autovacuum"]["level"] == "change"


def test_a_database_that_is_new_to_us_is_looked_at_and_left_as_it_is(empty_database_url: str) -> None:
    _, findings = check(empty_database_url)

    assert findings["schema"]["found"] == "not there yet; the first start makes it"
    assert check(empty_database_url)[1]["schema"] == findings["schema"]


def test_in_lines_the_gravest_stands_first_and_a_sum_last(database_url: str) -> None:
    told = run("--database-url", database_url)

    lines = told.stdout.splitlines()
    assert told.returncode == 1
    assert lines[1].startswith("danger  fsync: off -> set it to on: ")
    assert lines[-1].startswith("2 danger, ")


def execute(url: str, *statements: str) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()
        await asyncio.sleep(0)  # asyncio closes the socket a turn later

    with plain_runner() as runner:
        runner.run(work())


def test_an_unlogged_table_is_found(database_url: str) -> None:
    execute(database_url, "ALTER TABLE queen.traces SET UNLOGGED")

    assert check(database_url)[1]["tables"]["found"] == "unlogged: traces"


def test_a_role_that_may_see_little_is_told_what_is_not_seen(database_url: str) -> None:
    execute(
        database_url,
        "CREATE ROLE modest LOGIN CONNECTION LIMIT 4",
        "GRANT USAGE ON SCHEMA queen TO modest",
        "GRANT SELECT ON ALL TABLES IN SCHEMA queen TO modest",
    )
    try:
        _, findings = check(database_url.replace("//queen@", "//modest@"))
    finally:
        execute(database_url, "DROP OWNED BY modest", "DROP ROLE modest")

    assert findings["connections"]["level"] == "change"
    assert "the limit of our role" in findings["connections"]["found"]
    assert "grant pg_read_all_stats" in findings["long transactions"]["found"]


def test_a_database_that_cannot_be_reached_is_said_so() -> None:
    told = run("--database-url", "postgresql://nobody@127.0.0.1:1/none")

    assert told.returncode == 3
    assert "PostgreSQL cannot be reached" in told.stderr


def test_without_a_server_there_is_no_embedded_database_to_look_at(tmp_path: Path) -> None:
    told = run("--data-dir", str(tmp_path / "none"))

    assert told.returncode == 3
    assert "no PostgreSQL runs on" in told.stderr
    assert not (tmp_path / "none").exists()


@pytest.fixture
def home() -> Iterator[Path]:
    """Not tmp_path: as root, PostgreSQL runs as a user that has to pass through."""
    home = Path(tempfile.mkdtemp(prefix="queen-standby-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home)


@pytest.fixture
def standby(home: Path) -> Iterator[str]:
    """The URL of a standby that has heard of no primary yet."""

    async def make() -> embedded.Cluster:
        async with embedded.open_cluster(home / "data") as cluster:
            return cluster

    cluster = trio.run(make)
    cluster.socket_directory.mkdir(exist_ok=True)
    signal_file = cluster.data / "standby.signal"
    signal_file.touch()
    os.chown(signal_file, cluster.identity.uid, cluster.identity.gid)
    process = subprocess.Popen(
        [*cluster.command(), "-c", "fsync=off"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **cluster.popen_options(),
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if b"ready to accept read-only connections" in line:
                break
        yield cluster.url
    finally:
        process.send_signal(signal.SIGQUIT)
        process.stderr.read()
        process.stderr.close()
        process.wait()


def test_a_standby_is_looked_at_and_said_to_be_none_to_serve_from(standby: str) -> None:
    _, findings = check(standby)

    assert findings["role"]["level"] == "change"
    assert findings["role"]["found"] == "it takes no writes"
