"""``queen-trio stop``: have the running server drain and exit, and wait for it."""

from __future__ import annotations

import argparse
import sys

from queen.cli.ask import Line, add_server_arguments
from queen.cli.run import Commands
from queen.model.snapshot import Snapshot
from queen.supervision.control_socket import Stop


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "stop",
        help="have the running server drain and exit",
        description="Have the running server finish what is begun and exit, and wait until its process is gone.",
    )
    parser.set_defaults(command=stop)
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="longest wait (120; 0: none)")
    add_server_arguments(parser)


def stop(arguments: argparse.Namespace) -> int:
    """Tell the server. Returns the exit code: 1 if it has not ended in time."""
    with Line(arguments) as line:
        pid = line.ask(Stop(), Snapshot).pid
        if arguments.wait > 0 and not line.wait_end(arguments.wait):
            print(f"queen-trio: process {pid} still runs after {arguments.wait:g} s", file=sys.stderr)
            return 1
    print(f"process {pid} {'has ended' if arguments.wait > 0 else 'is stopping'}")
    return 0
