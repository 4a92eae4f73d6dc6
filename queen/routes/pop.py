"""GET pop in its three forms. Long polls wait in the engine; the answer streams when it is large."""

from __future__ import annotations

from typing import Final

from queen.errors import EncryptionUnavailable, QueenError
from queen.model.message import PopRequest
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.pop import read_pop, write_batch
from queen.streaming.delivery import Delivery

NOTHING = Answer(204, None)

MAX_UNREADABLE: Final = 10
"""Queues that a pop by labels finds unreadable before it says so. Each is left out for a while once it is known."""


async def pop(context: Context, call: Call) -> Answer:
    """The next messages, or 204. From the engine's answer on, the batch is in ``call.delivery``."""
    request = read_pop(call.parameters, call.query, context.settings)
    call.facts["queue"], call.facts["partition"] = request.queue, request.partition
    call.facts["group"] = request.group
    call.patient = request.timeout_seconds is not None
    for _ in range(MAX_UNREADABLE):
        try:
            return await _pop(context, call, request)
        except EncryptionUnavailable:
            if request.queue is not None:
                raise
    return await _pop(context, call, request)


async def _pop(context: Context, call: Call, request: PopRequest) -> Answer:
    batch = await context.engine.pop(request)
    if batch is None:
        call.facts["messages"] = 0
        return NOTHING
    call.delivery = delivery = Delivery(
        batch,
        write_batch(batch),
        context.counters,
        threshold_bytes=context.settings.stream_threshold_bytes,
        chunk_bytes=context.settings.stream_chunk_bytes,
    )
    call.facts["messages"], call.facts["partitions"] = batch.message_count, len(batch.claims)
    try:
        await delivery.prepare()
    except QueenError:
        await delivery.abandon()  # before the answer: whoever asks again at once must find it
        raise
    if delivery.messages == 0:  # all of it was removed, by retention or with its queue, since it was claimed
        await delivery.abandon()
        return NOTHING
    return Answer(200, delivery)
