"""HTTP: read, call the engine once, write. Every route of the server stands in ``ROUTES``.

A part of a path in angle brackets is one segment, still percent-encoded when it is matched and decoded once after,
so that ``%2F`` is a slash inside a name. A raw slash always separates segments: a name with a slash in it must come
encoded, otherwise the path means something else or nothing. An empty segment is the empty name, which is legal.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from queen.routes import (
    ack,
    dead_letters,
    groups,
    health,
    leases,
    messages,
    pop,
    push,
    queues,
    resources,
    streams,
    traces,
    transactions,
)
from queen.routes.call import Handler


class Route(NamedTuple):
    """``probe``: also answers HEAD, and must be served while everything else may be refused."""

    method: str
    path: str
    handler: Handler
    probe: bool = False


ROUTES: Final = (
    Route("POST", "/api/v1/configure", queues.configure),
    Route("POST", "/api/v1/push", push.push),
    Route("GET", "/api/v1/pop/queue/<queue>", pop.pop),
    Route("GET", "/api/v1/pop/queue/<queue>/partition/<partition>", pop.pop),
    Route("GET", "/api/v1/pop", pop.pop),
    Route("POST", "/api/v1/ack", ack.ack),
    Route("POST", "/api/v1/ack/batch", ack.ack_batch),
    Route("POST", "/api/v1/transaction", transactions.transact),
    Route("POST", "/api/v1/lease/<lease_id>/extend", leases.extend),
    Route("DELETE", "/api/v1/resources/queues/<queue>", queues.delete),
    Route("GET", "/api/v1/resources/queues", resources.list_queues),
    Route("GET", "/api/v1/resources/queues/<queue>", resources.show_queue),
    Route("GET", "/api/v1/resources/queues/<queue>/depth", resources.show_depth),
    Route("GET", "/api/v1/resources/partitions", resources.list_partitions),
    Route("GET", "/api/v1/resources/namespaces", resources.list_namespaces),
    Route("GET", "/api/v1/resources/tasks", resources.list_tasks),
    Route("GET", "/api/v1/resources/overview", resources.show_overview),
    Route("DELETE", "/api/v1/queues/<queue>/clear", resources.clear),
    Route("GET", "/api/v1/messages", messages.list_messages),
    Route("GET", "/api/v1/messages/<partition_id>/<transaction_id>", messages.show_message),
    Route("DELETE", "/api/v1/messages/<partition_id>/<transaction_id>", messages.delete_message),
    Route("POST", "/api/v1/messages/<partition_id>/<transaction_id>/retry", messages.retry_message),
    Route("POST", "/api/v1/messages/<partition_id>/<transaction_id>/dlq", messages.set_message_aside),
    Route("GET", "/api/v1/dlq", dead_letters.list_dead_letters),
    Route("POST", "/api/v1/traces", traces.record),
    Route("GET", "/api/v1/traces/names", traces.list_names),
    Route("GET", "/api/v1/traces/by-name/<name>", traces.list_by_name),
    Route("GET", "/api/v1/traces/<partition_id>/<transaction_id>", traces.list_of_message),
    Route("GET", "/api/v1/consumer-groups", groups.list_groups),
    Route("GET", "/api/v1/consumer-groups/lagging", groups.list_lagging),
    Route("GET", "/api/v1/consumer-groups/<group>", groups.show_group),
    Route("DELETE", "/api/v1/consumer-groups/<group>", groups.delete_group),
    Route("DELETE", "/api/v1/consumer-groups/<group>/queues/<queue>", groups.delete_group),
    Route("POST", "/api/v1/consumer-groups/<group>/subscription", groups.change_subscription),
    Route("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/seek", groups.seek),
    Route("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/partitions/<partition>/seek", groups.seek_partition),
    Route("POST", "/streams/v1/queries", streams.register),
    Route("POST", "/streams/v1/cycle", streams.cycle),
    Route("POST", "/streams/v1/state/get", streams.read_state),
    Route("GET", "/health", health.health, probe=True),
    Route("GET", "/livez", health.livez, probe=True),
    Route("GET", "/readyz", health.readyz, probe=True),
)
