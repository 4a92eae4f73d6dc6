"""Metrics of servers: the short JSON page, and the text that Prometheus scrapes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, TypedDict

import msgspec

from queen.model.metrics import Process, QueuePoint, WorkerPoint
from queen.model.snapshot import Snapshot
from queen.model.spool import SpoolFigures


class PrometheusText(str):
    """Figures in the exposition format of Prometheus."""


PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float]


class ServerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What both pages are made of, as far as it is known without asking storage."""

    uptime_seconds: float
    processes: Sequence[Process]  # live workers
    cluster: Mapping[str, int]
    recent: Mapping[str, float]  # the same a second
    healthy: bool
    spool: SpoolFigures = SpoolFigures()  # of this server
    maintenance: bool = False


def gauge_sum(processes: Iterable[Process], name: str) -> float:
    return sum(process.state.gauges.get(name, 0.0) for process in processes)


class Rate(TypedDict):
    """How many, and how many a second lately."""

    total: int
    rate: float


class PoolCounts(TypedDict):
    """Connections to PostgreSQL."""

    poolSize: int
    idleConnections: int
    waitingRequests: int


class MemoryBytes(TypedDict):
    """Memory of all workers."""

    rss: int
    heapTotal: int
    heapUsed: int
    external: int
    arrayBuffers: int


class CpuTime(TypedDict):
    """CPU of all workers, in microseconds."""

    user: int
    system: int


class MetricsAnswer(TypedDict):
    """All servers on this database in a few numbers."""

    uptime: float
    requests: Rate
    messages: Rate
    database: PoolCounts
    memory: MemoryBytes
    cpu: CpuTime


def write_metrics(metrics: ServerMetrics) -> bytes:
    rss_bytes = int(gauge_sum(metrics.processes, "rss_bytes"))
    return msgspec.json.encode(
        MetricsAnswer(
            {
                "uptime": round(metrics.uptime_seconds, 1),
                "requests": {
                    "total": metrics.cluster.get("requests", 0),
                    "rate": round(metrics.recent.get("requests", 0.0), 2),
                },
                "messages": {
                    "total": metrics.cluster.get("push_messages", 0),
                    "rate": round(metrics.recent.get("push_messages", 0.0), 2),
                },
                "database": {
                    "poolSize": int(gauge_sum(metrics.processes, "pool_size")),
                    "idleConnections": int(gauge_sum(metrics.processes, "pool_idle")),
                    "waitingRequests": int(gauge_sum(metrics.processes, "pool_waiting")),
                },
                # a Python process has no heap of its own kind to tell apart
                "memory": {
                    "rss": rss_bytes,
                    "heapTotal": rss_bytes,
                    "heapUsed": rss_bytes,
                    "external": 0,
                    "arrayBuffers": 0,
                },
                "cpu": {
                    "user": metrics.cluster.get("cpu_user_us", 0),
                    "system": metrics.cluster.get("cpu_system_us", 0),
                },
            }
        )
    )


class Exposition:
    """Text in the exposition format of Prometheus, one family after the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, *samples: Sample) -> None:
        self._family(name, "gauge", text, samples)

    def counter(self, name: str, text: str, *samples: Sample) -> None:
        self._family(name, "counter", text, samples)

    def _family(self, name: str, kind: str, text: str, samples: Sequence[Sample]) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            self._lines.append(f"{name}{{{inside}}} {value:.16g}" if inside else f"{name} {value:.16g}")

    def encode(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class StoredMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the scrape asks storage for. Rates are of one minute: the last whole one, or, of what did nothing in it, the
    one that has begun."""

    now: datetime
    cluster: Mapping[str, int]  # as it is in storage now: workers remember it at different times, and a scrape that
    # went from one to another would see a counter go back, which Prometheus takes for a restart and counts twice
    queues: Sequence[QueuePoint]
    workers: Sequence[WorkerPoint]
    dead_letters: Mapping[str, int]
    dead_letter_total: int
    pops_paused: bool


def write_prometheus(metrics: ServerMetrics, stored: StoredMetrics | None, server: Snapshot | None = None) -> bytes:
    """``stored`` None: storage did not answer; the rest is still worth having, and counters are better missing than
    old. ``server`` None: there is no supervisor, or it did not say."""
    text = Exposition()
    processes = metrics.processes
    text.gauge("queen_uptime_seconds", "Age of the oldest live worker", ({}, metrics.uptime_seconds))
    if stored is not None:
        for kind in ("user", "system"):
            text.counter(
                f"queen_cpu_{kind}_microseconds_total",
                f"{kind.capitalize()} CPU of all workers",
                ({}, stored.cluster.get(f"cpu_{kind}_us", 0)),
            )
    text.gauge(
        "queen_process_resident_memory_bytes",
        "Resident memory of all live workers",
        ({}, gauge_sum(processes, "rss_bytes")),
    )
    text.gauge(
        "queen_process_virtual_memory_bytes",
        "Virtual memory of all live workers",
        ({}, gauge_sum(processes, "virtual_bytes")),
    )
    _write_pools(text, processes)
    spool = metrics.spool
    text.gauge(
        "queen_file_buffer_pending", "Messages waiting in the spool of this server", ({}, spool.pending_messages)
    )
    text.gauge(
        "queen_file_buffer_failed", "Spooled messages that could not be stored", ({}, spool.quarantined_messages)
    )
    text.gauge("queen_file_buffer_bytes", "Size of both", ({}, spool.pending_bytes + spool.quarantined_bytes))
    text.gauge(
        "queen_file_buffer_oldest_seconds",
        "How long the first message has been waiting",
        ({}, max(0.0, time.time() - spool.oldest_us / 1e6) if spool.oldest_us else 0.0),
    )
    text.gauge("queen_file_buffer_db_healthy", "Whether PostgreSQL answers", ({}, int(metrics.healthy)))
    text.gauge("queen_maintenance_mode_enabled", "Whether pushes are spooled by order", ({}, int(metrics.maintenance)))
    if stored is not None:
        text.gauge("queen_pop_maintenance_mode_enabled", "Whether pops are switched off", ({}, int(stored.pops_paused)))
    _write_engine(text, stored.cluster if stored is not None else None, metrics)
    text.gauge("queen_shared_state_enabled", "Whether servers share state beside the database", ({}, 0))
    if server is not None:
        _write_supervisor(text, server)
    if stored is not None:
        _write_cluster(text, stored.cluster)
        _write_queues(text, stored, processes)
        _write_workers(text, stored, processes)
        text.gauge("queen_dlq_depth", "Dead letters", ({"scope": "cluster"}, stored.dead_letter_total))
        text.gauge(
            "queen_dlq_depth_by_queue",
            "Dead letters of a queue that has any",
            *(({"queue": queue}, letters) for queue, letters in stored.dead_letters.items()),
        )
    return text.encode()


def _write_pools(text: Exposition, processes: Sequence[Process]) -> None:
    size, waiting = gauge_sum(processes, "pool_size"), gauge_sum(processes, "pool_waiting")
    text.gauge("queen_db_pool_size", "Connections to PostgreSQL", ({}, size))
    text.gauge("queen_db_pool_idle", "Connections that nobody uses", ({}, gauge_sum(processes, "pool_idle")))
    text.gauge("queen_db_pool_active", "Connections in use", ({}, gauge_sum(processes, "pool_active")))
    text.gauge(
        "queen_threadpool_size",
        "Tasks that do database work; there are no others",
        ({"pool": "db"}, size),
        ({"pool": "system"}, 0),
    )
    text.gauge(
        "queen_threadpool_queue_size",
        "Jobs that wait for such a task",
        ({"pool": "db"}, waiting),
        ({"pool": "system"}, 0),
    )
    text.gauge(
        "queen_response_registry_size",
        "Pops that wait for a message",
        *(({"worker_id": process.worker_id}, process.state.gauges.get("parked", 0)) for process in processes),
    )


def _write_engine(text: Exposition, cluster: Mapping[str, int] | None, metrics: ServerMetrics) -> None:
    verbs = ("push", "pop", "ack")

    def latency_us(verb: str) -> float:
        lately = metrics.recent if metrics.recent.get(f"{verb}_writes") else metrics.cluster
        return lately.get(f"{verb}_write_us", 0) / (lately.get(f"{verb}_writes") or 1)

    if cluster is not None:
        text.counter(
            "queen_sidecar_op_count",
            "Writes of batches of requests",
            *(({"op": verb}, cluster.get(f"{verb}_writes", 0)) for verb in verbs),
        )
    text.gauge(
        "queen_sidecar_op_latency_microseconds",
        "Average time of such a write, lately or else ever",
        *(({"op": verb}, latency_us(verb)) for verb in verbs),
    )
    if cluster is not None:
        text.counter(
            "queen_sidecar_op_items",
            "Requests in such writes",
            *(({"op": verb}, cluster.get(f"{verb}_written", 0)) for verb in verbs),
        )
    text.gauge("queen_queue_backoff_groups", "Groups that are polled more slowly: none, pops are woken", ({}, 0))
    text.gauge("queen_queue_backoff_queues", "Queues that are polled more slowly: none, pops are woken", ({}, 0))
    text.gauge("queen_queue_backoff_avg_interval_milliseconds", "Average interval of such polls", ({}, 0))


def _write_supervisor(text: Exposition, server: Snapshot) -> None:
    """Of this server. Its counters are the supervisor's sums over all workers that a slot has had."""
    text.gauge("queen_supervisor_uptime_seconds", "Age of the server", ({}, server.uptime_seconds))
    text.gauge("queen_supervisor_workers_wanted", "Workers there should be", ({}, server.workers_wanted))
    text.gauge("queen_supervisor_workers_active", "Workers that serve", ({}, server.workers_active))
    text.gauge(
        "queen_supervisor_slots_without_worker",
        "Slots whose worker died and that have no other yet",
        ({}, len(server.degraded_slots)),
    )
    slots = [({"slot": str(slot.slot)}, slot) for slot in server.slots if slot.state != "draining"]
    text.counter(
        "queen_supervisor_worker_restarts_total",
        "Workers that died",
        *((label, slot.restarts) for label, slot in slots),
    )
    text.gauge(
        "queen_supervisor_worker_generation",
        "Which of the workers of this server it is",
        *((label, slot.generation) for label, slot in slots),
    )
    text.gauge(
        "queen_supervisor_worker_loop_lag_seconds",
        "How late the event loop was since its last heartbeat",
        *(
            ({**label, "quantile": quantile}, getattr(slot, field) / 1000)
            for label, slot in slots
            for quantile, field in (("0.5", "loop_lag_p50_ms"), ("0.99", "loop_lag_p99_ms"), ("1", "loop_lag_max_ms"))
        ),
    )
    for name, field, what in (
        ("resident_memory_bytes", "rss_bytes", "Memory it holds"),
        ("connections", "connections", "Open connections"),
        ("requests_in_flight", "requests_in_flight", "Requests being answered"),
    ):
        text.gauge(f"queen_supervisor_worker_{name}", what, *((label, getattr(slot, field)) for label, slot in slots))
    for name, field, what in (
        ("requests", "requests", "Requests"),
        ("push_messages", "pushed", "Messages stored"),
        ("pop_messages", "popped", "Messages handed out"),
        ("ack_messages", "acked", "Messages acknowledged"),
    ):
        text.counter(
            f"queen_supervisor_worker_{name}_total",
            f"{what}, over all workers that the slot has had",
            *((label, getattr(slot, field)) for label, slot in slots),
        )


def _write_cluster(text: Exposition, cluster: Mapping[str, int]) -> None:
    scope = {"scope": "cluster"}
    for name, counted, what in (
        ("push_requests", "push_requests", "Push requests"),
        ("pop_requests", "pop_requests", "Pop requests"),
        ("ack_requests", "ack_requests", "Ack requests"),
        ("transactions", "transactions", "Transactions"),
        ("push_messages", "push_messages", "Messages stored"),
        ("pop_messages", "pop_messages", "Messages handed out"),
        ("ack_messages", "ack_success", "Messages acknowledged"),
        ("db_errors", "db_errors", "Failures of PostgreSQL"),
        ("dlq", "dead_letters", "Messages that became dead letters"),
    ):
        text.counter(
            f"queen_cluster_{name}_total",
            f"{what} since the database was made, all servers",
            (scope, cluster.get(counted, 0)),
        )
    text.counter(
        "queen_cluster_ack_total",
        "Acknowledgements by result since the database was made, all servers",
        ({**scope, "result": "success"}, cluster.get("ack_success", 0)),
        ({**scope, "result": "failed"}, cluster.get("ack_failed", 0)),
    )


def _write_queues(text: Exposition, stored: StoredMetrics, processes: Sequence[Process]) -> None:
    points = [({"queue": point.queue or ""}, point.tally) for point in stored.queues]
    for name, field, what in (
        ("push_requests", "push_requests", "Push requests"),
        ("push_messages", "push_messages", "Messages stored"),
        ("pop_messages", "pop_messages", "Messages handed out"),
        ("pop_empty", "pop_empty", "Pops answered with nothing"),
        ("transactions", "transactions", "Transactions"),
    ):
        text.gauge(
            f"queen_queue_{name}_per_minute",
            f"{what} in the last whole minute",
            *((labels, getattr(tally, field)) for labels, tally in points),
        )
    text.gauge(
        "queen_queue_pop_lag_milliseconds",
        "From push to delivery in the last whole minute",
        *(({**labels, "stat": "avg"}, tally.average_lag_ms) for labels, tally in points),
        *(({**labels, "stat": "max"}, tally.lag_max_ms) for labels, tally in points),
    )
    text.gauge(
        "queen_queue_ack_per_minute",
        "Acknowledgements in the last whole minute",
        *(({**labels, "result": "success"}, tally.ack_success) for labels, tally in points),
        *(({**labels, "result": "failed"}, tally.ack_failed) for labels, tally in points),
    )
    waiting: dict[str, int] = {}
    for process in processes:
        for pops in process.state.waiting:
            waiting[pops.queue] = waiting.get(pops.queue, 0) + pops.pops
    text.gauge(
        "queen_queue_parked_consumers",
        "Pops that wait on a queue",
        *(({"queue": queue}, pops) for queue, pops in sorted(waiting.items())),
    )
    text.gauge(
        "queen_queue_metrics_age_seconds",
        "Since the end of the minute that the rates are of",
        *(
            ({"queue": point.queue or ""}, max(0.0, (stored.now - point.at).total_seconds() - 60))
            for point in stored.queues
        ),
    )


def _write_workers(text: Exposition, stored: StoredMetrics, processes: Sequence[Process]) -> None:
    def labels(worker: WorkerPoint | Process) -> dict[str, str]:
        return {"hostname": worker.hostname, "worker_id": worker.worker_id, "pid": str(worker.pid)}

    live = {(process.hostname, process.worker_id, process.pid) for process in processes}
    points = [point for point in stored.workers if (point.hostname, point.worker_id, point.pid) in live]
    for name, gauge, stats, what in (
        ("event_loop_lag_milliseconds", "loop_lag_ms", ("avg", "max"), "How late the event loop is"),
        ("free_slots", "pool_idle", ("avg", "min"), "Connections that nobody uses"),
        ("job_queue_size", "pool_waiting", ("avg", "max"), "Jobs that wait for a connection"),
    ):
        text.gauge(
            f"queen_worker_{name}",
            f"{what}, in the last whole minute",
            *(({**labels(point), "stat": stat}, _statistic(point, gauge, stat)) for point in points for stat in stats),
        )
    text.gauge(
        "queen_worker_db_connections",
        "Connections to PostgreSQL",
        *((labels(point), point.samples.last("pool_size")) for point in points),
    )
    text.gauge(
        "queen_worker_backoff_size", "Always 0: pops are woken, not polled", *((labels(point), 0) for point in points)
    )
    for name, work, what in (
        ("jobs_done", "jobs", "Database jobs"),
        ("db_errors", "db_errors", "Failures of PostgreSQL"),
        ("dlq", "dead_letters", "Messages that became dead letters"),
    ):
        text.gauge(
            f"queen_worker_{name}_per_minute",
            f"{what} in the last whole minute",
            *((labels(point), point.work.get(work, 0)) for point in points),
        )
    text.gauge(
        "queen_worker_requests_per_minute",
        "Requests in the last whole minute",
        *(
            ({**labels(point), "op": verb}, point.work.get(f"{verb}_requests", 0))
            for point in points
            for verb in ("push", "pop", "ack")
        ),
    )
    text.gauge(
        "queen_worker_messages_per_minute",
        "Messages in the last whole minute",
        *(
            ({**labels(point), "op": verb}, point.work.get(work, 0))
            for point in points
            for verb, work in (("push", "push_messages"), ("pop", "pop_messages"), ("ack", "ack_success"))
        ),
    )
    text.gauge(
        "queen_worker_ack_per_minute",
        "Acknowledgements in the last whole minute",
        *(
            ({**labels(point), "result": result}, point.work.get(f"ack_{result}", 0))
            for point in points
            for result in ("success", "failed")
        ),
    )
    text.gauge(
        "queen_worker_lag_milliseconds",
        "From push to delivery in the last whole minute",
        *(
            ({**labels(point), "stat": "avg"}, point.work.get("lag_ms", 0) / max(1, point.work.get("lag_count", 0)))
            for point in points
        ),
        *(({**labels(point), "stat": "max"}, point.lag_max_ms) for point in points),
    )
    text.gauge(
        "queen_worker_metrics_age_seconds",
        "Since a live worker last reported",
        *((labels(process), max(0.0, (stored.now - process.seen_at).total_seconds())) for process in processes),
    )


def _statistic(point: WorkerPoint, gauge: str, stat: str) -> float:
    if stat == "avg":
        return point.samples.average(gauge)
    return point.samples.greatest(gauge) if stat == "max" else point.samples.least(gauge)
