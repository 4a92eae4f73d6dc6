"""Who is compared, and how each is started with settings as equal as they come."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
PACKAGES = ("gunicorn", "uvicorn", "uvicorn-worker", "hypercorn[trio]", "httptools")
SHOWN = ("gunicorn", "uvicorn", "uvicorn-worker", "hypercorn", "trio")
WORKERS = 2
GRACE_SECONDS = 5
HANG_SECONDS = 10
RSS_MB = 200  # where there is such a setting
MAX_REQUESTS = "1500"  # where a leak is limited by a number of requests: 20 s of the load, or 200 MB of the leak


class Contender(NamedTuple):
    """``command`` is given the interpreter of the peers and a port."""

    name: str
    command: Callable[[str, int], list[str]]
    reloads: bool = True  # SIGHUP is said to replace the workers
    environment: Mapping[str, str] = MappingProxyType({})
    threads: int = 0  # of a worker, where a connection takes one: more are not opened
    upgrades: bool = False  # SIGUSR2 is said to start the program anew beside the old one, or in its place
    against_leaks: tuple[str, ...] = ()  # what its documentation advises


def gunicorn(*options: str, app: str = "wsgi_app:app") -> Callable[[str, int], list[str]]:
    def command(python: str, port: int) -> list[str]:
        timeouts = ["--graceful-timeout", str(GRACE_SECONDS), "--timeout", str(HANG_SECONDS)]
        start = [python, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "-w", str(WORKERS), "--log-level", "info"]
        return [*start, *timeouts, *options, app]

    return command


def uvicorn(python: str, port: int) -> list[str]:
    start = [python, "-m", "uvicorn", "--port", str(port), "--workers", str(WORKERS), "--no-access-log"]
    timeouts = ["--timeout-graceful-shutdown", str(GRACE_SECONDS), "--timeout-worker-healthcheck", str(HANG_SECONDS)]
    return [*start, *timeouts, "asgi_app:app"]


def hypercorn(kind: str) -> Callable[[str, int], list[str]]:
    def command(python: str, port: int) -> list[str]:
        start = [python, "-m", "hypercorn", "-b", f"127.0.0.1:{port}", "-w", str(WORKERS), "-k", kind]
        return [*start, "--graceful-timeout", str(GRACE_SECONDS), "asgi_app:app"]

    return command


def ours(_python: str, port: int) -> list[str]:
    nowhere = "postgresql://nobody@nowhere.invalid/none"  # the tiny application asks it nothing
    start = [sys.executable, "-P", "-m", "queen", "run", "--port", str(port), "--workers", str(WORKERS)]
    return [*start, "--app", "asgi_app:create_app", "--database-url", nowhere]


def of_gunicorn(name: str, *options: str, kind: str = "", app: str = "wsgi_app:app", threads: int = 0) -> Contender:
    return Contender(
        f"gunicorn {name}",
        gunicorn("-k", kind or name, *options, app=app),
        threads=threads,
        upgrades=True,
        against_leaks=("--max-requests", MAX_REQUESTS, "--max-requests-jitter", "100"),
    )


CONTENDERS = [
    Contender(
        "queen-trio",
        ours,
        environment={
            "QUEEN_GRACE_SECONDS": str(GRACE_SECONDS),
            "QUEEN_HANG_SECONDS": str(HANG_SECONDS),
            "QUEEN_MAX_WORKER_RSS_MB": str(RSS_MB),
            "LOG_FORMAT": "json",
        },
        upgrades=True,
    ),
    of_gunicorn("sync", threads=1),
    of_gunicorn("gthread", "--threads", "100", threads=100),
    of_gunicorn("uvicorn", kind="uvicorn_worker.UvicornWorker", app="asgi_app:app"),
    Contender("uvicorn", uvicorn, against_leaks=("--limit-max-requests", MAX_REQUESTS)),
    Contender("hypercorn asyncio", hypercorn("asyncio"), reloads=False, against_leaks=("--max-requests", MAX_REQUESTS)),
    Contender("hypercorn trio", hypercorn("trio"), reloads=False, against_leaks=("--max-requests", MAX_REQUESTS)),
]


def make_environment(home: Path) -> str:
    """The interpreter of a virtual environment with the peers in it."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *PACKAGES], check=True)
    return str(python)


def versions(python: str) -> dict[str, str]:
    """What is compared."""
    code = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *SHOWN], check=True, capture_output=True, text=True)
    own = subprocess.run(
        [sys.executable, "-c", "from queen._version import __version__; print(__version__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    return dict(zip(SHOWN, done.stdout.split(), strict=True)) | {"queen-trio": own.stdout.strip()}


def environment_of(contender: Contender, directory: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (HERE, PROJECT)))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("QUEEN_", "PG_", "GUNICORN"))}
    return (
        clean | {"PYTHONPATH": path, "CONTEST": str(directory), "PYTHONUNBUFFERED": "1"} | dict(contender.environment)
    )
