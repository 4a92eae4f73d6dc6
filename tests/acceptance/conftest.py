"""Servers that start with a test and leave nothing behind after it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .support import Server

StartServer = Callable[..., Server]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that any user may enter: as root, PostgreSQL runs under another user, who cannot enter tmp_path."""
    directory = Path(tempfile.mkdtemp(prefix="queen-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)  # a PostgreSQL that is ending removes files, too


@pytest.fixture
def start_server(scratch: Path) -> Iterator[StartServer]:
    """Starts servers with data in ``scratch``; the keyword ``home`` names another directory."""
    servers: list[Server] = []

    def start(*flags: str, home: Path | None = None, **options: Any) -> Server:
        server = Server(home or scratch / "data", *flags, logs=scratch, **options)
        servers.append(server)
        return server

    yield start
    for server in reversed(servers):
        server.end()


@pytest.fixture(params=["ourselves", "ordinary user"])
def user(request: pytest.FixtureRequest, scratch: Path) -> int | None:
    """Whom to run the server as: ourselves and, when we are root, an unprivileged user who owns ``scratch``."""
    if request.param == "ourselves":
        return None
    uid: int = request.getfixturevalue("ordinary_user")
    os.chown(scratch, uid, uid)
    return uid


@pytest.fixture
def ordinary_user() -> int:
    """An unprivileged user that a server can be started as."""
    if os.geteuid() != 0:
        pytest.skip("only root starts a server as another user; as an ordinary user the other tests say the same")
    uid = pwd.getpwnam("nobody").pw_uid
    skip_unless_it_can_run_python(uid)
    return uid


def skip_unless_it_can_run_python(uid: int) -> None:
    try:
        subprocess.run([sys.executable, "-c", "import trio"], user=uid, group=uid, extra_groups=[], cwd="/", check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this interpreter and its packages lie where an ordinary user cannot reach them")
