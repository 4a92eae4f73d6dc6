"""`queen-trio check` beside a server that runs, as an operator calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .conftest import StartServer
from .support import PROJECT


def check(home: Path) -> tuple[int, dict[str, Any]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("QUEEN_", "PG_", "FILE_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "queen", "check", "--json", "--data-dir", str(home)],
        env=clean | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def test_the_embedded_database_of_a_server_that_runs_is_fit(start_server: StartServer, scratch: Path) -> None:
    start_server(workers=1).wait_ready()

    code, report = check(scratch / "data")

    assert report["database"] == f"data in {scratch / 'data'}"
    found = {finding["about"]: finding for finding in report["findings"]}
    for name in ("fsync", "full_page_writes", "synchronous_commit", "autovacuum", "encoding", "connections", "schema"):
        assert found[name]["level"] == "well", found[name]
    assert found["data directory"]["found"].startswith(str(scratch / "data" / "postgres"))
    in_memory = [each for each in report["findings"] if each["level"] == "danger"]  # where tests run in a tmpfs
    assert all("in memory" in each["found"] for each in in_memory)
    assert code == (1 if in_memory else 0)
