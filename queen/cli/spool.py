"""``queen-trio spool``: what waits in the spool, what was set aside, and what is to become of that."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import trio

from queen.cli.run import Commands, add_database_arguments, add_spool_arguments, settings_from
from queen.cli.show import size
from queen.config.settings import Settings
from queen.errors import SpoolUnavailable, StartupError
from queen.supervision.database import choose_database

if TYPE_CHECKING:
    from queen.storage.spool import SetAside, Spool

PAGE: Final = 100
"""Entries that are read, or moved, at a time: a server that runs writes to the same file."""


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "spool",
        help="show what waits in the spool and what was set aside; try it again, or discard it",
        description="Show what waits in the spool of this server, and which pushes of it could not be stored and were "
        "set aside. The server may run or not.",
    )
    parser.set_defaults(command=spool)
    add_database_arguments(parser)
    add_spool_arguments(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--retry",
        nargs="*",
        type=int,
        metavar="NUMBER",
        help="have these (or all) that were set aside stored after all that waits, as soon as the spool is drained",
    )
    choice.add_argument(
        "--discard", nargs="+", type=int, metavar="NUMBER", help="delete these that were set aside, for good"
    )


def spool(arguments: argparse.Namespace) -> int:
    """Show, or do. Returns the exit code: 1 when a number names nothing."""
    try:
        return trio.run(_spool, settings_from(arguments), arguments)
    except SpoolUnavailable as error:
        raise StartupError(error.detail) from error


async def _spool(settings: Settings, arguments: argparse.Namespace) -> int:
    # Not at the top: `queen-trio run` is the supervisor, which opens no spool.
    from queen.storage.segments import Keyring
    from queen.storage.spool import open_spool

    directory = settings.spool_dir or choose_database(settings, hurry=trio.Event()).spool_dir
    try:
        there = directory is not None and (directory / "spool.sqlite3").exists()
    except OSError as error:
        raise StartupError(
            f"the spool in {directory} cannot be read ({error.strerror}): run this as its user"
        ) from error
    if directory is None or not there:
        raise StartupError(f"there is no spool in {directory or 'the usual place'}: name it with --spool-dir")
    async with open_spool(directory, settings.spool_max_bytes, Keyring(None)) as opened:
        if arguments.retry is not None:
            return await _take_out(opened, arguments.retry, opened.try_again, "to be stored")
        if arguments.discard is not None:
            return await _take_out(opened, arguments.discard, opened.discard, "discarded")
        figures = opened.figures
        print(
            f"{directory}: {figures.pending_messages} messages wait ({size(figures.pending_bytes)}), "
            f"{figures.quarantined_messages} are set aside ({size(figures.quarantined_bytes)}), "
            f"of {size(settings.spool_max_bytes)}"
        )
        async for entry in _all(opened):
            print(describe(entry))
    return 0


async def _all(opened: Spool) -> AsyncIterator[SetAside]:
    after = 0
    while entries := await opened.set_asides(after, PAGE):
        for entry in entries:
            yield entry
        after = entries[-1].number


async def _take_out(opened: Spool, numbers: list[int], take: Callable[[list[int]], Awaitable[int]], what: str) -> int:
    found = {entry.number async for entry in _all(opened)}
    wanted = sorted(set(numbers) & found if numbers else found)
    messages = 0
    for start in range(0, len(wanted), PAGE):
        messages += await take(wanted[start : start + PAGE])
    print(f"{messages} message{'s' if messages != 1 else ''} {what}")
    unknown = sorted(set(numbers) - found)
    if unknown:
        print(f"not set aside, or not any more: {', '.join(map(str, unknown))}")
    return 1 if unknown else 0


def describe(entry: SetAside) -> str:
    """An entry of the quarantine in one line."""
    accepted = datetime.fromtimestamp(entry.accepted_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return (
        f"{entry.number:>8}  {accepted}  {entry.messages:>6} messages  {size(entry.size):>9}  "
        f"queue {entry.queue!r}: {entry.reason}"
    )
