"""Runs the conformance suite: a real server, the published clients against it, a table of what came out.

    python tests/conformance/drive.py --client 0.15.0=PYTHON --client 2.6.0=PYTHON [--workers N]... [pytest arguments]

PYTHON is the interpreter of a virtual environment that holds that version of queen-mq and pytest. For each number of
workers a server is started (`queen-trio run` of the environment this script runs in, embedded PostgreSQL in a
temporary directory) and the clients and the plain HTTP suite run against it side by side: each test has queues of its
own, and strangers on the same server are part of what is tested. The server must then stop cleanly, with nothing wrong
in its log. No assertion about a message is made here.

The clients race themselves in places (docs/reference/clients.md), and three suites at once on two cores make them lose.
So up to SECOND_CHANCES failed tests of a suite are run once more, alone, against the same server. What passes then is
named in the table, and what fails again has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

READY_SECONDS = 90  # initdb, migrations and workers, on two busy cores
STOP_SECONDS = 40  # the contract promises 30
SUITE_SECONDS = 600  # one client on one server; a hang is a failure, not a wait
SECOND_CHANCES = 2  # failed tests of a suite that are run again, alone; more than that is no accident
FULL_LOAD = 100_000  # messages of a load case, as the reference suites have it
SHORT_LOAD = 20_000  # the same case where another combination has shown the full number
FULL_PARTITIONS, SHORT_PARTITIONS = 5_000, 1_000  # likewise, of the case with many partitions

SWITCHES = "test_switches.py"  # turns the server's switches: run after all else, and one suite at a time

OWN_SETTINGS = ("QUEEN_", "PG_", "JWT_", "DEFAULT_", "DATABASE_URL", "PYTHONPATH", "PYTHONHOME")


@dataclass
class Suite:
    """One pytest run against one server."""

    name: str
    command: list[str]
    directory: Path
    environment: dict[str, str]
    output: Path = field(init=False)
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    flaky: list[str] = field(default_factory=list)  # tests that passed only when run alone
    starts: int = 0

    def start(self, *extra: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        self.output = self.directory / f"output-{self.starts}.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*self.command, "-o", f"cache_dir={self.directory / 'cache'}", *extra],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float) -> None:
        """Until it ends and its output is printed. Killed when it takes longer, and then it has failed."""
        assert self.process is not None
        try:
            self.code = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.code = None
        print(f"\n──── {self.name} " + "─" * max(0, 100 - len(self.name)), flush=True)
        sys.stdout.write(self.output.read_text(errors="replace"))
        if self.code is None:
            print(f"killed after {seconds:.0f} s")
        sys.stdout.flush()

    def failed_tests(self) -> list[str]:
        lines = self.output.read_text(errors="replace").splitlines()
        return [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]

    def closing_line(self) -> str:
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        line = lines[-1].strip("= ") if lines else "no output"
        return f"{line}, alone, after failing beside the others: {', '.join(self.flaky)}" if self.flaky else line


class ServerError(Exception):
    """The server did not start, did not stop, or complained while it ran."""


def clean_environment() -> dict[str, str]:
    """This environment without what would configure a server or shadow a client."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def running_server(workers: int, scratch: Path, **settings: str) -> Iterator[str]:
    """A server with `workers` workers on a free port; yields its URL. `settings` are variables of its environment.

    Raises ServerError with the end of its log if it does not come up, does not go down within STOP_SECONDS, exits
    with anything but 0, or logged an error.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = scratch / "server.log"
    environment = clean_environment() | {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "QUEEN_WORKERS": str(workers),
        "QUEEN_ENCRYPTION_KEY": secrets.token_hex(32),
        "RETENTION_INTERVAL": "2000",
        "LOG_LEVEL": "info",
        "LOG_FORMAT": "json",
        **settings,
    }
    command = [str(Path(sys.executable).with_name("queen-trio")), "run", "--data-dir", str(scratch / "data")]
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready(url):
            if server.poll() is not None:
                raise ServerError(f"the server exited with {server.returncode} before it was ready\n{tail(log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {READY_SECONDS} s\n{tail(log)}")
            time.sleep(0.1)  # another process: there is nothing to wait on but its port
        yield url
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server was still up {STOP_SECONDS} s after SIGTERM\n{tail(log)}") from None
        if code != 0:
            raise ServerError(f"the server exited with {code} after SIGTERM\n{tail(log)}")
        if complaints := errors_in(log):
            raise ServerError("the server logged errors:\n" + "\n".join(complaints[:20]))
    finally:
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def errors_in(log: Path) -> list[str]:
    """Lines of the server's log at level error or worse, and anything that looks like a traceback."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            if line.startswith("Traceback") or "Exception Group Traceback" in line:
                found.append(line)
            continue
        if isinstance(record, dict) and str(record.get("level", "")).lower() in {"error", "critical", "exception"}:
            found.append(line)
    return found


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def authenticating_server(scratch: Path) -> Iterator[dict[str, str]]:
    """A second server, which wants tokens; yields what a suite needs to know of it."""
    home = scratch / "authenticating"
    home.mkdir()
    home.chmod(scratch.stat().st_mode & 0o777)  # PostgreSQL's user has to pass through
    secret = secrets.token_hex(32)
    with running_server(1, home, JWT_ENABLED="true", JWT_SECRET=secret) as url:
        yield {"QUEEN_AUTH_URL": url, "QUEEN_AUTH_SECRET": secret}


def suites_for(
    known: dict[str, str],
    url: str,
    workers: int,
    clients: dict[str, str],
    scratch: Path,
    full_load: bool,
    arguments: list[str],
) -> list[Suite]:
    """The HTTP suite, and one suite per client. The oldest has the full load, the newest most partitions."""
    shared = clean_environment() | {
        "QUEEN_URL": url,
        "QUEEN_SERVER_WORKERS": str(workers),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    suites = [
        Suite(
            name="plain HTTP",
            command=[sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"),
                     str(HERE / "test_seed.py"), *arguments],
            directory=scratch / "http",
            environment=shared,
        )
    ]  # fmt: skip
    for version, python in clients.items():
        suites.append(
            Suite(
                name=f"queen-mq {version}",
                command=[python, "-m", "pytest", "-c", str(HERE / "clients" / "pytest.ini"),
                         str(HERE / "clients"), f"--ignore={HERE / 'clients' / SWITCHES}", *arguments],
                directory=scratch / f"client-{version}",
                environment=shared
                | known
                | {
                    "QUEEN_CLIENT_VERSION": version,
                    "QUEEN_LOAD_MESSAGES": str(FULL_LOAD if full_load and version == min(clients) else SHORT_LOAD),
                    "QUEEN_MANY_PARTITIONS": str(
                        FULL_PARTITIONS if full_load and version == max(clients) else SHORT_PARTITIONS
                    ),
                },
            )
        )  # fmt: skip
    return suites


def switching(suites: list[Suite]) -> list[Suite]:
    """For each suite with a client, one of the cases that turn the server's switches."""
    ignored = f"--ignore={HERE / 'clients' / SWITCHES}"
    return [
        Suite(
            name=f"{suite.name}, switches",
            command=[
                str(HERE / "clients" / SWITCHES) if argument == str(HERE / "clients") else argument
                for argument in suite.command
                if argument != ignored
            ],
            directory=suite.directory / "switches",
            environment=suite.environment,
        )
        for suite in suites
        if ignored in suite.command
    ]


def run_alone(suites: list[Suite]) -> None:
    """Run one after the other."""
    for suite in suites:
        suite.start()
        suite.wait(SUITE_SECONDS)


def run_suites(suites: list[Suite]) -> None:
    """Run all at once, then once more alone what little failed."""
    begun = time.monotonic()
    try:
        for suite in suites:
            suite.start()
        for suite in suites:
            suite.wait(begun + SUITE_SECONDS - time.monotonic())
        for suite in suites:
            failed = suite.failed_tests()
            if suite.code == 1 and 0 < len(failed) <= SECOND_CHANCES:
                suite.flaky = failed
                suite.start("--last-failed", "--last-failed-no-failures", "none")
                suite.wait(SUITE_SECONDS)
    finally:
        for suite in suites:
            if suite.process is not None and suite.process.poll() is None:
                suite.process.kill()
                suite.process.wait()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", action="append", default=[], metavar="VERSION=PYTHON")
    parser.add_argument("--workers", action="append", type=int, default=[])
    parser.add_argument("--keep", action="store_true", help="leave the data directories and logs behind")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    options, arguments = parse(argv)
    clients = dict(entry.split("=", 1) for entry in options.client)
    counts = options.workers or [1, 2]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or servers would be left behind
    outcome: list[tuple[int, str, str, bool]] = []
    for workers in counts:
        # the system's own temporary directory: reachable for the unprivileged user that PostgreSQL runs as under root
        scratch = Path(tempfile.mkdtemp(prefix="queen-conformance-"))
        if os.getuid() == 0:
            scratch.chmod(0o711)
        print(f"\n════ {workers} worker{'s' if workers > 1 else ''}, in {scratch}", flush=True)
        suites: list[Suite] = []
        try:
            with running_server(workers, scratch) as url, authenticating_server(scratch) as known:
                suites = suites_for(known, url, workers, clients, scratch, workers == max(counts), arguments)
                run_suites(suites)
                last = switching(suites)
                suites += last
                run_alone(last)
            outcome.append((workers, "the server itself", "started, stopped cleanly, no errors in its log", True))
        except ServerError as error:
            print(f"\n{error}", flush=True)
            outcome.append((workers, "the server itself", str(error).splitlines()[0], False))
            options.keep = True
        for suite in suites:
            # 5: nothing matched, which is no failure when the caller narrowed the choice with -k
            passed = suite.code == 0 or (suite.code == 5 and bool(arguments))
            outcome.append((workers, suite.name, suite.closing_line(), passed))
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print("\n════ conformance")
    for workers, name, line, passed in outcome:
        print(f"{'ok  ' if passed else 'FAIL'} {workers} worker(s)  {name:<18} {line}")
    return 0 if outcome and all(passed for *_, passed in outcome) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
