"""POST /api/v1/push: store messages. What an item looks like is in wire.py."""

from __future__ import annotations

from queen.errors import QueueFull, SpoolFull, SpoolUnavailable
from queen.model.message import Buffered
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.push import read_push, refused_results, write_buffered, write_failed, write_push


async def push(context: Context, call: Call) -> Answer:
    messages = read_push(call.body)
    call.facts["messages"] = len(messages)
    if not messages:
        return Answer(201, b"[]")
    call.facts["queue"] = messages[0].queue
    call.facts["partition"] = messages[0].partition
    try:
        results = await context.engine.push(messages, call.producer_sub)
    except (SpoolFull, SpoolUnavailable) as error:  # an array, as the contract has it: no problem document
        call.facts["code"] = error.code
        context.counters.failed_requests += 1
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return Answer(error.status, write_failed(messages, error), headers=headers)
    except QueueFull as error:
        error.results = refused_results(messages, error)
        raise
    if isinstance(results, Buffered):
        context.counters.pushed += len(messages)
        call.facts["buffered"] = True
        return Answer(201, write_buffered(messages, results))
    duplicates = sum(result.duplicate for result in results)
    context.counters.pushed += len(results) - duplicates
    call.facts["duplicates"] = duplicates
    return Answer(201, write_push(messages, results))
