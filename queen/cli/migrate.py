"""``queen-trio migrate``: bring the database to the form this version knows, without serving."""

from __future__ import annotations

import argparse

import msgspec
import trio

from queen.cli.run import Commands, add_database_arguments, settings_from
from queen.config.settings import Secret, Settings
from queen.errors import StartupError
from queen.supervision.database import choose_database
from queen.supervisor import first_error


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "migrate",
        help="bring the database to the form this version knows",
        description="Apply the migrations that the database lacks. The server does so too when it starts; this command "
        "is for a role that may change tables, when the server's role may not.",
    )
    parser.set_defaults(command=migrate)
    add_database_arguments(parser)


def migrate(arguments: argparse.Namespace) -> int:
    """Migrate and say so. Returns the exit code."""
    settings = settings_from(arguments)
    failure: StartupError | None = None
    try:
        buckets = trio.run(bring_up_to_date, settings)
    except* StartupError as group:
        failure = first_error(group)
    if failure is not None:
        raise failure
    print(f"the database is up to date ({buckets} {'bucket' if buckets == 1 else 'buckets'})")
    return 0


async def bring_up_to_date(settings: Settings) -> int:
    """Open storage, which migrates it, and close it again. Returns the number of its buckets."""
    # Not at the top: `queen-trio run` is the supervisor, which imports no database driver.
    from queen.storage.store import open_store

    database = choose_database(settings, hurry=trio.Event())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.run)
        await database.ready.wait()
        async with open_store(msgspec.structs.replace(settings, database_url=Secret(database.url))) as store:
            buckets = store.buckets
        nursery.cancel_scope.cancel()
    return buckets
