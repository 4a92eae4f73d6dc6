"""Every error raised on purpose: its code, its HTTP status, its title. Nothing else lives here.

QueenError
├── InvalidRequest          400  the request is wrong and was not applied
├── Unauthenticated         401  no valid token came with the request
├── Forbidden               403  the token is valid, its roles are not enough
├── NotFound                404  no such thing
├── RouteNotFound           404  no such route (or not implemented)
├── MethodNotAllowed        405  the route answers other methods
├── RequestStalled          408  the rest of the request did not come
├── RequestTooLarge         413  the body is over the limit
├── QueueFull               429  a queue of the push has no room (maxSize): nothing was applied
├── HeadTooLarge            431  the request line and the headers are over the limit
├── UnsupportedCoding       501  the body is encoded for transfer in a way unknown here
├── Unsupported             501  the contract has it, this server does not
├── EncryptionUnavailable   409  the queue is encrypted and this server has no usable key
├── KeysUnavailable         500  the keys to verify tokens with could not be fetched
├── StorageUnavailable      503  PostgreSQL cannot be reached: nothing was applied
├── OutcomeUnknown          503  the connection broke while committing: applied or not, unknown
├── Overloaded              503  a bounded room is full: nothing was applied
├── SpoolFull               500  PostgreSQL does not take pushes now and the spool is full: nothing was applied
├── SpoolForeign            503  what waits in the spool is for another database: it is not stored
├── SpoolUnavailable        500  PostgreSQL does not take pushes now and the spool's disk fails: nothing was applied
├── Draining                503  the server is shutting down
└── StartupError            —    this process cannot serve; one sentence for the operator
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class QueenError(Exception):
    """Base of all. ``code`` is stable and may be branched on; the sentence is for people."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retry_after_seconds: ClassVar[int | None] = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidRequest(QueenError):
    """The request itself is wrong; nothing was applied. Sending it again unchanged will fail again."""

    code, status, title = "invalid_request", 400, "Invalid request"


class Unauthenticated(QueenError):
    """There is no valid token. The sentence is the contract's, and says which check failed; never the token."""

    code, status, title = "unauthenticated", 401, "Not authenticated"


class Forbidden(QueenError):
    """The token is valid and its roles do not allow this. Says nothing about what is asked for."""

    code, status, title = "forbidden", 403, "Insufficient permissions"

    def __init__(self) -> None:
        super().__init__("Insufficient permissions")


class NotFound(QueenError):
    """The thing named does not exist now. Does not say that it never did."""

    code, status, title = "not_found", 404, "Not found"


class RouteNotFound(QueenError):
    """No such route on this server. Under /api/v1 the detail is exactly ``no_such_route``: clients branch on it."""

    code, status, title = "no_such_route", 404, "No such route"


class MethodNotAllowed(QueenError):
    """The path is a route's, the method is not. ``allowed``: the methods it answers, in order."""

    code, status, title = "method_not_allowed", 405, "Method not allowed"

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = ", ".join(allowed)
        super().__init__(f"this route answers {self.allowed}")


class RequestStalled(QueenError):
    """The client began a request and did not go on with it. It was not applied."""

    code, status, title = "request_timeout", 408, "Request timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the rest of the request did not come within {seconds:g} s")


class RequestTooLarge(QueenError):
    """The body is larger than ``max_body_bytes``. Says nothing about the messages in it."""

    code, status, title = "request_too_large", 413, "Request body too large"

    def __init__(self) -> None:
        super().__init__("Request body too large")


class QueueFull(QueenError):
    """A queue of the request has no room for what was pushed (its maxSize). Nothing of the request was applied.

    ``queues``: those without room. ``results``: what became of each item, where the route says so.
    """

    results: list[dict[str, object]] | None = None
    code, status, title = "queue_full", 429, "Queue full"
    retry_after_seconds = 1

    def __init__(self, queue: str, max_size: int, room: int, wanted: int, others: Sequence[str] = ()) -> None:
        self.queues = (queue, *others)
        if wanted > max_size:
            what = f"holds {max_size} messages (maxSize) and {wanted} were pushed at once: push fewer"
        else:
            what = f"has room for {room} more of its {max_size} messages (maxSize) and {wanted} were pushed"
        super().__init__(f"queue {queue!r} {what}; nothing was stored")


class HeadTooLarge(QueenError):
    """The request line and the headers are more than this server reads. The request was not applied."""

    code, status, title = "head_too_large", 431, "Request header fields too large"

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        super().__init__(f"a request may have {max_headers} headers and {max_bytes // 1024} KiB of them")


class UnsupportedCoding(QueenError):
    """The body has a transfer coding other than chunked. The request was not applied."""

    code, status, title = "unsupported_coding", 501, "Transfer coding not supported"

    def __init__(self) -> None:
        super().__init__("the only transfer coding understood here is chunked")


class Unsupported(QueenError):
    """The contract has it, and this server has no use for it. Sending it again will not help."""

    code, status, title = "not_supported", 501, "Not supported"


class EncryptionUnavailable(QueenError):
    """The queue demands encryption and this server has no usable key. Nothing was stored or handed out."""

    code, status, title = "encryption_unavailable", 409, "Encryption key missing"

    def __init__(self, queue: str, key_id: str | None = None) -> None:
        which = f"key {key_id}" if key_id else "a key"
        super().__init__(
            f"queue {queue!r} is encrypted and this server does not hold {which}: "
            "set QUEEN_ENCRYPTION_KEY (64 hexadecimal characters), or QUEEN_ENCRYPTION_KEYS for a key of before, and "
            "restart, or turn encryptionEnabled off"
        )


class KeysUnavailable(QueenError):
    """No key of the JWKS endpoint is known and none could be fetched. Says nothing about the token."""

    code, status, title = "keys_unavailable", 500, "Keys unavailable"

    def __init__(self) -> None:
        super().__init__("Failed to fetch JWKS")


class StorageUnavailable(QueenError):
    """PostgreSQL could not be reached or refused work. The request was not applied; try again."""

    code, status, title = "storage_unavailable", 503, "Storage unavailable"
    retry_after_seconds = 1


class OutcomeUnknown(QueenError):
    """The connection broke between COMMIT and its answer: applied, or not. A repeat with the same ids is safe."""

    code, status, title = "outcome_unknown", 503, "Outcome unknown"
    retry_after_seconds = 1


class Overloaded(QueenError):
    """Too many requests are waiting. The request was not applied."""

    code, status, title = "overloaded", 503, "Overloaded"
    retry_after_seconds = 1


class SpoolFull(QueenError):
    """Pushes go to the spool now, and it has reached its limit. The request was not applied. Pops and acks may do."""

    code, status, title = "spool_full", 500, "Spool full"
    retry_after_seconds = 5

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"the spool holds the {max_bytes // (1024 * 1024)} MiB it may hold; nothing was applied; "
            "try again when it has drained"
        )


class SpoolForeign(QueenError):
    """What waits in the spool was accepted for another database. Nothing of it was stored, nothing is lost."""

    code, status, title = "spool_foreign", 503, "Spool of another database"
    retry_after_seconds = 60

    def __init__(self, directory: str, messages: int) -> None:
        super().__init__(
            f"{messages} messages in the spool {directory} were accepted for another database: start a server on that "
            "one with this spool, or give this one another with FILE_BUFFER_DIR"
        )


class SpoolUnavailable(QueenError):
    """Pushes go to the spool now, and its disk does not take them. The request was not applied."""

    code, status, title = "spool_unavailable", 500, "Spool unavailable"
    retry_after_seconds = 5

    def __init__(self, reason: str) -> None:
        super().__init__(f"the spool cannot be written ({reason}); nothing was applied; try again")


class Draining(QueenError):
    """This process is shutting down. The request was not applied; another worker will take it."""

    code, status, title = "draining", 503, "Shutting down"
    retry_after_seconds = 1


class StartupError(QueenError):
    """This process cannot serve. One clear sentence for the operator; the exit code is 3."""

    code, title = "startup", "Cannot start"
