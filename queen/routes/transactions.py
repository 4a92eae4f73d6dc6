"""POST /api/v1/transaction: pushes and acks, all of them or none."""

from __future__ import annotations

from queen.model.message import AckResult
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.transaction import read_transaction, write_refused_transaction, write_transaction


async def transact(context: Context, call: Call) -> Answer:
    transaction = read_transaction(call.body)
    call.facts["operations"] = len(transaction.operations)
    if transaction.unknown is not None:
        return Answer(200, write_refused_transaction(None, f"Unknown operation type: {transaction.unknown}"))
    outcome = await context.engine.transact(transaction.operations, transaction.required_leases, call.producer_sub)
    acked = sum(isinstance(result, AckResult) for result in outcome.results)
    context.counters.acked += acked
    context.counters.pushed += len(outcome.results) - acked
    call.facts["applied"] = outcome.error is None
    return Answer(200, write_transaction(transaction.operations, outcome))
