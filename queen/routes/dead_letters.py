"""GET /api/v1/dlq: the messages that were set aside after their last delivery."""

from __future__ import annotations

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.dead_letters import read_dead_letter_query, write_dead_letters


async def list_dead_letters(context: Context, call: Call) -> Answer:
    asked = read_dead_letter_query(call.query)
    call.facts["queue"] = asked.queue
    total, letters = await context.engine.dead_letters(
        queue=asked.queue,
        partition=asked.partition,
        group=asked.group,
        failed_from=asked.failed_from,
        failed_to=asked.failed_to,
        limit=asked.limit,
        offset=asked.offset,
    )
    call.facts["messages"] = len(letters)
    return Answer(200, write_dead_letters(asked, total, letters))
