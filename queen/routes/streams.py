"""POST /streams/v1/queries, /cycle and /state/get: the server side of the clients' streaming SDK."""

from __future__ import annotations

from queen.model.stream import CycleResult, Registration
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.stream import (
    read_cycle,
    read_state_request,
    read_stream_query,
    write_cycle,
    write_registration,
    write_state,
)


async def register(context: Context, call: Call) -> Answer:
    """A query begins, or begins again. 409: its operators have changed and its state does not fit them."""
    query = read_stream_query(call.body)
    call.facts["stream"], call.facts["queue"] = query.name, query.source_queue
    query_id, outcome = await context.engine.register_stream(query)
    call.facts["outcome"] = outcome.value
    status = 409 if outcome is Registration.MISMATCH else 200
    return Answer(status, write_registration(query, query_id, outcome))


async def cycle(context: Context, call: Call) -> Answer:
    """One step of a query, all or nothing: a cycle that cannot be applied is 200 and says why."""
    request = read_cycle(call.body)
    call.facts["query_id"], call.facts["partition_id"] = request.query_id, request.partition_id
    if request.cycle is None:
        result = CycleResult(error=request.refusal)
    else:
        result = await context.engine.cycle_stream(request.cycle, call.producer_sub)
        call.facts["messages"], call.facts["state_ops"] = len(request.cycle.messages), len(request.cycle.changes)
    if result.error is not None:
        call.facts["refusal"] = result.error
    context.counters.pushed += sum(not pushed.duplicate for pushed in result.pushed)
    context.counters.acked += result.consumed
    return Answer(200, write_cycle(request, result))


async def read_state(context: Context, call: Call) -> Answer:
    request = read_state_request(call.body)
    rows = []
    if request.query_id is not None and request.partition_id is not None:
        rows = await context.engine.stream_state(request.query_id, request.partition_id, request.wanted)
    call.facts["rows"] = len(rows)
    return Answer(200, write_state(rows))
