"""``queen-trio check``: what is well with the database and this machine, and what to change and why."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import msgspec
import trio

from queen.cli.judge import judge
from queen.cli.machine import look_at_machine
from queen.cli.run import Commands, add_database_arguments, add_spool_arguments, settings_from
from queen.config.settings import Secret, Settings
from queen.errors import StartupError
from queen.model.checkup import LEVELS, DatabaseFacts, Finding
from queen.storage import embedded
from queen.supervision.database import choose_database

UNFIT = 1


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "check",
        help="say what is well with the database and this machine, and what to change",
        description="Look at the PostgreSQL that the settings name, or at the embedded one of a running server, and at "
        "the directories and limits of this machine; say of each thing whether it is well, or what to change and why. "
        "Changes nothing. Exits with 1 when something can lose what was acknowledged.",
    )
    parser.set_defaults(command=check)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--workers", type=int, help="worker processes (QUEEN_WORKERS; one per core)")
    add_database_arguments(parser)
    add_spool_arguments(parser)


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` prints. ``fit``: nothing was found that loses messages."""

    fit: bool
    database: str
    findings: list[Finding]


def check(arguments: argparse.Namespace) -> int:
    """Look, judge, say. Returns the exit code."""
    settings = settings_from(arguments)
    report = trio.run(examine, settings)
    if arguments.json:
        print(msgspec.json.encode(report).decode())
    else:
        print(report.database)
        for finding in report.findings:
            print(line_of(finding))
        counts = Counter(finding.level for finding in report.findings)
        print(", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level]))
    return 0 if report.fit else UNFIT


async def examine(settings: Settings) -> Report:
    """All of it.

    Raises:
        StartupError: there is no database to look at.
    """
    # Not at the top: `queen-trio run` is the supervisor, which imports no database driver.
    from queen.storage.checkup import look_at_database

    database = choose_database(settings, hurry=trio.Event())
    places: list[tuple[str, Path]] = []
    server_pid: int | None = None
    ours = settings.database_url is None
    url = database.url
    if ours:
        home = (settings.data_dir or embedded.default_home()).absolute()
        places.append(("data directory", home / "postgres"))
        server_pid = embedded.holder_of(home)
        running = embedded.running_url(home)
        if running is None:
            raise StartupError(
                f"no PostgreSQL runs on {home}: start queen-trio run and check while it serves, or give --database-url"
            )
        url = running
    spool = settings.spool_dir or database.spool_dir
    if spool is not None:
        places.append(("spool", spool))
    facts: DatabaseFacts = await look_at_database(msgspec.structs.replace(settings, database_url=Secret(url)))
    findings = judge(facts, look_at_machine(places, server_pid), settings, embedded=ours)
    return Report(
        fit=all(finding.level != "danger" for finding in findings), database=database.where, findings=findings
    )


def line_of(finding: Finding) -> str:
    """A finding in one line."""
    return f"{finding.level:7} {finding.about}: {finding.found}{f' -> {finding.do}' if finding.do else ''}"
