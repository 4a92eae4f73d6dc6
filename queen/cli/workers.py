"""``queen-trio workers N``: run more or fewer workers from now on."""

from __future__ import annotations

import argparse

from queen.cli.ask import Line, add_server_arguments
from queen.cli.run import Commands
from queen.model.snapshot import Snapshot
from queen.supervision.control_socket import SetWorkers


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "workers",
        help="run more or fewer workers",
        description="Run that many workers from now on, until the server ends. Workers that are too many drain first.",
    )
    parser.set_defaults(command=workers)
    parser.add_argument("count", type=int, metavar="N", help="worker processes")
    add_server_arguments(parser)


def workers(arguments: argparse.Namespace) -> int:
    """Tell the server. Returns the exit code."""
    with Line(arguments) as line:
        server = line.ask(SetWorkers(arguments.count), Snapshot)
    print(f"{server.workers_wanted} workers wanted, {server.workers_active} active")
    return 0
