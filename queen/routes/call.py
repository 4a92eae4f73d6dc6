"""What a handler is given and what it answers: Context, Call, Answer. Nothing here knows which server runs it.

A handler is ``async (Context, Call) -> Answer``: bytes and parameters in, one engine call, bytes out. app.py serves
handlers through Quart; any other way in front of them only has to make a Call and send an Answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from queen.auth.access import Access
from queen.config.settings import Settings
from queen.engine.engine import Engine
from queen.errors import InvalidRequest
from queen.model.snapshot import Snapshot
from queen.streaming.delivery import Delivery


class Counters(msgspec.Struct):
    """What this process has done since it started. Only grows; read it through ``Service.statistics``."""

    requests: int = 0
    failed_requests: int = 0  # answered with 5xx
    pushed: int = 0  # messages stored, without duplicates
    popped: int = 0  # messages whose answer has begun
    acked: int = 0  # acknowledgements that succeeded
    streamed_answers: int = 0  # answers that left in chunks
    backpressure_waits: int = 0  # times a streamed answer waited for its client


async def no_supervisor() -> None:
    """For an application that is served by others than our supervisor's workers."""


class Context(msgspec.Struct):
    """What all handlers of one application share. ``draining`` turns true once and stays.

    ``access``: who may do what; None: everybody everything. ``ask_supervisor``: how the server is that this process is
    a worker of; None comes back where there is none, or it does not say.
    """

    engine: Engine
    settings: Settings
    counters: Counters
    started_at: float  # trio.current_time() when the engine was open
    access: Access | None = None
    draining: bool = False
    ask_supervisor: Callable[[], Awaitable[Snapshot | None]] = no_supervisor


class Call:
    """One request, as a handler sees it.

    ``parameters`` are the parts of the path, decoded once. A handler that has popped something puts it into
    ``delivery`` at once: whoever serves the call gives it back unless the answer that carries it has begun.
    ``facts`` go into the log line of the request: names and counts, never a payload. ``patient``: taking long is
    what the client asked for.
    """

    __slots__ = ("body", "delivery", "facts", "parameters", "patient", "producer_sub", "query")

    def __init__(
        self,
        *,
        parameters: Mapping[str, str] | None = None,
        query: bytes = b"",
        body: bytes = b"",
        producer_sub: str | None = None,
    ) -> None:
        self.parameters = parameters or {}
        self.query: Mapping[str, str] = parse_query(query) if query else {}
        self.body = body
        self.producer_sub = producer_sub
        self.delivery: Delivery | None = None
        self.facts: dict[str, object] = {}
        self.patient = False


JSON: Final = "application/json"

REMEMBERED_QUERY_BYTES: Final = 512
"""Of a query string whose parameters are remembered: a consumer asks with the same one each time."""


NO_HEADERS: Final[Mapping[str, str]] = {}


class Answer(NamedTuple):
    """A status and a body, JSON unless it says otherwise. None: 204. A Delivery streams itself, or is whole when small.

    ``headers``: beyond those that every answer has.
    """

    status: int
    body: bytes | Delivery | None
    content_type: str = JSON
    headers: Mapping[str, str] = NO_HEADERS


Handler = Callable[[Context, Call], Awaitable[Answer]]


def parse_query(query: bytes) -> Mapping[str, str]:
    """The query parameters, the last of a name winning. ``+`` is a space here, as in every form.

    Raises:
        InvalidRequest: an escape in it is not UTF-8.
    """
    return _parse_again(query) if len(query) <= REMEMBERED_QUERY_BYTES else _parse_query(query)


def _parse_query(query: bytes) -> Mapping[str, str]:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except (UnicodeDecodeError, ValueError):
        raise InvalidRequest("the query string must be percent-encoded UTF-8") from None
    return MappingProxyType(dict(pairs))


_parse_again = lru_cache(maxsize=256)(_parse_query)
