"""POST /api/v1/configure and DELETE /api/v1/resources/queues/:queue: queues come and go."""

from __future__ import annotations

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.body import check_name
from queen.routes.wire.queue import read_configure, write_configured, write_deleted


async def configure(context: Context, call: Call) -> Answer:
    """Create a queue, or replace all options of an existing one."""
    wanted = read_configure(call.body, context.settings.queue_defaults)
    call.facts["queue"] = wanted.queue
    queue, partition_id = await context.engine.configure(wanted.queue, wanted.namespace, wanted.task, wanted.options)
    return Answer(200, write_configured(queue, partition_id))


async def delete(context: Context, call: Call) -> Answer:
    """Delete a queue with everything in it; a missing one is deleted already."""
    name = check_name(call.parameters["queue"], "queue")
    existed = await context.engine.delete_queue(name)
    call.facts["queue"], call.facts["existed"] = name, existed
    return Answer(200, write_deleted(name, existed))
