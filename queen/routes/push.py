"""POST /api/v1/push: store messages. What an item looks like is in wire.py."""

from __future__ import annotations

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.push import read_push, write_push


async def push(context: Context, call: Call) -> Answer:
    messages = read_push(call.body)
    call.facts["messages"] = len(messages)
    if not messages:
        return Answer(201, b"[]")
    call.facts["queue"] = messages[0].queue
    call.facts["partition"] = messages[0].partition
    results = await context.engine.push(messages, call.producer_sub)
    duplicates = sum(result.duplicate for result in results)
    context.counters.pushed += len(results) - duplicates
    call.facts["duplicates"] = duplicates
    return Answer(201, write_push(messages, results))
