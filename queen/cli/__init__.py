"""The command line: one file per command. ``main`` only parses.

Exit codes: 0 fine, 1 failed, 2 usage, 3 never served, or not running. Answers go to standard output, talk to standard
error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import queen.lean  # noqa: F401  # isort: split
from queen._version import __version__
from queen.cli import check, migrate, reencrypt, reload, run, spool, status, stop, top, tree, upgrade, workers
from queen.errors import StartupError
from queen.supervision.control_socket import Refused


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="queen-trio", description="A durable, partitioned message queue server.")
    parser.add_argument("--version", action="version", version=f"queen-trio {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (run, check, migrate, reencrypt, spool, status, top, tree, workers, reload, upgrade, stop):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except KeyboardInterrupt:  # before or after the server hears signals itself
        return 130
    except StartupError as error:
        print(f"queen-trio: {error.detail}", file=sys.stderr)
        return 3
    except Refused as refused:
        print(f"queen-trio: {refused}", file=sys.stderr)
        return 1
    finally:
        _flush_output()
    return code


def _flush_output() -> None:
    """Write out what is still buffered, or drop it where nobody reads any more: Python would exit with 120 over it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
