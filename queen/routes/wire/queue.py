"""Queues and their options, leases, health: the small requests and answers."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict
from uuid import UUID

import msgspec
from msgspec import Meta, field

from queen.errors import InvalidRequest
from queen.model.message import LeaseExtension
from queen.model.queue import Queue, QueueOptions, asked_for
from queen.model.spool import SpoolFigures
from queen.routes.wire.body import (
    INT32_MAX,
    INT32_MIN,
    Name,
    TimeText,
    UuidText,
    begins,
    body_fields,
    check_name,
    decode_body,
    fields_of,
    format_time,
    is_null,
    is_text,
    text_of,
)

Count = Annotated[int, Meta(ge=0, le=INT32_MAX)]


class OptionsBody(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a queue. What is absent or null takes its default."""  # the fields are those of QueueOptions

    lease_seconds: Count | None = field(name="leaseTime", default=None)
    retry_limit: Count | None = field(name="retryLimit", default=None)
    retry_delay_ms: Count | None = field(name="retryDelay", default=None)
    priority: Annotated[int, Meta(ge=INT32_MIN, le=INT32_MAX)] | None = None
    delayed_processing_seconds: Count | None = field(name="delayedProcessing", default=None)
    window_buffer_seconds: Count | None = field(name="windowBuffer", default=None)
    max_size: Count | None = field(name="maxSize", default=None)
    ttl_seconds: Count | None = field(name="ttl", default=None)
    dead_letter_queue: bool | None = field(name="deadLetterQueue", default=None)
    dlq_after_max_retries: bool | None = field(name="dlqAfterMaxRetries", default=None)
    retention_enabled: bool | None = field(name="retentionEnabled", default=None)
    retention_seconds: Count | None = field(name="retentionSeconds", default=None)
    completed_retention_seconds: Count | None = field(name="completedRetentionSeconds", default=None)
    max_wait_time_seconds: Count | None = field(name="maxWaitTimeSeconds", default=None)
    encryption_enabled: bool | None = field(name="encryptionEnabled", default=None)


class ConfigureBody(msgspec.Struct, frozen=True, kw_only=True):
    """A queue to create, or to give other options. All options that are not named go back to their defaults."""

    queue: Name
    namespace: Name | None = None
    task: Name | None = None
    options: OptionsBody | None = None


class ExtensionBody(msgspec.Struct, frozen=True, kw_only=True):
    """How long a lease is to hold from now on, at least."""

    seconds: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = 60


_CONFIGURE: Final = msgspec.json.Decoder(ConfigureBody)
_EXTENSION: Final = msgspec.json.Decoder(ExtensionBody)

_OPTIONS: Final = {info.encode_name: info for info in msgspec.structs.fields(OptionsBody)}


class Configuration(msgspec.Struct, frozen=True):
    """A configure as asked for: all options, with the defaults where it says nothing."""

    queue: str
    namespace: str
    task: str
    options: QueueOptions


def read_configure(body: bytes, defaults: QueueOptions) -> Configuration:
    """Raises InvalidRequest."""
    asked = decode_body(body, _CONFIGURE, _read_loose_configure)
    changes: dict[str, int | bool] = {}
    if asked.options is not None:
        changes = {name: value for name, value in msgspec.structs.asdict(asked.options).items() if value is not None}
    return Configuration(
        check_name(asked.queue, "queue"),
        check_name(asked.namespace or "", "namespace"),
        check_name(asked.task or "", "task"),
        asked_for(defaults, changes),
    )


def _read_loose_configure(body: bytes) -> ConfigureBody:
    """A configure whose labels may be anything (then they are none), or that is wrong."""
    fields = body_fields(body)
    if not is_text(fields.get("queue")):
        raise InvalidRequest("queue is required")
    namespace, task = (text_of(fields, name) if is_text(fields.get(name)) else None for name in ("namespace", "task"))
    return ConfigureBody(
        queue=text_of(fields, "queue") or "",
        namespace=namespace,
        task=task,
        options=_read_loose_options(fields.get("options")),
    )


def _read_loose_options(raw: msgspec.Raw | None) -> OptionsBody | None:
    if raw is None or is_null(raw):
        return None
    if not begins(raw, b"{"):
        raise InvalidRequest("options must be an object")
    values: dict[str, Any] = {}
    for name, value in fields_of(raw).items():
        if name in _OPTIONS and not is_null(value):
            values[_OPTIONS[name].name] = _read_loose_option(name, value)
    return OptionsBody(**values)


def _read_loose_option(name: str, raw: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(raw, type=_OPTIONS[name].type)
    except msgspec.ValidationError:
        pass
    if _OPTIONS[name].type == bool | None:
        raise InvalidRequest(f"option {name} must be true or false")
    smallest = INT32_MIN if name == "priority" else 0
    raise InvalidRequest(f"option {name} must be an integer from {smallest} to {INT32_MAX}")


class Configured(TypedDict):
    """A queue as it is now."""

    configured: bool
    queueId: UuidText
    partitionId: UuidText
    queue: str
    namespace: str
    task: str
    options: OptionsBody


class DeletedQueue(TypedDict):
    """Whether there was a queue to delete."""

    deleted: bool
    queue: str
    existed: bool


class Extended(TypedDict):
    """Until when a lease holds now, or why it does not."""

    leaseId: str
    success: bool
    renewed: int
    newExpiresAt: TimeText | None
    expiresAt: TimeText | None
    lease_expires_at: TimeText | None
    error: NotRequired[str]


class HealthWorker(TypedDict):
    """A worker that answers."""

    worker_id: int
    status: Literal["active"]


class SharedState(TypedDict):
    """Servers share nothing beside the database."""

    enabled: bool


class SpoolState(TypedDict):
    """Pushes on the disk of this server, because PostgreSQL did not take them."""

    active: bool  # pushes go there now
    pending: int  # messages that wait
    failed: int  # messages that were set aside
    bytes: int
    maxBytes: int
    oldestSeconds: float  # how long the first has been waiting


class Health(TypedDict):
    """Whether this process reaches its database."""

    status: Literal["healthy", "unhealthy"]
    database: Literal["connected", "disconnected"]
    server: Literal["running"]
    worker_id: int
    version: str
    shared_state: SharedState
    queen: HealthWorker
    uptime: str
    spool: NotRequired[SpoolState]


class Liveness(TypedDict):
    """This process answers."""

    status: Literal["alive"]


class Readiness(TypedDict):
    """Whether requests should be sent here."""

    status: Literal["ready", "unready", "draining"]
    database: Literal["connected", "disconnected"]
    spool: NotRequired[SpoolState]


def write_configured(queue: Queue, partition_id: UUID) -> bytes:
    return msgspec.json.encode(
        Configured(
            {
                "configured": True,
                "queueId": str(queue.queue_id),
                "partitionId": str(partition_id),
                "queue": queue.name,
                "namespace": queue.namespace,
                "task": queue.task,
                "options": OptionsBody(
                    **{name: getattr(queue.options, name) for name in OptionsBody.__struct_fields__}
                ),
            }
        )
    )


def write_deleted(name: str, existed: bool) -> bytes:
    return msgspec.json.encode(DeletedQueue({"deleted": True, "queue": name, "existed": existed}))


def read_extension(body: bytes) -> int:
    """Seconds to extend a lease by; the body may be absent."""
    seconds = decode_body(body, _EXTENSION, _refuse_extension).seconds if body else None
    return 60 if seconds is None else seconds


def _refuse_extension(body: bytes) -> ExtensionBody:
    body_fields(body)
    raise InvalidRequest(f"seconds must be an integer from 1 to {INT32_MAX}")


def write_extension(extension: LeaseExtension) -> bytes:
    expires_at = None if extension.expires_at is None else format_time(extension.expires_at)
    answer: Extended = {
        "leaseId": extension.lease_id,
        "success": extension.error is None,
        "renewed": extension.renewed,
        "newExpiresAt": expires_at,
        "expiresAt": expires_at,
        "lease_expires_at": expires_at,
    }
    if extension.error is not None:
        answer["error"] = extension.error
    return msgspec.json.encode(answer)


def spool_state(active: bool, figures: SpoolFigures, max_bytes: int) -> SpoolState:
    waited_seconds = time.time() - figures.oldest_us / 1e6 if figures.oldest_us else 0.0
    return {
        "active": active,
        "pending": figures.pending_messages,
        "failed": figures.quarantined_messages,
        "bytes": figures.pending_bytes + figures.quarantined_bytes,
        "maxBytes": max_bytes,
        "oldestSeconds": round(max(0.0, waited_seconds), 1),
    }


def write_health(connected: bool, worker: int, version: str, uptime_seconds: float, spool: SpoolState | None) -> bytes:
    health = Health(
        {
            "status": "healthy" if connected else "unhealthy",
            "database": "connected" if connected else "disconnected",
            "server": "running",
            "worker_id": worker,
            "version": version,
            "shared_state": {"enabled": False},
            "queen": {"worker_id": worker, "status": "active"},
            "uptime": f"{uptime_seconds:.0f}s",
        }
    )
    if spool is not None:
        health["spool"] = spool
    return msgspec.json.encode(health)


def write_liveness() -> bytes:
    return b'{"status":"alive"}'


def write_readiness(ready: bool, connected: bool, draining: bool, spool: SpoolState | None) -> bytes:
    readiness = Readiness(
        {
            "status": "draining" if draining else "ready" if ready else "unready",
            "database": "connected" if connected else "disconnected",
        }
    )
    if spool is not None:
        readiness["spool"] = spool
    return msgspec.json.encode(readiness)
