"""``queen-trio upgrade``: have the running server go on under the program that is there now, and wait for it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from queen.cli.ask import Line, NotRunning, add_server_arguments
from queen.cli.run import Commands
from queen.model.snapshot import Snapshot
from queen.supervision.control_socket import Upgrade

LOOK_SECONDS: Final = 0.2


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "upgrade",
        help="go on under the program that is installed now",
        description="Have the running server execute the program that is installed now in its own place, and replace "
        "its workers, without a lost request; wait for it. Where the new program does not come up, the old one goes on "
        "and the exit code is 1; the server's log says why.",
    )
    parser.set_defaults(command=upgrade)
    parser.add_argument("--wait", type=float, default=180.0, metavar="SECONDS", help="longest wait (180; 0: none)")
    add_server_arguments(parser)


def upgrade(arguments: argparse.Namespace) -> int:
    """Tell the server. Returns the exit code: 1 if not every worker is a new one in time."""
    with Line(arguments) as line:
        before = line.status()
        after: Snapshot | None = line.ask(Upgrade(), Snapshot)
    deadline = time.monotonic() + arguments.wait
    while (after is None or after.upgrading or after.reloading) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        after = look(arguments)
    if arguments.wait == 0:
        print("upgrading")
        return 0
    newest = max((slot.generation for slot in before.slots), default=0)
    if after is None or after.reloading or any(slot.generation <= newest for slot in after.slots):
        print("queen-trio: not upgraded; the server's log says why", file=sys.stderr)
        return 1
    print(f"queen-trio {before.version} goes on as {after.version}, {len(after.slots)} workers replaced")
    return 0


def look(arguments: argparse.Namespace) -> Snapshot | None:
    """How the server is; None for the moment in which one program makes room for the other."""
    try:
        with Line(arguments) as line:
            return line.status()
    except NotRunning:
        return None
