"""HTTP: read, call the engine once, write. Every route of the server stands in ``ROUTES``.

A part of a path in angle brackets is one segment, still percent-encoded when it is matched and decoded once after,
so that ``%2F`` is a slash inside a name. A raw slash always separates segments: a name with a slash in it must come
encoded, otherwise the path means something else or nothing. An empty segment is the empty name, which is legal.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from queen.auth.levels import Level
from queen.routes import (
    ack,
    analytics,
    dead_letters,
    groups,
    health,
    leases,
    messages,
    metrics,
    pop,
    push,
    queues,
    resources,
    status,
    streams,
    system,
    traces,
    transactions,
)
from queen.routes.call import Handler


class Route(NamedTuple):
    """``level``: what a token must give. ``probe``: also answers HEAD, and is served while all else may be refused."""

    method: str
    path: str
    handler: Handler
    level: Level = Level.READ_WRITE
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
    Route("DELETE", "/api/v1/resources/queues/<queue>", queues.delete, Level.ADMIN),
    Route("GET", "/api/v1/resources/queues", resources.list_queues, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/queues/<queue>", resources.show_queue, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/queues/<queue>/depth", resources.show_depth, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/partitions", resources.list_partitions, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/namespaces", resources.list_namespaces, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/tasks", resources.list_tasks, Level.READ_ONLY),
    Route("GET", "/api/v1/resources/overview", resources.show_overview, Level.READ_ONLY),
    Route("DELETE", "/api/v1/queues/<queue>/clear", resources.clear, Level.ADMIN),
    Route("GET", "/api/v1/messages", messages.list_messages, Level.READ_ONLY),
    Route("GET", "/api/v1/messages/<partition_id>/<transaction_id>", messages.show_message, Level.READ_ONLY),
    Route("DELETE", "/api/v1/messages/<partition_id>/<transaction_id>", messages.delete_message),
    Route("POST", "/api/v1/messages/<partition_id>/<transaction_id>/retry", messages.retry_message),
    Route("POST", "/api/v1/messages/<partition_id>/<transaction_id>/dlq", messages.set_message_aside),
    Route("GET", "/api/v1/dlq", dead_letters.list_dead_letters, Level.READ_ONLY),
    Route("DELETE", "/api/v1/dlq", dead_letters.remove_dead_letters),
    Route("POST", "/api/v1/dlq/redrive", dead_letters.redrive),
    Route("POST", "/api/v1/traces", traces.record),
    Route("GET", "/api/v1/traces/names", traces.list_names, Level.READ_ONLY),
    Route("GET", "/api/v1/traces/by-name/<name>", traces.list_by_name, Level.READ_ONLY),
    Route("GET", "/api/v1/traces/<partition_id>/<transaction_id>", traces.list_of_message, Level.READ_ONLY),
    Route("GET", "/api/v1/consumer-groups", groups.list_groups, Level.READ_ONLY),
    Route("GET", "/api/v1/consumer-groups/lagging", groups.list_lagging, Level.READ_ONLY),
    Route("GET", "/api/v1/consumer-groups/<group>", groups.show_group, Level.READ_ONLY),
    Route("DELETE", "/api/v1/consumer-groups/<group>", groups.delete_group, Level.ADMIN),
    Route("DELETE", "/api/v1/consumer-groups/<group>/queues/<queue>", groups.delete_group, Level.ADMIN),
    Route("POST", "/api/v1/consumer-groups/<group>/subscription", groups.change_subscription),
    Route("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/seek", groups.seek),
    Route("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/partitions/<partition>/seek", groups.seek_partition),
    Route("POST", "/streams/v1/queries", streams.register),
    Route("POST", "/streams/v1/cycle", streams.cycle),
    Route("POST", "/streams/v1/state/get", streams.read_state, Level.READ_ONLY),
    Route("POST", "/api/v1/stats/refresh", status.refresh, Level.ADMIN),
    Route("GET", "/api/v1/status", status.show_status, Level.READ_ONLY),
    Route("GET", "/api/v1/status/queues", status.list_queues, Level.READ_ONLY),
    Route("GET", "/api/v1/status/queues/<queue>", status.show_queue, Level.READ_ONLY),
    Route("GET", "/api/v1/status/queues/<queue>/messages", status.list_queue_messages, Level.READ_ONLY),
    Route("GET", "/api/v1/status/analytics", status.show_analytics, Level.READ_ONLY),
    Route("GET", "/api/v1/status/buffers", status.show_buffers, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/worker-metrics", analytics.show_worker_metrics, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/system-metrics", analytics.show_system_metrics, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/queue-lag", analytics.show_queue_lag, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/queue-ops", analytics.show_queue_ops, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/queue-parked-replicas", analytics.show_parked, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/retention", analytics.show_retention, Level.READ_ONLY),
    Route("GET", "/api/v1/analytics/postgres-stats", analytics.show_postgres, Level.READ_ONLY),
    Route("GET", "/api/v1/system/maintenance", system.show_maintenance, Level.ADMIN),
    Route("POST", "/api/v1/system/maintenance", system.switch_maintenance, Level.ADMIN),
    Route("GET", "/api/v1/system/maintenance/pop", system.show_pop_maintenance, Level.ADMIN),
    Route("POST", "/api/v1/system/maintenance/pop", system.switch_pop_maintenance, Level.ADMIN),
    Route("GET", "/api/v1/system/shared-state", system.show_shared_state, Level.ADMIN),
    Route("POST", "/internal/api/notify", system.notify, Level.ADMIN),
    Route("GET", "/internal/api/shared-state/stats", system.show_shared_state, Level.ADMIN),
    Route("GET", "/internal/api/inter-instance/stats", system.show_shared_state, Level.ADMIN),
    Route("POST", "/api/v1/migration/test-connection", system.migrate, Level.ADMIN),
    Route("POST", "/api/v1/migration/start", system.migrate, Level.ADMIN),
    Route("POST", "/api/v1/migration/validate", system.migrate, Level.ADMIN),
    Route("POST", "/api/v1/migration/reset", system.migrate, Level.ADMIN),
    Route("GET", "/api/v1/migration/status", system.migrate, Level.ADMIN),
    Route("GET", "/metrics", metrics.show_metrics, Level.READ_ONLY),
    Route("GET", "/metrics/prometheus", metrics.show_prometheus, Level.READ_ONLY),
    Route("GET", "/health", health.health, Level.READ_ONLY, probe=True),
    Route("GET", "/livez", health.livez, Level.OPEN, probe=True),
    Route("GET", "/readyz", health.readyz, Level.OPEN, probe=True),
)
