"""Each thing that can stand in the way of a start: one sentence, exit code 3, nothing left behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from .conftest import StartServer, skip_unless_it_can_run_python
from .support import NO_DATABASE, TINY, Server, children, is_alive, is_free

NEVER_SERVED = 3


def complaint(server: Server) -> str:
    """What the server said last, when it was right to give up."""
    assert server.wait_exit() == NEVER_SERVED, server.log
    assert server.output == ""
    said = [line for line in server.log.splitlines() if not line.startswith("{")]
    assert "Traceback" not in server.log
    assert len(said) == 1, server.log
    assert said[0].startswith("queen-trio: ")
    return said[0]


def test_a_taken_port(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start_server(*TINY, port=port)

        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in complaint(server)


def test_a_port_taken_by_another_of_us_is_not_shared_with_it(start_server: StartServer, scratch: Path) -> None:
    first = start_server(*TINY, *NO_DATABASE).wait_ready()
    second = start_server(*TINY, *NO_DATABASE, port=first.port, home=scratch / "other")

    assert "Address already in use" in complaint(second)
    assert first.answers()


def test_a_data_directory_that_another_server_is_using(start_server: StartServer) -> None:
    first = start_server(*TINY, workers=1).wait_ready()
    second = start_server(*TINY, workers=1)

    assert f"another queen-trio (process {first.process.pid}) is using the data directory" in complaint(second)
    assert first.answers()


def test_a_data_directory_that_cannot_be_made(start_server: StartServer, scratch: Path) -> None:
    (scratch / "file").touch()

    said = complaint(start_server(*TINY, home=scratch / "file" / "data"))

    assert f"the data directory {scratch}/file/data cannot be written (a part of its path is a file)" in said
    assert "--data-dir" in said


def test_a_data_directory_that_an_ordinary_user_may_not_write(
    start_server: StartServer, scratch: Path, ordinary_user: int
) -> None:
    (scratch / "data").mkdir(mode=0o755)

    said = complaint(start_server(*TINY, user=ordinary_user))

    assert f"the data directory {scratch}/data cannot be written (Permission denied)" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
def test_a_data_directory_that_the_user_of_postgres_cannot_enter(start_server: StartServer, scratch: Path) -> None:
    private = scratch / "private"
    private.mkdir(mode=0o700)

    said = complaint(start_server(*TINY, home=private / "data"))

    assert f"cannot enter the data directory {private}/data" in said
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_cluster_of_another_version_of_postgres(start_server: StartServer, scratch: Path) -> None:
    cluster = scratch / "data" / "postgres"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("15\n")

    assert "is of PostgreSQL 15 and this is PostgreSQL 18" in complaint(start_server(*TINY))


def test_a_data_directory_that_is_a_cluster_itself(start_server: StartServer, scratch: Path) -> None:
    (scratch / "data").mkdir()
    (scratch / "data" / "PG_VERSION").write_text("18\n")

    assert "is itself a database cluster" in complaint(start_server(*TINY))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that does not exist")
def test_a_user_without_an_entry_in_passwd(start_server: StartServer, scratch: Path) -> None:
    skip_unless_it_can_run_python(54321)
    os.chown(scratch, 54321, 54321)

    assert "user id 54321 has no entry in /etc/passwd" in complaint(start_server(*TINY, user=54321))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that does not exist")
@pytest.mark.parametrize("home", ["private", "none"])
def test_a_user_without_an_entry_in_passwd_and_without_a_home_serves_a_database_of_its_own(
    start_server: StartServer, scratch: Path, home: str
) -> None:
    skip_unless_it_can_run_python(54321)
    os.chown(scratch, 54321, 54321)
    (scratch / "private").mkdir(mode=0o700)
    environment = {"FILE_BUFFER_DIR": ""} | ({"HOME": str(scratch / "private")} if home == "private" else {})

    server = start_server(*TINY, *NO_DATABASE, user=54321, environment=environment).wait_ready()

    assert server.answers()
    assert "no spool: pushes will be refused while PostgreSQL is away" in server.log
    assert server.stop() == 0


def test_a_cluster_that_postgres_cannot_start_from(start_server: StartServer, scratch: Path) -> None:
    assert start_server(*TINY, workers=1).wait_ready().stop() == 0
    (scratch / "data" / "postgres" / "global" / "pg_control").unlink()

    said = complaint(start_server(*TINY, workers=1))

    assert "PostgreSQL cannot be started in" in said
    assert "pg_control" in said


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("startup", "the moon is in the wrong phase"),
        ("factory", "the factory is closed on Sundays"),
        ("boot-crash", "workers die before they are ready: the last exited with code 9"),
    ],
)
def test_workers_that_cannot_start(start_server: StartServer, fault: str, sentence: str) -> None:
    server = start_server(*TINY, *NO_DATABASE, environment={"TINY_FAULT": fault})

    assert sentence in complaint(server)


def test_a_worker_whose_code_cannot_be_imported_shows_the_traceback(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, environment={"TINY_FAULT": "import"})

    assert server.wait_exit() == NEVER_SERVED
    assert "RuntimeError: this module cannot be imported" in server.log
    assert server.log.splitlines()[-1] == (
        "queen-trio: the application tiny_app:create_app cannot be imported: "
        "RuntimeError: this module cannot be imported"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--host", "host.invalid"), "the host 'host.invalid' cannot be resolved"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1 port 0: Cannot assign requested address"),
        (("--workers", "0"), "0 workers cannot be run"),
        (("--port", "70000"), "port 70000 does not exist"),
        (("--database-url", "mysql://here/there"), "the database URL must begin with postgresql://"),
        (("--database-url", "postgresql://me@here:there/q"), "the database URL cannot be read"),
    ],
)
def test_settings_that_no_default_can_stand_in_for(
    start_server: StartServer, flags: tuple[str, ...], sentence: str
) -> None:
    assert sentence in complaint(start_server(*TINY, *flags))


def test_after_a_failed_start_no_process_and_no_port_is_left(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = start_server(*TINY, port=port, environment={"TINY_FAULT": "startup"})
    offspring: dict[int, str] = {}
    while server.process.poll() is None:
        offspring |= children(server.process.pid)

    assert any("queen.worker" in command for command in offspring.values())
    assert any("postgres" in command for command in offspring.values())
    assert not [pid for pid in offspring if is_alive(pid)]
    assert is_free(port)
