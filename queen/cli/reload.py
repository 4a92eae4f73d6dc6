"""``queen-trio reload``: replace the workers one by one, without a lost request, and wait for it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from queen.cli.ask import Line, add_server_arguments
from queen.cli.run import Commands
from queen.model.snapshot import Snapshot
from queen.supervision.control_socket import Reload

LOOK_SECONDS: Final = 0.2


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "reload",
        help="replace the workers one by one",
        description="Replace the workers one by one, each ready before its predecessor drains, and wait for it. Where "
        "the new ones do not start, the old ones stay and the exit code is 1; the server's log says why.",
    )
    parser.set_defaults(command=reload)
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="longest wait (120; 0: none)")
    add_server_arguments(parser)


def reload(arguments: argparse.Namespace) -> int:
    """Tell the server. Returns the exit code: 1 if not every worker is a new one in time."""
    with Line(arguments) as line:
        before = line.status()
        after = line.ask(Reload(), Snapshot)
        deadline = time.monotonic() + arguments.wait
        while after.reloading and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            after = line.status()
    if after.reloading:
        print("reloading")
        return 0 if arguments.wait == 0 else 1
    oldest = max((slot.generation for slot in before.slots), default=0)
    left = [slot.slot for slot in after.slots if slot.generation <= oldest]
    if left:
        print(f"queen-trio: not replaced: slot {', '.join(map(str, left))}; the server's log says why", file=sys.stderr)
        return 1
    print(f"{len(after.slots)} workers replaced")
    return 0
