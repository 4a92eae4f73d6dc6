"""`queen-trio check` against a real PostgreSQL: the one of the tests, which runs without fsync."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
import trio

from queen.cli import main
from queen.storage import embedded
from queen.storage.queries import load_migrations
from tests.conftest import plain_runner


@pytest.fixture(autouse=True)
def _no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QUEEN_DATA_DIR", "QUEEN_DATABASE_URL", "PG_HOST", "QUEEN_WORKERS", "NUM_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FILE_BUFFER_DIR", str(tmp_path / "spool"))


def check(capsys: pytest.CaptureFixture[str], url: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()  # what making the database has said
    code = main(["check", "--json", "--database-url", url, "--workers", "2"])
    told = capsys.readouterr()
    assert told.out, told.err
    report: dict[str, Any] = msgspec.json.decode(told.out)
    return code, {finding["about"]: finding for finding in report["findings"]} | {"fit": report["fit"]}


def test_a_database_that_forgets_is_not_fit(capsys: pytest.CaptureFixture[str], database_url: str) -> None:
    code, findings = check(capsys, database_url)

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


def test_a_database_that_is_new_to_us_is_looked_at_and_left_as_it_is(
    capsys: pytest.CaptureFixture[str], empty_database_url: str
) -> None:
    _, findings = check(capsys, empty_database_url)

    assert findings["schema"]["found"] == "not there yet; the first start makes it"
    assert check(capsys, empty_database_url)[1]["schema"] == findings["schema"]


def test_in_lines_the_gravest_stands_first_and_a_sum_last(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    capsys.readouterr()
    code = main(["check", "--database-url", database_url])

    lines = capsys.readouterr().out.splitlines()
    assert code == 1
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


def test_an_unlogged_table_is_found(capsys: pytest.CaptureFixture[str], database_url: str) -> None:
    execute(database_url, "ALTER TABLE queen.traces SET UNLOGGED")

    assert check(capsys, database_url)[1]["tables"]["found"] == "unlogged: traces"


def test_a_role_that_may_see_little_is_told_what_is_not_seen(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    execute(
        database_url,
        "CREATE ROLE modest LOGIN CONNECTION LIMIT 4",
        "GRANT USAGE ON SCHEMA queen TO modest",
        "GRANT SELECT ON ALL TABLES IN SCHEMA queen TO modest",
    )
    try:
        _, findings = check(capsys, database_url.replace("//queen@", "//modest@"))
    finally:
        execute(database_url, "DROP OWNED BY modest", "DROP ROLE modest")

    assert findings["connections"]["level"] == "change"
    assert "the limit of our role" in findings["connections"]["found"]
    assert "grant pg_read_all_stats" in findings["long transactions"]["found"]


def test_a_database_that_cannot_be_reached_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--database-url", "postgresql://nobody@127.0.0.1:1/none"]) == 3
    assert "PostgreSQL cannot be reached" in capsys.readouterr().err


def test_without_a_server_there_is_no_embedded_database_to_look_at(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check", "--data-dir", str(tmp_path / "none")]) == 3
    assert "no PostgreSQL runs on" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.fixture
def standby(tmp_path: Path) -> Iterator[str]:
    """The URL of a standby that has heard of no primary yet."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)  # as root, PostgreSQL runs as a user that has to pass through

    async def make() -> embedded.Cluster:
        async with embedded.open_cluster(tmp_path / "data") as cluster:
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


def test_a_standby_is_looked_at_and_said_to_be_none_to_serve_from(
    capsys: pytest.CaptureFixture[str], standby: str
) -> None:
    _, findings = check(capsys, standby)

    assert findings["role"]["level"] == "change"
    assert findings["role"]["found"] == "it takes no writes"
