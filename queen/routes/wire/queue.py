"""Queues and their options, leases, health: the small requests and answers."""

from __future__ import annotations

from typing import Final
from uuid import UUID

import msgspec

from queen.errors import InvalidRequest
from queen.model.message import LeaseExtension
from queen.model.queue import Queue, QueueOptions
from queen.routes.wire.body import (
    INT32_MAX,
    INT32_MIN,
    RAW_OBJECT,
    begins,
    body_fields,
    check_name,
    decode_body,
    fields_of,
    format_time,
    is_null,
    is_text,
    scalar_of,
    text_of,
)

_OPTIONS: Final[dict[str, tuple[str, int | None]]] = {
    # wire name → field of QueueOptions and smallest value; None: a boolean
    "leaseTime": ("lease_seconds", 0),
    "retryLimit": ("retry_limit", 0),
    "retryDelay": ("retry_delay_ms", 0),
    "priority": ("priority", INT32_MIN),
    "delayedProcessing": ("delayed_processing_seconds", 0),
    "windowBuffer": ("window_buffer_seconds", 0),
    "maxSize": ("max_size", 0),
    "ttl": ("ttl_seconds", 0),
    "deadLetterQueue": ("dead_letter_queue", None),
    "dlqAfterMaxRetries": ("dlq_after_max_retries", None),
    "retentionEnabled": ("retention_enabled", None),
    "retentionSeconds": ("retention_seconds", 0),
    "completedRetentionSeconds": ("completed_retention_seconds", 0),
    "maxWaitTimeSeconds": ("max_wait_time_seconds", 0),
    "encryptionEnabled": ("encryption_enabled", None),
}


class Configuration(msgspec.Struct, frozen=True):
    """A configure as asked for: all options, with the defaults where it says nothing."""

    queue: str
    namespace: str
    task: str
    options: QueueOptions


def read_configure(body: bytes, defaults: QueueOptions) -> Configuration:
    """Raises InvalidRequest."""
    fields = decode_body(body, RAW_OBJECT, body_fields)
    if not is_text(fields.get("queue")):
        raise InvalidRequest("queue is required")
    namespace, task = (text_of(fields, name) if is_text(fields.get(name)) else None for name in ("namespace", "task"))
    return Configuration(
        check_name(text_of(fields, "queue") or "", "queue"),
        check_name(namespace or "", "namespace"),
        check_name(task or "", "task"),
        _read_options(fields.get("options"), defaults),
    )


def _read_options(raw: msgspec.Raw | None, defaults: QueueOptions) -> QueueOptions:
    if is_null(raw):
        return defaults
    if raw is None or not begins(raw, b"{"):
        raise InvalidRequest("options must be an object")
    changes: dict[str, int | bool] = {}
    for name, value in fields_of(raw).items():
        if name in _OPTIONS and not is_null(value):
            field, smallest = _OPTIONS[name]
            changes[field] = _read_option(name, value, smallest)
    return msgspec.structs.replace(defaults, **changes)


def _read_option(name: str, raw: msgspec.Raw, smallest: int | None) -> int | bool:
    value = scalar_of(raw)
    if smallest is None:
        if isinstance(value, bool):
            return value
        raise InvalidRequest(f"option {name} must be true or false")
    return _bounded(value, smallest, f"option {name}")


def _bounded(value: object, smallest: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= INT32_MAX:
        raise InvalidRequest(f"{what} must be an integer from {smallest} to {INT32_MAX}")
    return value


def write_configured(queue: Queue, partition_id: UUID) -> bytes:
    return msgspec.json.encode(
        {
            "configured": True,
            "queueId": str(queue.queue_id),
            "partitionId": str(partition_id),
            "queue": queue.name,
            "namespace": queue.namespace,
            "task": queue.task,
            "options": {name: getattr(queue.options, field) for name, (field, _) in _OPTIONS.items()},
        }
    )


def write_deleted(name: str, existed: bool) -> bytes:
    return msgspec.json.encode({"deleted": True, "queue": name, "existed": existed})


def read_extension(body: bytes) -> int:
    """Seconds to extend a lease by; the body may be absent."""
    if not body:
        return 60
    raw = decode_body(body, RAW_OBJECT, body_fields).get("seconds")
    if is_null(raw):
        return 60
    return _bounded(scalar_of(raw), 1, "seconds")


def write_extension(extension: LeaseExtension) -> bytes:
    expires_at = None if extension.expires_at is None else format_time(extension.expires_at)
    answer = {
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


def write_health(connected: bool, worker: int, version: str, uptime_seconds: float) -> bytes:
    return msgspec.json.encode(
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


def write_liveness() -> bytes:
    return b'{"status":"alive"}'


def write_readiness(connected: bool, draining: bool) -> bytes:
    return msgspec.json.encode(
        {
            "status": "draining" if draining else "ready" if connected else "unready",
            "database": "connected" if connected else "disconnected",
        }
    )
