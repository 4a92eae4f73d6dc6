"""Bodies sealed with an old key are sealed again with the current one, a few at a time. Nothing is compressed anew.

A pass goes through the tables by their primary keys, so that it can be left anywhere and taken up there. What it does
is done in short transactions that never wait for a row: whoever else is at one keeps it, and a later pass finds it.
Pops read what they have claimed without locks and see the old body or the new one, which say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from queen.errors import EncryptionUnavailable, InvalidRequest
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.segments import Keyring

STEP_ROWS: Final = 500
"""Rows that one step looks at."""

STEP_BYTES: Final = 4 * 1024 * 1024
"""Sealed bytes after which a step ends early: AES-GCM takes about 4 ms for them, during which the loop waits."""

_LOCK: Final = 0x7175_6502
"""Key of the advisory lock that keeps the steps of several servers apart."""


class Table(NamedTuple):
    """Where sealed bodies stand, and by which columns a row is found; both are names of ours and no input."""

    name: str
    key: tuple[str, ...]
    types: tuple[str, ...]
    body: str


TABLES: Final = (
    Table("segments", ("bucket", "partition_id", "base_offset"), ("integer", "uuid", "bigint"), "body"),
    Table(
        "dead_letters",
        ("bucket", "partition_id", "message_offset", "group_name"),
        ("integer", "uuid", "bigint", "text"),
        "body",
    ),
    Table("stream_state", ("bucket", "query_id", "partition_id", "key"), ("integer", "uuid", "uuid", "bytea"), "value"),
)


class Step(msgspec.Struct, kw_only=True):
    """What one step came to. ``after``: where the next one goes on; None: this was the last.

    ``locked``: rows left to whoever is at them. ``missing``: rows whose key this server does not hold, by its id.
    """

    looked: int = 0
    sealed: int = 0
    locked: int = 0
    missing: dict[str, int] = {}
    after: str | None = None


class Place(msgspec.Struct, array_like=True):
    """Where a pass has come to: a table and the key of a row in it, as texts."""

    table: int
    key: list[str] | None = None


class Reencryption:
    """Seals again what an old key seals."""

    def __init__(self, bridge: Bridge, keyring: Keyring) -> None:
        self._bridge = bridge
        self._keyring = keyring

    async def step(self, after: str | None) -> Step | None:
        """One step of a pass that begins with ``after`` None. None: another server is at a step; ask again.

        Raises:
            EncryptionUnavailable: this server has no key to seal with.
            InvalidRequest: ``after`` is of no step.
        """
        if self._keyring.current is None:
            raise EncryptionUnavailable("*")
        place = _place(after)

        async def work(connection: Connection) -> Step | None:
            async with connection.transaction():
                if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                    return None
                return await self._work(connection, place)

        return await self._bridge.run(work)

    async def _work(self, connection: Connection, place: Place) -> Step:
        """asyncio flavor, inside a transaction."""
        table = TABLES[place.table]
        rows = await connection.fetch(_next_rows(table, first=place.key is None), *(place.key or ()), STEP_ROWS)
        step, sealed_bytes, done = Step(missing={}), 0, 0
        wanted: list[Any] = []
        for row in rows:
            done += 1
            id = row["key_id"]
            if id is not None and id != self._keyring.current:
                if id not in self._keyring:
                    step.missing[id] = step.missing.get(id, 0) + 1
                    continue
                wanted.append(row)
                sealed_bytes += row["bytes"]
                if sealed_bytes >= STEP_BYTES:
                    break
        step.looked = done
        if wanted:
            step.sealed = await self._seal_again(connection, table, wanted)
            step.locked = len(wanted) - step.sealed
        if done < len(rows) or len(rows) == STEP_ROWS:
            last = rows[done - 1]
            step.after = _text(Place(place.table, [_as_text(last[name]) for name in table.key]))
        elif place.table + 1 < len(TABLES):
            step.after = _text(Place(place.table + 1))
        return step

    async def _seal_again(self, connection: Connection, table: Table, wanted: Sequence[Any]) -> int:
        """asyncio flavor, inside a transaction. Rows that nobody else is at; returns how many."""
        columns = [[row[name] for row in wanted] for name in table.key]
        held = await connection.fetch(_hold(table), *columns)
        bodies = []
        for row in held:
            context = row["partition_id"].bytes
            opened = self._keyring.decrypt(row["sealed"], context, row["key_id"], row["queue"] or "")
            bodies.append(self._keyring.encrypt(opened, context))
        columns = [[row[name] for row in held] for name in table.key]
        await connection.execute(_replace(table), *columns, bodies, self._keyring.current)
        return len(held)


def _next_rows(table: Table, *, first: bool) -> str:
    key = ", ".join(table.key)
    given = ", ".join(f"${number}::text::{kind}" for number, kind in enumerate(table.types, 1))
    where = "" if first else f"WHERE ({key}) > ({given})"
    limit = 1 if first else len(table.key) + 1
    return (
        f"SELECT {key}, key_id, octet_length({table.body}) AS bytes FROM queen.{table.name} {where}"
        f" ORDER BY {key} LIMIT ${limit}"
    )


def _given(table: Table) -> str:
    arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(table.types, 1))
    return f"unnest({arrays}) AS given ({', '.join(table.key)})"


def _hold(table: Table) -> str:
    return (
        f"SELECT t.key_id, t.{table.body} AS sealed, {', '.join(f't.{name}' for name in table.key)},"
        " (SELECT q.name FROM queen.partitions p JOIN queen.queues q USING (queue_id)"
        " WHERE p.bucket = t.bucket AND p.partition_id = t.partition_id) AS queue"
        f" FROM queen.{table.name} t JOIN {_given(table)} USING ({', '.join(table.key)})"
        f" WHERE t.key_id IS NOT NULL FOR NO KEY UPDATE OF t SKIP LOCKED"
    )


def _replace(table: Table) -> str:
    count = len(table.key)
    arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(table.types, 1))
    same = " AND ".join(f"t.{name} = given.{name}" for name in table.key)
    return (
        f"UPDATE queen.{table.name} t SET {table.body} = given.resealed, key_id = ${count + 2}"
        f" FROM unnest({arrays}, ${count + 1}::bytea[]) AS given ({', '.join(table.key)}, resealed) WHERE {same}"
    )


def _as_text(value: object) -> str:
    return f"\\x{value.hex()}" if isinstance(value, bytes) else str(value)


def _text(place: Place) -> str:
    return msgspec.json.encode(place).hex()


def _place(after: str | None) -> Place:
    if not after:
        return Place(0)
    try:
        place = msgspec.json.decode(bytes.fromhex(after), type=Place)
        if 0 <= place.table < len(TABLES) and (place.key is None or len(place.key) == len(TABLES[place.table].key)):
            return place
    except (ValueError, msgspec.DecodeError):
        pass
    raise InvalidRequest("after must be what the step before has answered")
