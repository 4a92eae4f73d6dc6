"""What can be said of the embedded PostgreSQL without starting it."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from queen.errors import StartupError
from queen.storage.embedded import (
    Cluster,
    Identity,
    Programs,
    choose_identity,
    default_home,
    running_url,
    severity,
)

NOBODY = pwd.struct_passwd(("nobody", "x", 65534, 65534, "", "/", "/bin/false"))


def cluster(home: Path) -> Cluster:
    programs = Programs(Path("/programs"), "18.6")
    return Cluster(programs, Identity("me", 1000, 1000, switch=False), home, home / "postgres", home / "run", lock=-1)


def test_as_root_an_unprivileged_user_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", {"nobody": NOBODY}.__getitem__)

    assert choose_identity() == Identity("nobody", 65534, 65534, switch=True)


def test_as_root_without_an_unprivileged_user_there_is_nobody_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", {}.__getitem__)

    with pytest.raises(StartupError, match="there is no user postgres or nobody to run it as"):
        choose_identity()


def test_a_user_called_postgres_who_is_root_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    root = pwd.struct_passwd(("postgres", "x", 0, 0, "", "/", "/bin/sh"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", {"postgres": root, "nobody": NOBODY}.__getitem__)

    assert choose_identity().name == "nobody"


def test_as_root_a_cluster_is_run_as_the_user_who_owns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwuid", {65534: NOBODY}.__getitem__)

    assert choose_identity(owner_uid=65534) == Identity("nobody", 65534, 65534, switch=True)
    with pytest.raises(StartupError, match="user id 4711 has no entry in /etc/passwd"):
        choose_identity(owner_uid=4711)


def test_an_ordinary_user_runs_it_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(pwd, "getpwuid", {65534: NOBODY}.__getitem__)

    identity = choose_identity()

    assert (identity.name, identity.switch) == ("nobody", False)
    assert identity.popen_options() == {}


def test_the_data_lies_in_the_users_data_directory_and_for_root_in_that_of_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/me/data")
    assert default_home() == Path("/home/me/data/queen-trio")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/queen-trio")


@pytest.mark.parametrize("setting", ["fsync=on", "synchronous_commit=on", "full_page_writes=on", "listen_addresses="])
def test_no_configuration_file_can_weaken_what_the_command_line_says(setting: str) -> None:
    command = cluster(Path("/data")).command()

    assert command[command.index(setting) - 1] == "-c"


def test_the_url_leads_to_the_socket_directory_whatever_its_name() -> None:
    parts = urlsplit(cluster(Path("/da ta/ü&?#")).url)

    assert parse_qs(parts.query) == {"host": ["/da ta/ü&?#/run"], "port": ["5432"]}
    assert parts.password is None


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (b"LOG:  checkpoint starting: time", "info"),
        (b"DETAIL:  more of it", "info"),
        (b"WARNING:  there is no transaction", "warning"),
        (b"ERROR:  deadlock detected", "error"),
        (b"FATAL:  the database system is starting up", "error"),
        (b"PANIC:  could not write", "error"),
    ],
)
def test_the_level_of_a_line_of_its_log(line: bytes, level: str) -> None:
    assert severity(line) == level


def test_a_directory_without_a_server_has_no_url(tmp_path: Path) -> None:
    assert running_url(tmp_path) is None
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "postmaster.pid").write_text("")
    assert running_url(tmp_path) is None


def test_a_process_that_is_no_server_of_that_directory_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n/\n0\n5432\n/run\n")

    assert running_url(tmp_path) is None


def test_who_may_not_look_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)

    with pytest.raises(StartupError, match="another user's"):
        running_url(tmp_path)
