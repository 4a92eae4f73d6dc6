"""What a process of ours loads only where it is used: memory that is held once for each process."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {
    *("queen.app", "queen.service", "queen.routes", "queen.engine", "queen.worker", "queen.storage.store"),
    *("asyncpg", "trio_asyncio", "quart", "werkzeug", "hypercorn", "httptools", "h2", "cryptography", "jwt", "httpx"),
    *("zstandard", "sqlite3", "rich", "pygments", "greenlet"),
}


def test_the_supervisor_imports_nothing_that_it_does_not_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import queen.cli, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )

    assert not HEAVY & set(done.stdout.split())


def test_what_was_left_out_for_the_logs_can_be_imported_all_the_same() -> None:
    subprocess.run([sys.executable, "-c", "import queen.cli, rich.table"], check=True)


def test_what_is_loaded_already_is_left_alone() -> None:
    code = "import rich, queen.lean, sys; assert sys.modules['rich'] is rich and 'greenlet' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
