"""Routes of traces. A consumer that cannot record one goes on: nothing here is worth failing for."""

from __future__ import annotations

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.body import check_name
from queen.routes.wire.query import read_query
from queen.routes.wire.traces import (
    NamedTracesQuery,
    NamesQuery,
    read_trace,
    write_named_traces,
    write_recorded,
    write_trace_names,
    write_traces,
)


async def record(context: Context, call: Call) -> Answer:
    trace = read_trace(call.body)
    trace_id = await context.engine.admin.record_trace(trace)
    call.facts["recorded"] = trace_id is not None
    return Answer(404 if trace_id is None else 201, write_recorded(trace_id))


async def list_by_name(context: Context, call: Call) -> Answer:
    name = check_name(call.parameters["name"], "name")
    asked = read_query(call.query, NamedTracesQuery)
    total, traces = await context.engine.admin.traces_by_name(name, asked.limit, asked.offset)
    return Answer(200, write_named_traces(total, traces, asked.limit, asked.offset))


async def list_names(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, NamesQuery)
    total, names = await context.engine.admin.trace_names(asked.limit, asked.offset)
    return Answer(200, write_trace_names(total, names, asked.limit, asked.offset))


async def list_of_message(context: Context, call: Call) -> Answer:
    partition_id, transaction_id = call.parameters["partition_id"], call.parameters["transaction_id"]
    return Answer(200, write_traces(await context.engine.admin.traces_of(partition_id, transaction_id)))
