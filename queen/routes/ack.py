"""POST /api/v1/ack and /api/v1/ack/batch: what became of messages. Refusals of single acks are data, not errors."""

from __future__ import annotations

from collections.abc import Sequence

from queen.model.message import Ack
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.ack import read_ack, read_ack_batch, write_acks


async def ack(context: Context, call: Call) -> Answer:
    return await _ack(context, call, [read_ack(call.body)])


async def ack_batch(context: Context, call: Call) -> Answer:
    return await _ack(context, call, read_ack_batch(call.body))


async def _ack(context: Context, call: Call, acks: Sequence[Ack]) -> Answer:
    call.facts["acks"] = len(acks)
    if not acks:
        return Answer(200, b"[]")
    call.facts["group"] = acks[0].group
    results = await context.engine.ack(acks)
    succeeded = sum(result.success for result in results)
    context.counters.acked += succeeded
    call.facts["refused"] = len(results) - succeeded
    return Answer(200, write_acks(results))
