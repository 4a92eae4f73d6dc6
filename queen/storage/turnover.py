"""Pushes, acks and pops of a moment in one statement and one commit: together they cost one write instead of three.

Only what is common goes this way, on one bucket: pushes that need nothing but to be stored, acks that cannot fail.
Locks are taken in the order of all others: partitions, then idle cursors of what was pushed, then the cursors that are
acknowledged; claims wait for none. So a pop gets what was pushed or freed in the same write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from queen.errors import OutcomeUnknown
from queen.model.message import Ack, AckResult, PushResult
from queen.storage.acks import ACK_ARGUMENTS, Acks, Released
from queen.storage.bridge import Bridge
from queen.storage.claims import CLAIM_ARGUMENTS, ClaimOutcome, ClaimRequest, Claims, Surplus
from queen.storage.connect import Connection
from queen.storage.pushes import PUSH_ARGUMENTS, Pushes, PushRequest, Woken
from queen.storage.segments import Keyring

_COLUMNS: Final = {
    "verdict": "text", "run": "integer", "lost": "boolean", "released": "boolean", "dead": "boolean",
    "retry_count": "integer", "pending": "boolean", "request": "integer", "queue_id": "uuid", "partition_id": "uuid",
    "partition_name": "text", "first_offset": "bigint", "end_offset": "bigint", "attempt": "integer",
    "due_seconds": "double precision", "base_offset": "bigint", "message_count": "integer", "created_at": "timestamptz",
    "id_prefix": "bigint", "minted": "boolean", "codec": "smallint", "raw_bytes": "integer", "key_id": "text",
    "body": "bytea", "erased": "integer[]", "skipped": "bigint[]", "part": "integer", "group_name": "text",
}  # fmt: skip
"""Of all answers together."""

_ACK: Final = ("run", "lost", "released", "dead", "retry_count", "pending")
_PUSH: Final = ("verdict", "part", "id_prefix", "group_name")
_CLAIM: Final = tuple(
    name for name in _COLUMNS if name not in {*_ACK, *_PUSH} - {"verdict", "retry_count", "id_prefix"}
)


def _select(verb: str, columns: Sequence[str], function: str, arguments: str) -> str:
    """One part of the statement: its answer among the columns of all."""
    wanted = (name if name in columns else f"NULL::{type_} AS {name}" for name, type_ in _COLUMNS.items())
    return f"SELECT '{verb}' AS verb, {', '.join(wanted)} FROM {function}({arguments})"


def _numbers(first: int, count: int) -> str:
    return ", ".join(f"${number}" for number in range(first, first + count))


_ACKS_AT: Final = 3
_CLAIMS_AT: Final = _ACKS_AT + ACK_ARGUMENTS
_PUSHES_AT: Final = _CLAIMS_AT + CLAIM_ARGUMENTS
_PUSHED: Final = _select("push", _PUSH, "queen.push", _numbers(_PUSHES_AT, PUSH_ARGUMENTS))
_ACKED: Final = _select("ack", _ACK, "queen.ack_v2", f"$1, NULL, $2, {_numbers(_ACKS_AT, ACK_ARGUMENTS)}")
_CLAIMED: Final = _select("pop", _CLAIM, "queen.claim_v3", f"$1, NULL, $2, {_numbers(_CLAIMS_AT, CLAIM_ARGUMENTS)}")
_WITHOUT_PUSHES: Final = f"{_ACKED} UNION ALL {_CLAIMED}"
_WITH_PUSHES: Final = f"{_PUSHED} UNION ALL {_ACKED} UNION ALL {_CLAIMED}"
HOT: Final = (_WITHOUT_PUSHES, _WITH_PUSHES)  # what most requests that come one by one run


class Turned(NamedTuple):
    """What became of a write. ``pushed``: None where nothing was stored, and the pushes are to go the long way."""

    pushed: list[list[PushResult]] | None
    acked: list[list[AckResult]]
    claimed: list[ClaimOutcome]
    woken: list[Woken]
    released: list[Released]
    surpluses: list[Surplus]


class Turnover:
    """Writes of all three verbs."""

    def __init__(self, bridge: Bridge, pushes: Pushes, acks: Acks, claims: Claims, keyring: Keyring) -> None:
        self._bridge = bridge
        self._pushes = pushes
        self._acks = acks
        self._claims = claims
        self._keyring = keyring

    async def write(
        self, pushes: Sequence[PushRequest], acks: Sequence[Sequence[Ack]], requests: Sequence[ClaimRequest]
    ) -> Turned:
        """Store, acknowledge, then claim: all of it or, with an error, nothing; but pushes that turn out not to be
        common are left out. With OutcomeUnknown each push has its ``doubt``."""
        push_flush = self._pushes.common_flush_of(pushes) if pushes else None
        ack_flush = self._acks.flush_of(acks)
        claim_flush = self._claims.flush_of(requests)
        runs: list[Any] = []
        verdict: list[Woken] | str = "left out"

        async def work(connection: Connection) -> None:
            nonlocal runs, verdict
            await ack_flush.locate(connection)
            runs = ack_flush.prepare().get(0, [])
            arguments = [0, connection.epoch, *ack_flush.arguments(runs), *_claims_of(claim_flush.arguments(0))]
            if push_flush is None:
                answer = await connection.fetch(_WITHOUT_PUSHES, *arguments)
            else:
                arguments += push_flush.arguments(connection, may_create=False)
                answer = await connection.fetch(_WITH_PUSHES, *arguments)
                verdict = push_flush.take([row for row in answer if row["verb"] == "push"])
            claim_flush.take(row for row in answer if row["verb"] == "pop")
            ack_flush.hear(runs, [row for row in answer if row["verb"] == "ack"])

        try:
            await self._bridge.run(work)
        except OutcomeUnknown:
            if push_flush is not None:
                push_flush.doubt()
            raise
        pushed: list[list[PushResult]] | None = None
        woken: list[Woken] = []
        if push_flush is not None:
            if not isinstance(verdict, str):
                self._pushes.done(push_flush)
                pushed, woken = push_flush.results(), verdict
            elif verdict != "check":
                self._pushes.recover(push_flush, verdict)
        await self._acks.settle(ack_flush, runs)
        outcomes, surpluses = await self._claims.done(claim_flush)
        taken = {
            (claim.queue, request.group, claim.partition)
            for request, outcome in zip(requests, outcomes, strict=True)
            for claim in outcome.claims
        }
        woken = [news for news in woken if (news.queue.name, news.group, news.partition) not in taken]
        return Turned(pushed, ack_flush.results, outcomes, woken, ack_flush.released, surpluses)


def _claims_of(arguments: list[Any] | None) -> list[Any]:
    """Those of queen.claim_v3; none is wanted: arrays of nothing."""
    return [[]] * CLAIM_ARGUMENTS if arguments is None else arguments
