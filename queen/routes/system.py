"""Switches of the server, and what the contract has for servers of other kinds, answered as far as it applies."""

from __future__ import annotations

from typing import Final, Literal, NotRequired, TypedDict

import msgspec

from queen.errors import InvalidRequest, Overloaded, Unsupported
from queen.routes.call import Answer, Call, Context
from queen.routes.health import is_connected
from queen.routes.wire.body import body_fields, decode_body


class SwitchBody(msgspec.Struct, frozen=True):
    """A switch to turn on or off."""

    enabled: bool


class BufferStats(TypedDict):
    """Pushes that wait in the spool."""

    pending: int
    failed: int
    dbHealthy: bool


class Maintenance(TypedDict):
    """Which switches are on, and what waits because of them."""

    maintenanceMode: bool
    popMaintenanceMode: bool
    bufferedMessages: int
    bufferHealthy: bool
    bufferStats: BufferStats


class MaintenanceSwitched(TypedDict):
    """Whether pushes go to the spool now, and what waits there."""

    maintenanceMode: bool
    bufferedMessages: int
    bufferHealthy: bool
    message: str


class PopMaintenance(TypedDict):
    """Whether pops are switched off."""

    popMaintenanceMode: bool
    message: NotRequired[str]


class NotShared(TypedDict):
    """Servers share nothing beside the database."""

    enabled: bool
    reason: str


class Notified(TypedDict):
    """Heard."""

    status: Literal["ok"]


class ReencryptBody(msgspec.Struct, frozen=True):
    """Where a pass goes on; it begins without."""

    after: str | None = None


class Reencrypted(TypedDict):
    """What one step came to. ``locked``: rows for a later pass; ``missing``: rows by the id of a key that is not here;
    ``after``: for the next step, null: this pass is over."""

    keyId: str
    looked: int
    reencrypted: int
    locked: int
    missing: dict[str, int]
    after: str | None


_REENCRYPT: Final = msgspec.json.Decoder(ReencryptBody)
_SWITCH: Final = msgspec.json.Decoder(SwitchBody)

_NOT_SHARED: Final = msgspec.json.encode(NotShared(enabled=False, reason="servers share nothing but the database"))


def _refuse_reencrypt(body: bytes) -> ReencryptBody:
    body_fields(body)
    raise InvalidRequest("after must be a string")


def _refuse_switch(body: bytes) -> SwitchBody:
    body_fields(body)
    raise InvalidRequest("enabled (boolean) is required")


async def show_maintenance(context: Context, call: Call) -> Answer:
    """Answered in an outage too: then the switches are as this worker last saw them."""
    engine = context.engine
    healthy = await is_connected(context)
    if healthy:
        await engine.read_switches()
    figures = engine.spooling.figures
    return Answer(
        200,
        msgspec.json.encode(
            Maintenance(
                {
                    "maintenanceMode": engine.spooling.maintenance,
                    "popMaintenanceMode": engine.pops_paused,
                    "bufferedMessages": figures.pending_messages,
                    "bufferHealthy": healthy if engine.spooling.spool is None else engine.spooling.takes_pushes,
                    "bufferStats": {
                        "pending": figures.pending_messages,
                        "failed": figures.quarantined_messages,
                        "dbHealthy": healthy,
                    },
                }
            )
        ),
    )


async def switch_maintenance(context: Context, call: Call) -> Answer:
    """Pushes of every worker go to the spool, of those that come after the answer, also over restarts."""
    enabled = decode_body(call.body, _SWITCH, _refuse_switch).enabled
    spooling = context.engine.spooling
    if spooling.spool is None and enabled:
        raise Unsupported("this server has no spool for pushes to go to: set FILE_BUFFER_DIR")
    await context.engine.pause_pushes(paused=enabled)
    call.facts["enabled"] = enabled
    return Answer(
        200,
        msgspec.json.encode(
            MaintenanceSwitched(
                {
                    "maintenanceMode": enabled,
                    "bufferedMessages": spooling.figures.pending_messages,
                    "bufferHealthy": spooling.spool is None or spooling.takes_pushes,
                    "message": "Maintenance mode enabled: pushes go to the spool"
                    if enabled
                    else "Maintenance mode disabled: the spool is drained",
                }
            )
        ),
    )


async def show_pop_maintenance(context: Context, call: Call) -> Answer:
    return Answer(200, msgspec.json.encode(PopMaintenance(popMaintenanceMode=await context.engine.admin.pops_paused())))


async def switch_pop_maintenance(context: Context, call: Call) -> Answer:
    """Every pop of every worker answers with nothing, of those that come after the answer, also over restarts."""
    enabled = decode_body(call.body, _SWITCH, _refuse_switch).enabled
    await context.engine.pause_pops(paused=enabled)
    call.facts["enabled"] = enabled
    message = "Pop maintenance mode enabled" if enabled else "Pop maintenance mode disabled"
    return Answer(200, msgspec.json.encode(PopMaintenance(popMaintenanceMode=enabled, message=message)))


async def reencrypt(context: Context, call: Call) -> Answer:
    """One step of sealing again what an old key seals; ``after`` of its answer is where the next one goes on."""
    asked = decode_body(call.body, _REENCRYPT, _refuse_reencrypt) if call.body else ReencryptBody()
    step = await context.engine.admin.reencrypt(asked.after)
    if step is None:
        raise Overloaded("another server is at such a step: ask again")
    call.facts["sealed"] = step.sealed
    answer: Reencrypted = {
        "keyId": context.engine.admin.key_ids[0],
        "looked": step.looked,
        "reencrypted": step.sealed,
        "locked": step.locked,
        "missing": step.missing,
        "after": step.after,
    }
    return Answer(200, msgspec.json.encode(answer))


async def show_shared_state(context: Context, call: Call) -> Answer:
    return Answer(200, _NOT_SHARED)


async def notify(context: Context, call: Call) -> Answer:
    """A hint from a server of another kind: ours tell each other through the database."""
    return Answer(200, b'{"status":"ok"}')


async def migrate(context: Context, call: Call) -> Answer:
    raise Unsupported("not supported")
