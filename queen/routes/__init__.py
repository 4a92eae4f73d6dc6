"""HTTP: read, call the engine once, write. Every route of the server stands in ``ROUTES``.

A part of a path in angle brackets is one segment, still percent-encoded when it is matched and decoded once after,
so that ``%2F`` is a slash inside a name. A raw slash always separates segments: a name with a slash in it must come
encoded, otherwise the path means something else or nothing. An empty segment is the empty name, which is legal.

A route says with which types its handler reads and writes; ``/openapi.json`` is made of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from queen.auth.levels import Level
from queen.errors import EncryptionUnavailable, NotFound, QueenError, QueueFull, RouteNotFound, Unsupported
from queen.routes import (
    ack,
    analytics,
    dead_letters,
    groups,
    health,
    leases,
    messages,
    metrics,
    openapi,
    pop,
    push,
    queues,
    resources,
    status,
    streams,
    system,
    traces,
    transactions,
    webapp,
)
from queen.routes.call import Handler
from queen.routes.wire.ack import AckBatchBody, AckBody, Acked
from queen.routes.wire.analytics import (
    Parked,
    PostgresAnswer,
    QueueLagPoint,
    QueueOps,
    Retention,
    SystemMetrics,
    WorkerMetrics,
)
from queen.routes.wire.dead_letters import DeadLetterList, DeadLetterQuery, RedriveBody, RemovalQuery, Selected
from queen.routes.wire.groups import (
    DeletedGroup,
    DeletionQuery,
    GroupEntry,
    LaggingEntry,
    LaggingQuery,
    MovedGroup,
    MovedPartition,
    Positions,
    SeekBody,
    Subscribed,
    SubscriptionBody,
)
from queen.routes.wire.messages import (
    Erased,
    MessageDetailAnswer,
    MessageList,
    MessagesQuery,
    QueueMessagesQuery,
    Retried,
    SetAside,
    ShortMessage,
)
from queen.routes.wire.metrics import MetricsAnswer, PrometheusText
from queen.routes.wire.pop import LabelPopQuery, Popped, PopQuery, QueuePopQuery
from queen.routes.wire.push import Failed, PushBody, Pushed
from queen.routes.wire.queue import (
    ConfigureBody,
    Configured,
    DeletedQueue,
    Extended,
    ExtensionBody,
    Health,
    Liveness,
    Readiness,
)
from queen.routes.wire.resources import (
    Cleared,
    ClearQuery,
    DeletedPartition,
    DepthQuery,
    NamespaceList,
    OverviewAnswer,
    PartitionList,
    PartitionQuery,
    QueueDepth,
    QueueDetail,
    QueueList,
    QueueQuery,
    QueueStatusQuery,
    TaskList,
)
from queen.routes.wire.status import (
    Buffers,
    Refreshed,
    StatusAnalytics,
    StatusAnswer,
    StatusQueueAnswer,
    StatusQueueList,
)
from queen.routes.wire.stream import (
    CycleAnswer,
    CycleBody,
    Mismatched,
    Registered,
    StateAnswer,
    StateBody,
    StreamQueryBody,
)
from queen.routes.wire.traces import (
    NamedTraceList,
    NamedTracesQuery,
    NamesQuery,
    Recorded,
    TraceBody,
    TraceList,
    TraceNameList,
)
from queen.routes.wire.transaction import TransactionAnswer, TransactionBody
from queen.routes.wire.window import IntervalQuery, QueueWindowQuery, WindowQuery


class Route(NamedTuple):
    """One method of one path.

    ``summary``: what it does, in a few words.
    ``level``: what a token must give.
    ``probe``: also answers HEAD, and is served while all else may be refused.
    ``query``, ``body``: what its handler reads. ``body_optional``: none at all is read too.
    ``answers``: by status, the type of what is sent; None: no body.
    ``refusals``: errors of its own, beside those that any route may answer with.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, Any]
    level: Level = Level.READ_WRITE
    probe: bool = False
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    body_optional: bool = False
    refusals: tuple[type[QueenError], ...] = ()


READ_ONLY: Final = Level.READ_ONLY
ADMIN: Final = Level.ADMIN

SEALED: Final = (EncryptionUnavailable,)
MISSING: Final = (NotFound,)
FULL: Final = (QueueFull,)

ROUTES: Final = (
    Route(
        *("POST", "/api/v1/configure", queues.configure),
        summary="Create a queue, or replace all of its options",
        body=ConfigureBody,
        answers={200: Configured},
    ),
    Route(
        *("POST", "/api/v1/push", push.push),
        summary="Store messages",
        body=PushBody,
        answers={201: list[Pushed], 500: list[Failed]},
        refusals=SEALED + FULL,
    ),
    Route(
        *("GET", "/api/v1/pop/queue/<queue>", pop.pop),
        summary="Take messages from any partition of a queue",
        query=QueuePopQuery,
        answers={200: Popped, 204: None},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/pop/queue/<queue>/partition/<partition>", pop.pop),
        summary="Take messages from one partition",
        query=PopQuery,
        answers={200: Popped, 204: None},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/pop", pop.pop),
        summary="Take messages from any queue with a namespace, a task, or both",
        query=LabelPopQuery,
        answers={200: Popped, 204: None},
        refusals=SEALED,
    ),
    Route(
        *("POST", "/api/v1/ack", ack.ack),
        summary="Say what became of one message",
        body=AckBody,
        answers={200: list[Acked]},
        refusals=SEALED,
    ),
    Route(
        *("POST", "/api/v1/ack/batch", ack.ack_batch),
        summary="Say what became of several messages",
        body=AckBatchBody,
        answers={200: list[Acked]},
        refusals=SEALED,
    ),
    Route(
        *("POST", "/api/v1/transaction", transactions.transact),
        summary="Push and acknowledge as one step",
        body=TransactionBody,
        answers={200: TransactionAnswer},
        refusals=(*SEALED, *FULL, RouteNotFound),
    ),
    Route(
        *("POST", "/api/v1/lease/<lease_id>/extend", leases.extend),
        summary="Keep a lease longer",
        body=ExtensionBody,
        body_optional=True,
        answers={200: Extended},
    ),
    Route(
        *("DELETE", "/api/v1/resources/queues/<queue>", queues.delete),
        summary="Delete a queue with all that is in it",
        level=ADMIN,
        answers={200: DeletedQueue},
    ),
    Route(
        *("GET", "/api/v1/resources/queues", resources.list_queues),
        summary="List queues, newest first",
        level=READ_ONLY,
        query=QueueQuery,
        answers={200: QueueList},
    ),
    Route(
        *("GET", "/api/v1/resources/queues/<queue>", resources.show_queue),
        summary="Show a queue with its partitions",
        level=READ_ONLY,
        answers={200: QueueDetail},
        refusals=MISSING,
    ),
    Route(
        *("GET", "/api/v1/resources/queues/<queue>/depth", resources.show_depth),
        summary="Show what is pending on a queue",
        level=READ_ONLY,
        query=DepthQuery,
        answers={200: QueueDepth},
        refusals=MISSING,
    ),
    Route(
        *("GET", "/api/v1/resources/partitions", resources.list_partitions),
        summary="List partitions",
        level=READ_ONLY,
        query=PartitionQuery,
        answers={200: PartitionList},
    ),
    Route(
        *("GET", "/api/v1/resources/namespaces", resources.list_namespaces),
        summary="List namespaces",
        level=READ_ONLY,
        answers={200: NamespaceList},
    ),
    Route(
        *("GET", "/api/v1/resources/tasks", resources.list_tasks),
        summary="List tasks",
        level=READ_ONLY,
        answers={200: TaskList},
    ),
    Route(
        *("GET", "/api/v1/resources/overview", resources.show_overview),
        summary="Show the whole server in numbers",
        level=READ_ONLY,
        answers={200: OverviewAnswer},
    ),
    Route(
        *("DELETE", "/api/v1/resources/queues/<queue>/partitions/<partition>", resources.delete_partition),
        summary="Delete a partition with all that is in it",
        level=ADMIN,
        answers={200: DeletedPartition},
    ),
    Route(
        *("DELETE", "/api/v1/queues/<queue>/clear", resources.clear),
        summary="Remove the messages of a queue, or of one of its partitions",
        level=ADMIN,
        query=ClearQuery,
        answers={200: Cleared},
        refusals=MISSING,
    ),
    Route(
        *("GET", "/api/v1/messages", messages.list_messages),
        summary="List messages, newest first",
        level=READ_ONLY,
        query=MessagesQuery,
        answers={200: MessageList},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/messages/<partition_id>/<transaction_id>", messages.show_message),
        summary="Show a message with its payload",
        level=READ_ONLY,
        answers={200: MessageDetailAnswer},
        refusals=MISSING + SEALED,
    ),
    Route(
        *("DELETE", "/api/v1/messages/<partition_id>/<transaction_id>", messages.delete_message),
        summary="Erase a message",
        answers={200: Erased},
        refusals=SEALED,
    ),
    Route(
        *("POST", "/api/v1/messages/<partition_id>/<transaction_id>/retry", messages.retry_message),
        summary="Deliver a dead letter again",
        answers={200: Retried},
        refusals=MISSING + SEALED,
    ),
    Route(
        *("POST", "/api/v1/messages/<partition_id>/<transaction_id>/dlq", messages.set_message_aside),
        summary="Make a message a dead letter",
        answers={200: SetAside},
        refusals=MISSING + SEALED,
    ),
    Route(
        *("GET", "/api/v1/dlq", dead_letters.list_dead_letters),
        summary="List dead letters, newest failure first",
        level=READ_ONLY,
        query=DeadLetterQuery,
        answers={200: DeadLetterList},
        refusals=SEALED,
    ),
    Route(
        *("DELETE", "/api/v1/dlq", dead_letters.remove_dead_letters),
        summary="Remove dead letters",
        query=RemovalQuery,
        answers={200: Selected},
        refusals=MISSING,
    ),
    Route(
        *("POST", "/api/v1/dlq/redrive", dead_letters.redrive),
        summary="Deliver dead letters again",
        body=RedriveBody,
        answers={200: Selected},
        refusals=MISSING + SEALED,
    ),
    Route(
        *("POST", "/api/v1/traces", traces.record),
        summary="Note something about a message",
        body=TraceBody,
        answers={201: Recorded, 404: Recorded},
    ),
    Route(
        *("GET", "/api/v1/traces/names", traces.list_names),
        summary="List the names of traces",
        level=READ_ONLY,
        query=NamesQuery,
        answers={200: TraceNameList},
    ),
    Route(
        *("GET", "/api/v1/traces/by-name/<name>", traces.list_by_name),
        summary="List what was noted under a name",
        level=READ_ONLY,
        query=NamedTracesQuery,
        answers={200: NamedTraceList},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/traces/<partition_id>/<transaction_id>", traces.list_of_message),
        summary="List what was noted about a message",
        level=READ_ONLY,
        answers={200: TraceList},
    ),
    Route(
        *("GET", "/api/v1/consumer-groups", groups.list_groups),
        summary="List consumer groups, one entry for each queue",
        level=READ_ONLY,
        answers={200: list[GroupEntry]},
    ),
    Route(
        *("GET", "/api/v1/consumer-groups/lagging", groups.list_lagging),
        summary="List the partitions that are behind most",
        level=READ_ONLY,
        query=LaggingQuery,
        answers={200: list[LaggingEntry]},
    ),
    Route(
        *("GET", "/api/v1/consumer-groups/<group>", groups.show_group),
        summary="Show where a group is, by queue and partition",
        level=READ_ONLY,
        answers={200: dict[str, Positions]},
    ),
    Route(
        *("DELETE", "/api/v1/consumer-groups/<group>", groups.delete_group),
        summary="Forget a group on all queues",
        level=ADMIN,
        query=DeletionQuery,
        answers={200: DeletedGroup},
    ),
    Route(
        *("DELETE", "/api/v1/consumer-groups/<group>/queues/<queue>", groups.delete_group),
        summary="Forget a group on one queue",
        level=ADMIN,
        query=DeletionQuery,
        answers={200: DeletedGroup},
    ),
    Route(
        *("POST", "/api/v1/consumer-groups/<group>/subscription", groups.change_subscription),
        summary="Set where a group starts the next time it starts over",
        body=SubscriptionBody,
        answers={200: Subscribed},
    ),
    Route(
        *("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/seek", groups.seek),
        summary="Move a group on a queue",
        body=SeekBody,
        answers={200: MovedGroup},
    ),
    Route(
        *("POST", "/api/v1/consumer-groups/<group>/queues/<queue>/partitions/<partition>/seek", groups.seek_partition),
        summary="Move a group in a partition; without a body to its end",
        body=SeekBody,
        body_optional=True,
        answers={200: MovedPartition},
    ),
    Route(
        *("POST", "/streams/v1/queries", streams.register),
        summary="Register a stream query, or find it again",
        body=StreamQueryBody,
        answers={200: Registered, 409: Mismatched},
    ),
    Route(
        *("POST", "/streams/v1/cycle", streams.cycle),
        summary="Commit one step of a stream query",
        body=CycleBody,
        answers={200: CycleAnswer},
        refusals=FULL,
    ),
    Route(
        *("POST", "/streams/v1/state/get", streams.read_state),
        summary="Read what a stream query remembers of a partition",
        level=READ_ONLY,
        body=StateBody,
        answers={200: StateAnswer},
        refusals=SEALED,
    ),
    Route(
        *("POST", "/api/v1/stats/refresh", status.refresh),
        summary="Bring figures up to date",
        level=ADMIN,
        answers={200: Refreshed},
    ),
    Route(
        *("GET", "/api/v1/status", status.show_status),
        summary="Show what has happened lately",
        level=READ_ONLY,
        query=WindowQuery,
        answers={200: StatusAnswer},
    ),
    Route(
        *("GET", "/api/v1/status/queues", status.list_queues),
        summary="List queues, newest first, with how many there are",
        level=READ_ONLY,
        query=QueueStatusQuery,
        answers={200: StatusQueueList},
    ),
    Route(
        *("GET", "/api/v1/status/queues/<queue>", status.show_queue),
        summary="Show a queue with its options and partitions",
        level=READ_ONLY,
        answers={200: StatusQueueAnswer},
        refusals=MISSING,
    ),
    Route(
        *("GET", "/api/v1/status/queues/<queue>/messages", status.list_queue_messages),
        summary="List the messages of a queue",
        level=READ_ONLY,
        query=QueueMessagesQuery,
        answers={200: list[ShortMessage]},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/status/analytics", status.show_analytics),
        summary="Show how many messages came",
        level=READ_ONLY,
        query=IntervalQuery,
        answers={200: StatusAnalytics},
    ),
    Route(
        *("GET", "/api/v1/status/buffers", status.show_buffers),
        summary="Show what waits in the spool",
        level=READ_ONLY,
        answers={200: Buffers},
    ),
    Route(
        *("GET", "/api/v1/analytics/worker-metrics", analytics.show_worker_metrics),
        summary="Show what workers did",
        level=READ_ONLY,
        query=QueueWindowQuery,
        answers={200: WorkerMetrics},
    ),
    Route(
        *("GET", "/api/v1/analytics/system-metrics", analytics.show_system_metrics),
        summary="Show what workers measured",
        level=READ_ONLY,
        query=WindowQuery,
        answers={200: SystemMetrics},
    ),
    Route(
        *("GET", "/api/v1/analytics/queue-lag", analytics.show_queue_lag),
        summary="Show how long messages lay before they were delivered",
        level=READ_ONLY,
        query=QueueWindowQuery,
        answers={200: list[QueueLagPoint]},
    ),
    Route(
        *("GET", "/api/v1/analytics/queue-ops", analytics.show_queue_ops),
        summary="Show what was done on queues",
        level=READ_ONLY,
        query=QueueWindowQuery,
        answers={200: QueueOps},
    ),
    Route(
        *("GET", "/api/v1/analytics/queue-parked-replicas", analytics.show_parked),
        summary="Show pops that waited",
        level=READ_ONLY,
        query=QueueWindowQuery,
        answers={200: Parked},
    ),
    Route(
        *("GET", "/api/v1/analytics/retention", analytics.show_retention),
        summary="Show what retention and eviction removed",
        level=READ_ONLY,
        query=QueueWindowQuery,
        answers={200: Retention},
    ),
    Route(
        *("GET", "/api/v1/analytics/postgres-stats", analytics.show_postgres),
        summary="Show what PostgreSQL says of itself",
        level=READ_ONLY,
        answers={200: PostgresAnswer},
    ),
    Route(
        *("GET", "/api/v1/system/maintenance", system.show_maintenance),
        summary="Show the switches",
        level=ADMIN,
        answers={200: system.Maintenance},
    ),
    Route(
        *("POST", "/api/v1/system/maintenance", system.switch_maintenance),
        summary="Send pushes to the spool, or store them again",
        level=ADMIN,
        body=system.SwitchBody,
        answers={200: system.MaintenanceSwitched},
    ),
    Route(
        *("GET", "/api/v1/system/maintenance/pop", system.show_pop_maintenance),
        summary="Show whether pops are switched off",
        level=ADMIN,
        answers={200: system.PopMaintenance},
    ),
    Route(
        *("POST", "/api/v1/system/maintenance/pop", system.switch_pop_maintenance),
        summary="Switch pops off or on",
        level=ADMIN,
        body=system.SwitchBody,
        answers={200: system.PopMaintenance},
    ),
    Route(
        *("POST", "/api/v1/system/reencrypt", system.reencrypt),
        summary="Encrypt again, a few rows at a time, what an old key encrypts",
        level=ADMIN,
        body=system.ReencryptBody,
        body_optional=True,
        answers={200: system.Reencrypted},
        refusals=SEALED,
    ),
    Route(
        *("GET", "/api/v1/system/shared-state", system.show_shared_state),
        summary="Say that servers share nothing",
        level=ADMIN,
        answers={200: system.NotShared},
    ),
    Route(
        *("POST", "/internal/api/notify", system.notify),
        summary="Hear a hint of a server of another kind",
        level=ADMIN,
        answers={200: system.Notified},
    ),
    Route(
        *("GET", "/internal/api/shared-state/stats", system.show_shared_state),
        summary="Say that servers share nothing",
        level=ADMIN,
        answers={200: system.NotShared},
    ),
    Route(
        *("GET", "/internal/api/inter-instance/stats", system.show_shared_state),
        summary="Say that servers share nothing",
        level=ADMIN,
        answers={200: system.NotShared},
    ),
    Route(
        *("POST", "/api/v1/migration/test-connection", system.migrate),
        summary="Not supported",
        level=ADMIN,
        answers={},
        refusals=(Unsupported,),
    ),
    Route(
        *("POST", "/api/v1/migration/start", system.migrate),
        summary="Not supported",
        level=ADMIN,
        answers={},
        refusals=(Unsupported,),
    ),
    Route(
        *("POST", "/api/v1/migration/validate", system.migrate),
        summary="Not supported",
        level=ADMIN,
        answers={},
        refusals=(Unsupported,),
    ),
    Route(
        *("POST", "/api/v1/migration/reset", system.migrate),
        summary="Not supported",
        level=ADMIN,
        answers={},
        refusals=(Unsupported,),
    ),
    Route(
        *("GET", "/api/v1/migration/status", system.migrate),
        summary="Not supported",
        level=ADMIN,
        answers={},
        refusals=(Unsupported,),
    ),
    Route(
        *("GET", "/metrics", metrics.show_metrics),
        summary="Show all servers on this database in a few numbers",
        level=READ_ONLY,
        answers={200: MetricsAnswer},
    ),
    Route(
        *("GET", "/metrics/prometheus", metrics.show_prometheus),
        summary="Show figures for Prometheus",
        level=READ_ONLY,
        answers={200: PrometheusText},
    ),
    Route(
        *("GET", "/health", health.health),
        summary="Say whether this process reaches its database",
        level=READ_ONLY,
        probe=True,
        answers={200: Health, 503: Health},
    ),
    Route(
        *("GET", "/livez", health.livez),
        summary="Say that this process answers",
        level=Level.OPEN,
        probe=True,
        answers={200: Liveness},
    ),
    Route(
        *("GET", "/readyz", health.readyz),
        summary="Say whether requests should be sent here",
        level=Level.OPEN,
        probe=True,
        answers={200: Readiness, 503: Readiness},
    ),
    Route(
        *("GET", "/openapi.json", openapi.show_openapi),
        summary="Describe this API",
        level=READ_ONLY,
        answers={200: openapi.Document},
    ),
)

PAGES: Final = Route(
    *("GET", "/<path>", webapp.show_page),
    summary="Show a file of the dashboard",
    level=Level.OPEN,
    probe=True,
    answers={},
)
"""What is asked for by a path of no route: see webapp.py. It is no part of the API, and not described with it."""
