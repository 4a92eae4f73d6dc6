"""``queen-trio tree``: what the running server is doing, down to the SQL, and what it waits for."""

from __future__ import annotations

import argparse

import msgspec

from queen.cli.ask import Line, add_server_arguments
from queen.cli.run import Commands
from queen.cli.show import describe, draw
from queen.model.tree import Branch
from queen.supervision.control_socket import Tree


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "tree",
        help="show what the running server is doing",
        description="Show the supervisor, its workers, their connections, the requests on them and the SQL of those, "
        "each with what it waits for and for how many seconds; and who in PostgreSQL blocks it.",
    )
    parser.set_defaults(command=tree)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a drawing")
    add_server_arguments(parser)


def tree(arguments: argparse.Namespace) -> int:
    """Ask, show. Returns the exit code."""
    with Line(arguments) as line:
        root = line.ask(Tree(), Branch)
    if arguments.json:
        print(msgspec.json.encode(root).decode())
    else:
        print(describe(root))
        print(*draw(root), sep="\n")
    return 0
