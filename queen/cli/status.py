"""``queen-trio status``: how the running server is. Exit code 0: well; 1: degraded; 3: not running."""

from __future__ import annotations

import argparse

import msgspec

from queen.cli.ask import Line, add_server_arguments
from queen.cli.run import Commands
from queen.cli.show import headline, row, table
from queen.model.snapshot import HEALTHY

DEGRADED = 1


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "status",
        help="say how the running server is",
        description="Say how the running server is. Exit code 0: it serves; 1: it is starting, degraded or stopping; "
        "3: no server answers.",
    )
    parser.set_defaults(command=status)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_server_arguments(parser)


def status(arguments: argparse.Namespace) -> int:
    """Ask, show. Returns the exit code."""
    with Line(arguments) as line:
        server = line.status()
    if arguments.json:
        print(msgspec.json.encode(server).decode())
    else:
        print(headline(server))
        print(*table([row(slot) for slot in server.slots]), sep="\n")
    return 0 if server.state in HEALTHY else DEGRADED
