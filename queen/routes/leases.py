"""POST /api/v1/lease/:leaseId/extend: more time for everything held under a lease."""

from __future__ import annotations

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.queue import read_extension, write_extension


async def extend(context: Context, call: Call) -> Answer:
    seconds = read_extension(call.body)
    lease_id = call.parameters["lease_id"]
    extension = await context.engine.extend_lease(lease_id, seconds)
    call.facts["lease_id"], call.facts["renewed"] = lease_id, extension.renewed
    return Answer(200, write_extension(extension))
