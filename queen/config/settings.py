"""The settings of a server: one frozen value, every field with its unit, default and environment name.

Reading the environment, files and flags is sources.py's work; nobody below the worker reads the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from queen.model.queue import QueueOptions

MiB = 1024 * 1024


class Secret:
    """A value that never shows in a repr, a log or an error. ``reveal`` is the only way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def usable_cores() -> int:
    """Cores this process may run on, which in a container or under taskset are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not a Linux: the application can be served there, the supervisor cannot
        return os.cpu_count() or 1


class JwtSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who may use the server. What is checked, and how, is in queen/auth."""

    enabled: bool = False
    algorithm: str = "HS256"  # HS256, RS256, EdDSA, or auto: by the token, among the keys that are configured
    secret: Secret | None = None  # of HS256
    public_key: str | None = None  # PEM, RSA or Ed25519
    jwks_url: Secret | None = None  # may hold a password
    jwks_refresh_seconds: float = 3600.0  # and how long a key is honoured that is not in the set any more
    jwks_timeout_seconds: float = 5.0
    issuer: str | None = None
    audience: str | None = None
    clock_skew_seconds: float = 30.0
    skip_paths: tuple[str, ...] = ("/health", "/metrics/prometheus", "/metrics", "/")
    roles_claim: str = "role"  # one role, a string
    roles_array_claim: str = "roles"
    role_admin: str = "admin"
    role_read_write: str = "read-write"
    role_read_only: str = "read-only"


class CorsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What browsers are told about pages of other origins."""

    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: str = "GET, POST, PUT, DELETE, OPTIONS"
    allowed_headers: str = "Content-Type, Authorization"
    max_age_seconds: int = 86400


class PageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How much lists give where a request does not say, and at most; None: what each route has by itself."""

    default_limit: int | None = None
    max_limit: int | None = None
    default_offset: int = 0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a server needs to know. The environment name of each field stands in sources.py."""

    # where to listen
    host: str = "127.0.0.1"
    port: int = 6632  # 0: any free one
    workers: int = msgspec.field(default_factory=usable_cores)
    worker_id: str = ""
    insecure: bool = False  # True: the operator knows that the port is open to others without authentication
    jwt: JwtSettings = JwtSettings()
    tls_cert: Path | None = None  # PEM, with the chain; together with the key, or neither
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # who signs certificates of clients, which then need one
    # how operators and service managers reach it
    control_socket: Path | None = None  # None: in the data directory, or in the runtime directory
    pidfile: Path | None = None
    # storage
    database_url: Secret | None = None  # None: the embedded PostgreSQL
    data_dir: Path | None = None  # of the embedded PostgreSQL; None: per-user default
    db_pool_size: int = 20  # connections, divided over the workers
    db_connect_timeout_seconds: float = 2.0
    db_statement_timeout_seconds: float = 30.0
    db_lock_timeout_seconds: float = 10.0
    db_statement_cache: bool = True  # False behind PgBouncer in transaction mode
    cache_bytes: int = 16 * MiB  # a worker, for segments; twice: those that were read, those whose acks are to come
    buckets: int = 1  # fixed when the database is initialised; 64 on Citus
    # the spool, for pushes while PostgreSQL is away
    spool_dir: Path | None = None  # None: none; queen-trio run has one by itself
    spool_max_bytes: int = 1024 * MiB
    spool_interval_seconds: float = 0.1  # between two looks whether there is anything to drain
    spool_batch: int = 1000  # entries of one write of the drain
    # requests
    max_body_bytes: int = 100 * MiB
    default_timeout_seconds: float = 30.0  # of a waiting pop
    max_timeout_seconds: float | None = None
    default_batch: int = 1
    default_subscription_mode: str = ""  # "", "all", "new" or "new-only"
    queue_defaults: QueueOptions = QueueOptions()
    encryption_key: Secret | None = None  # 64 hexadecimal characters
    encryption_keys: tuple[Secret, ...] = ()  # that messages may be encrypted with from before, each the same
    fast_http: bool = True  # answer plain HTTP/1.1 without hypercorn and Quart
    cors: CorsSettings = CorsSettings()
    pages: PageSettings = PageSettings()
    webapp_root: Path | None = None  # folder of a built dashboard, served at /; None: none
    health_endpoint: bool = True  # GET /health; /livez and /readyz are always there
    metrics_endpoint: bool = True  # GET /metrics and /metrics/prometheus
    # streaming
    stream_threshold_bytes: int = 128 * 1024
    stream_chunk_bytes: int = 64 * 1024
    # background work
    retention_interval_seconds: float = 300.0
    retention_batch: int = 1000
    eviction_interval_seconds: float = 60.0
    partition_cleanup_days: int = 30  # that a partition is empty before it is removed; 0: for ever
    dead_letter_retention_days: int = 0  # 0: until somebody removes them
    # metrics
    stats_interval_seconds: float = 10.0  # between two reports of a worker
    stats_retention_days: int = 7  # of series by the quarter of an hour
    metrics_sample_seconds: float = 1.0  # between two readings of the gauges
    metrics_aggregate_seconds: float = 60.0  # between two reports of very many queues
    metrics_retention_days: int = 90  # of all series, and of traces
    # supervision
    hang_seconds: float = 10.0  # without a sign of life from a worker's loop, and it is replaced
    spare: bool | None = None  # keep one more worker booted, to take over from one that dies; None: beside two or more
    max_worker_rss_bytes: int = 0  # 0: no limit; past it a worker is replaced, its successor first
    max_worker_age_seconds: float = 0.0  # 0: no limit; the same by age, with jitter
    # shutdown
    grace_seconds: float = 20.0
    # logs
    log_level: str = "info"
    log_format: str = ""  # "json", "console", or "" to choose by terminal
    log_timestamp: bool = True
