"""What every way of serving says alike: errors as problems, headers, request ids, the log line of a request.

Nothing here reads or writes a socket; app.py does that through ASGI, serving/ by itself.
"""

from __future__ import annotations

import logging
import random
import re
from typing import Final

import msgspec
import structlog

from queen.errors import MethodNotAllowed, QueenError, QueueFull, RouteNotFound, Unauthenticated
from queen.routes.call import Call

BODY_STALL_SECONDS: Final = 60.0
"""A request body must go on arriving: this long without a byte of it ends the request."""

LINGER_SECONDS: Final = 5.0
"""How long the rest of a refused body is read and dropped. A connection closed with unread data is reset, and the
client would see that instead of the answer; longer would serve a client that does not stop."""

LOGGED_CHARACTERS: Final = 300
"""Of a path or of something named in it: a request line may have 64 KiB of it, and each makes a line of the log."""

SLOW_SECONDS: Final = 1.0
"""A request that took longer than this by no wish of its own is logged at info."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch

log = structlog.get_logger("queen.http")


def request_id(given: str) -> str:
    """The id of a request: the one its client gave, if it is fit to stand in a log, else a new one."""
    return given if given and _REQUEST_ID(given) else f"{random.getrandbits(64):016x}"


class Problem(msgspec.Struct, frozen=True):
    """An error as the wire tells it: RFC 9457, plus ``error`` and ``code``, which the published clients read.

    Served as application/json, not application/problem+json: those clients parse nothing else.
    """

    status: int
    code: str
    title: str
    detail: str
    headers: dict[str, str] = {}
    results: list[dict[str, object]] | None = None  # what became of each item, where the request had several

    def encode(self, request_id: str) -> bytes:
        if self.code == RouteNotFound.code:  # as the contract has it: clients probe for features with it
            return msgspec.json.encode(
                {"error": self.detail, "code": self.code} if self.detail == self.code else {"error": self.detail}
            )
        return msgspec.json.encode(
            {
                "error": self.detail,
                "code": self.code,
                "type": f"urn:queen-trio:error:{self.code}",
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
                "instance": f"urn:queen-trio:request:{request_id}",
                **({} if self.results is None else {"results": self.results}),
            }
        )


def problem_of(error: Exception) -> Problem:
    """What to tell the client about an error: nothing of our inside unless we raised it for it to read.

    An error that is none of ours is a bug, and is logged here, where it stops.
    """
    if not isinstance(error, QueenError):
        log.error("unexpected error", exc_info=error)
        detail = "Internal error: the server's log has it under this request's id"
        return Problem(500, "internal", "Internal error", detail)
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allowed
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    results = error.results if isinstance(error, QueueFull) else None
    return Problem(error.status, error.code, error.title, error.detail, headers, results)


def _shortened(fact: object) -> object:
    if isinstance(fact, str) and len(fact) > LOGGED_CHARACTERS:
        return f"{fact[:LOGGED_CHARACTERS]}\N{HORIZONTAL ELLIPSIS} ({len(fact)} characters)"
    return fact


def log_request(
    method: str, path: str, status: int | None, seconds: float, call: Call | None, error_code: str | None
) -> None:
    """One line for each request: who, what, how much, how long; never a payload.

    Args:
        status: None when the client hung up before there was an answer.
        call: what the handler was given, if it came to that.
    """
    streamed = call is not None and call.delivery is not None and call.delivery.whole is None
    patient = call is not None and call.patient
    level = logging.DEBUG
    if status is not None and status >= 500:
        level = logging.WARNING
    elif (status is not None and status >= 400) or streamed or (seconds >= SLOW_SECONDS and not patient):
        level = logging.INFO
    if level == logging.DEBUG and not log.is_enabled_for(level):
        return
    log.log(
        level,
        "request",
        method=method,
        path=_shortened(path),
        status=status,
        duration_seconds=round(seconds, 6),
        **({} if call is None else {name: _shortened(fact) for name, fact in call.facts.items()}),
        **({} if error_code is None else {"code": error_code}),
    )
