"""``queen-trio reencrypt``: encrypt again with the current key what an old one encrypts, while servers serve."""

from __future__ import annotations

import argparse
import sys
from typing import Final

import msgspec
import trio

from queen.cli.run import Commands, add_database_arguments, settings_from
from queen.config.settings import Secret, Settings
from queen.errors import StartupError
from queen.supervision.database import choose_database
from queen.supervisor import first_error

PASSES: Final = 20
"""A pass leaves rows to others that are at them; so many passes in a row that still find some are given up."""

PAUSE_SECONDS: Final = 0.02
"""Between two steps, for whoever else wants the disk; and before a step that another server is at is tried again."""


class Found(msgspec.Struct):
    """What all steps together came to. ``left``: rows of the last pass that others were at."""

    reencrypted: int = 0
    left: int = 0
    missing: dict[str, int] = {}
    key_id: str = ""


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "reencrypt",
        help="encrypt again what an old key encrypts",
        description="Encrypt again with QUEEN_ENCRYPTION_KEY what is encrypted with one of QUEEN_ENCRYPTION_KEYS, in "
        "short steps, while servers serve; interrupted, it goes on where it was when it is run again. The embedded "
        "PostgreSQL of a running server is reached through that server instead: POST /api/v1/system/reencrypt.",
    )
    parser.set_defaults(command=reencrypt)
    add_database_arguments(parser)


def reencrypt(arguments: argparse.Namespace) -> int:
    """Do it and say what was done. Returns the exit code: 1 when some of it could not be."""
    settings = settings_from(arguments)
    if settings.encryption_key is None:
        raise StartupError("there is no key to encrypt with: set QUEEN_ENCRYPTION_KEY")
    failure: StartupError | None = None
    found = Found()
    try:
        found = trio.run(seal_again, settings)
    except* StartupError as group:
        failure = first_error(group)
    if failure is not None:
        raise failure
    print(f"{found.reencrypted} bodies were encrypted again, with key {found.key_id}")
    for key_id, rows in sorted(found.missing.items()):
        print(
            f"{rows} bodies are under key {key_id}, which is not here: add it to QUEEN_ENCRYPTION_KEYS", file=sys.stderr
        )
    if found.left:
        print(f"{found.left} bodies were in use all the time: run this again", file=sys.stderr)
    return 1 if found.missing or found.left else 0


async def seal_again(settings: Settings) -> Found:
    """Open storage, and go through it until nothing is left to do."""
    # Not at the top: `queen-trio run` is the supervisor, which imports no database driver.
    from queen.storage.store import open_store

    database = choose_database(settings, hurry=trio.Event())
    found = Found()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.run)
        await database.ready.wait()
        async with open_store(msgspec.structs.replace(settings, database_url=Secret(database.url))) as store:
            found.key_id = store.keyring.ids[0]
            for _ in range(PASSES):
                found.left, found.missing = 0, {}
                after: str | None = None
                while True:
                    step = await store.reencryption.step(after)
                    await trio.sleep(PAUSE_SECONDS)
                    if step is None:
                        continue
                    found.reencrypted += step.sealed
                    found.left += step.locked
                    for key_id, rows in step.missing.items():
                        found.missing[key_id] = found.missing.get(key_id, 0) + rows
                    after = step.after
                    if after is None:
                        break
                if not found.left:
                    break
        nursery.cancel_scope.cancel()
    return found
