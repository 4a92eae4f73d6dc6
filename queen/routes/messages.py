"""Routes of single messages: a message is named by its partition's id and its transaction id."""

from __future__ import annotations

from queen.errors import NotFound
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.messages import (
    read_message_query,
    write_erased,
    write_message,
    write_messages,
    write_retried,
    write_set_aside,
)
from queen.storage.places import Place


async def list_messages(context: Context, call: Call) -> Answer:
    asked = read_message_query(call.query)
    call.facts["queue"] = asked.queue
    found = await context.engine.admin.messages(asked)
    call.facts["messages"] = len(found.messages)
    return Answer(200, write_messages(found))


async def show_message(context: Context, call: Call) -> Answer:
    detail = await context.engine.admin.message(*_named(call))
    if detail is None:
        raise NotFound("Message not found")
    return Answer(200, write_message(detail))


async def delete_message(context: Context, call: Call) -> Answer:
    partition_id, transaction_id = _named(call)
    erased = await context.engine.admin.erase(partition_id, transaction_id)
    call.facts["erased"] = erased
    return Answer(200, write_erased(partition_id, transaction_id, erased=erased))


async def retry_message(context: Context, call: Call) -> Answer:
    """Out of the dead letter queue, and deliverable again; the body is not read."""
    partition_id, transaction_id = _named(call)
    retried = await context.engine.admin.retry(partition_id, transaction_id)
    if retried is None:
        raise NotFound("Message not found")
    new = None if isinstance(retried, Place) else retried.transaction_id
    return Answer(200, write_retried(transaction_id, new))


async def set_message_aside(context: Context, call: Call) -> Answer:
    """Into the dead letter queue; the body is not read."""
    partition_id, transaction_id = _named(call)
    if not await context.engine.admin.set_aside(partition_id, transaction_id):
        raise NotFound("Message not found")
    return Answer(200, write_set_aside(transaction_id))


def _named(call: Call) -> tuple[str, str]:
    partition_id, transaction_id = call.parameters["partition_id"], call.parameters["transaction_id"]
    call.facts["partition_id"] = partition_id
    return partition_id, transaction_id
