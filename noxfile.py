"""What can be done with a checkout, one session each. `nox -l` lists them; without arguments: tests, lint, type.

`python -m pip install nox && nox -s tests` is all a fresh machine needs. Requirements are the project's own metadata:
its dependencies and the `[dependency-groups]` of pyproject.toml, which are read here because pip before 25.1 cannot.
Nothing here names an index, a mirror or an interpreter that has to be present.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"  # the first with nox.project.dependency_groups
nox.options.sessions = ["tests", "lint", "type"]
nox.options.reuse_existing_virtualenvs = True  # installs are repeated, environments are not

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
SUITES = ("unit", "engine", "http", "serving", "properties", "migrations")  # the quickest first; acceptance comes last
IN_PARALLEL = ("-n", "2")  # each process has a PostgreSQL of its own, or servers; half of a test is waiting
CLIENTS = ("0.15.0", "2.6.0")  # the generations of queen-mq that must work unchanged


def install(session: nox.Session, *groups: str) -> None:
    """Install the project as a user would (not editable: a file missing from the wheel must fail), and its groups."""
    requirements = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install(str(ROOT), *requirements)


def run_tests(session: nox.Session) -> None:
    install(session, "tests")
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    suites = [f"tests/{suite}" for suite in SUITES if (ROOT / "tests" / suite).is_dir()]
    session.run("pytest", *IN_PARALLEL, *suites)
    session.run("pytest", *IN_PARALLEL, "tests/http", env={"QUEEN_TEST_FAST_HTTP": "1"})  # past hypercorn and Quart
    session.run("pytest", *IN_PARALLEL, "tests/acceptance")  # last: real processes, and what is done to them


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, HTTP, property, migration and acceptance tests on the interpreter that runs nox."""
    run_tests(session)


@nox.session(name="tests-all", python=nox.project.python_versions(PYPROJECT))
def tests_all(session: nox.Session) -> None:
    """The same on every supported Python found on this machine."""
    run_tests(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and the import contracts."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session(name="type")
def type_check(session: nox.Session) -> None:
    """mypy, strict, on the package, the tests, the benchmarks and this file."""
    install(session, "type")
    targets = [name for name in ("queen", "tests", "perf", "noxfile.py") if (ROOT / name).exists()]
    # without packages in tests/, two conftest.py would be one module to mypy
    session.run("mypy", "--strict", "--explicit-package-bases", *targets)


@nox.session
def conformance(session: nox.Session) -> None:
    """Drive a server with the published clients, on one worker and on two.

    Each client lives in a virtual environment of its own and runs in a directory outside this tree: its import name
    is `queen` too. Arguments after `--` go to tests/conformance/drive.py (`--workers 2`, `-k push`).
    """
    install(session, "tests")
    clients: list[str] = []
    for version in CLIENTS:
        home = Path(session.virtualenv.location).resolve() / "clients" / version
        python = home / "bin" / "python"
        if not python.exists():
            shutil.rmtree(home, ignore_errors=True)
            session.run("python", "-m", "venv", str(home), silent=True)
        session.run(str(python), "-m", "pip", "install", "--quiet", f"queen-mq=={version}", "pytest>=8", external=True)
        clients += ["--client", f"{version}={python}"]
    session.run(
        "python",
        str(ROOT / "tests" / "conformance" / "drive.py"),
        *clients,
        *session.posargs,
    )


@nox.session
def contract(session: nox.Session) -> None:
    """Ask two servers for all that /openapi.json says, and for what it does not. Arguments go to pytest."""
    install(session, "contract")
    session.run("pytest", "tests/contract", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """100,000 broken requests on raw sockets, over both ways through the server. Arguments go to tests.fuzz."""
    install(session, "tests")
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Throughput, latency and CPU per message; writes JSON beside the table. Arguments go to perf.bench."""
    install(session, "tests")
    session.run("python", "-m", "perf.bench", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Other durable queues at the same work on the same machine. Arguments go to perf.peers."""
    install(session, "peers")
    session.run("python", "-m", "perf.peers", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """A quarter of an hour of mixed load, to see whether anything grows, or hours of it. Arguments go to perf.soak."""
    install(session, "tests")
    session.run("python", "-m", "perf.soak", *session.posargs)


@nox.session
def supervision(session: nox.Session) -> None:
    """Process supervisors, others' and ours: the same harm to each, measured. Arguments go to perf.supervision."""
    install(session, "tests")
    session.run("python", "-m", "perf.supervision", *session.posargs)


@nox.session
def campaign(session: nox.Session) -> None:
    """Hours of load with processes killed underneath it. Arguments go to perf.campaign."""
    install(session, "tests")
    session.run("python", "-m", "perf.campaign", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Faults thrown at real processes under load, each judged by its threshold. Arguments go to tests.faults.

    Half an hour with five seeds of each; `--pace quick` for a few minutes, names of faults for less.
    """
    install(session, "tests")
    session.run("pytest", "tests/faults")  # that the judges can find anything
    session.run("python", "-m", "tests.faults", *session.posargs)


@nox.session
def run(session: nox.Session) -> None:
    """Start a server from this checkout. Arguments go to `queen-trio run`."""
    install(session)
    session.run("queen-trio", "run", *session.posargs)
