"""The ASGI application: routes served through Quart on Trio, errors made answers, sizes bounded, requests logged.

Opens the engine with its lifespan. Decides nothing about messages; what a request means is in routes/.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, cast

import msgspec
import quart
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope
from quart import Blueprint, Response
from quart.sessions import SessionInterface, SessionMixin
from quart.utils import encode_headers
from quart.wrappers.base import BaseRequestWebsocket
from quart.wrappers.response import DataBody, ResponseBody
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGILifespan
from quart_trio.wrappers import TrioRequest, TrioResponse
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge, RequestTimeout
from werkzeug.routing import BaseConverter, MapAdapter

from queen.config.settings import Settings
from queen.engine.engine import open_engine
from queen.errors import QueenError, RequestTooLarge, RouteNotFound, StartupError, StorageUnavailable
from queen.routes import ROUTES, Route
from queen.routes.call import Answer, Call, Context, Counters
from queen.routes.paths import decode_segment, encoded_path
from queen.streaming.delivery import Delivery

BODY_STALL_SECONDS: Final = 60.0
"""A request body must go on arriving: this long without a byte of it ends the request."""

LINGER_SECONDS: Final = 5.0
"""How long the rest of a refused body is read and dropped. A connection closed with unread data is reset, and the
client would see that instead of the answer; longer would serve a client that does not stop."""

SLOW_SECONDS: Final = 1.0
"""A request that took longer than this by no wish of its own is logged at info."""

CORS_HEADERS: Final = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
    (b"access-control-allow-headers", b"Content-Type, Authorization"),
    (b"access-control-max-age", b"86400"),
)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch

log = structlog.get_logger("queen.http")


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What an application has done since it started, and what it is doing. See ``queen.routes.call.Counters``."""

    requests: int
    failed_requests: int
    pushed: int
    popped: int
    acked: int
    streamed_answers: int
    backpressure_waits: int
    requests_in_flight: int


class Service:
    """The running server behind an application: ``app.extensions["queen"]``.

    ``stopped`` is set when the engine is closed: after a shutdown, or because a part of it failed. In the second
    case the application goes on answering 503, and who runs it should end the process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counters = Counters()
        self.context: Context | None = None
        self.requests_in_flight = 0
        self.stopped = trio.Event()
        self._draining = False

    def begin_drain(self) -> None:
        """Shutting down: waiting pops are answered at once, ``/readyz`` says no. Harmless when repeated."""
        self._draining = True
        if self.context is not None:
            self.context.draining = True
            self.context.engine.begin_drain()

    def statistics(self) -> Statistics:
        return Statistics(**msgspec.structs.asdict(self.counters), requests_in_flight=self.requests_in_flight)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open the engine. Raises StartupError with a sentence for the operator."""
        if self.settings.database_url is None:
            raise StartupError(
                "no database: set QUEEN_DATABASE_URL to postgresql://user:password@host/name (or PG_HOST and its "
                "companions), or start the server with `queen-trio run`, which brings its own"
            )
        try:
            async with open_engine(self.settings) as engine:
                self.context = Context(engine, self.settings, self.counters, trio.current_time())
                try:
                    if self._draining:
                        self.begin_drain()
                    yield
                finally:
                    self.context = None
        finally:
            self.stopped.set()


def create_app(settings: Settings) -> QueenApp:
    """The server as an ASGI 3 application for Trio; complete by itself, and fit to be mounted in another one.

    Its lifespan opens and closes the engine; without one, requests are answered 503.
    """
    return QueenApp(settings)


class Request(TrioRequest):
    """``path`` stays percent-encoded. ``call`` is what the handler was given, once it has been."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.headers.get("X-Request-Id", "")
        self.id = given if _REQUEST_ID(given) else f"{random.getrandbits(64):016x}"
        self.body_scope = trio.CancelScope(deadline=trio.current_time() + BODY_STALL_SECONDS)
        self.call: Call | None = None
        self.error_code: str | None = None


class Segment(BaseConverter):
    """One segment of a path, also an empty one, left as it is."""

    regex = "[^/]*"


class NoSessions(SessionInterface):
    """Requests carry no cookies; looking for them is time."""

    async def open_session(self, app: quart.Quart, request: BaseRequestWebsocket) -> SessionMixin:
        return self._session

    async def save_session(self, app: quart.Quart, session: SessionMixin, response: Any) -> None:
        raise NotImplementedError("a null session is never saved")

    def __init__(self) -> None:
        self._session = self.null_session_class()


class DeliveryBody(ResponseBody):
    """The body of a large answer to a pop, made while it is sent."""

    def __init__(self, delivery: Delivery) -> None:
        self._stream = delivery.open_chunks()

    async def __aenter__(self) -> Self:
        self._chunks = await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stream.__aexit__(exc_type, exc, traceback)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def make_conditional(self, begin: int, end: int | None) -> int:
        raise NotImplementedError("a pop cannot be asked for in ranges")


class Answered(TrioResponse):
    """A response with ``delivery``: the popped batch that it carries, if it does."""

    default_mimetype = "application/json"
    delivery: Delivery | None = None


class Connection(TrioASGIHTTPConnection):
    """One request: a task that receives, beside one that answers. A client that hangs up cancels the answer."""

    app: QueenApp

    def __init__(self, app: QueenApp, scope: HTTPScope) -> None:
        root_path = scope.get("root_path", "").rstrip("/")
        path = root_path + encoded_path(cast("dict[str, Any]", scope))
        super().__init__(app, cast("HTTPScope", {**scope, "root_path": root_path, "path": path}))
        self._received = trio.Event()
        self._answering = False

    async def handle_messages(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        while (message := await receive())["type"] == "http.request":
            if not self._answering:  # what comes after the answer has begun is read only to be dropped
                request.body.append(message.get("body", b""))
            request.body_scope.deadline = trio.current_time() + BODY_STALL_SECONDS
            if not message.get("more_body", False):
                request.body.set_complete()
                self._received.set()
        nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        service, started_at = self.app.service, trio.current_time()
        service.counters.requests += 1
        service.requests_in_flight += 1
        status: int | None = None  # None in the log: the client hung up before there was an answer
        try:
            with structlog.contextvars.bound_contextvars(request_id=request.id):
                try:
                    if request.method == "OPTIONS":
                        response: Response = Answered(status=204)
                    else:
                        response = cast("Response", await self.app.handle_request(request))
                    status = response.status_code
                    await self._answer(request, response, send)
                finally:
                    if request.call is not None and request.call.delivery is not None:
                        await request.call.delivery.abandon()
                    _log_request(request, status, trio.current_time() - started_at)
        finally:
            service.requests_in_flight -= 1
        nursery.cancel_scope.cancel()

    async def _answer(self, request: Request, response: Response, send: ASGISendCallable) -> None:
        """Send all of it, piece by piece when it is large; awaits the client's socket between pieces.

        An error in the middle leaves the answer without its end, which every client can tell from a whole one.
        """
        if isinstance(response, Answered) and response.delivery is not None:
            response.delivery.begin()
        self._answering = True
        if response.status_code == 204:
            response.headers.remove("content-type")
        headers = [*encode_headers(response.headers), *CORS_HEADERS, (b"x-request-id", request.id.encode())]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        last = b""
        if isinstance(response.response, DataBody):
            last = response.response.data
            size = self.app.service.settings.stream_chunk_bytes
            if len(last) >= self.app.service.settings.stream_threshold_bytes:
                for start in range(0, len(last), size):
                    await self._send_body(send, last[start : start + size], more=True)
                last = b""
        else:
            async with response.response as body:
                async for data in body:
                    await self._send_body(send, data, more=True)
        if not self._received.is_set():
            await self._send_body(send, last, more=True)
            last = b""
            with trio.move_on_after(LINGER_SECONDS):
                await self._received.wait()
        await self._send_body(send, last, more=False)

    async def _send_body(self, send: ASGISendCallable, data: bytes, *, more: bool) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})


class Lifespan(TrioASGILifespan):
    """Opens the engine, serves, closes it, all in the one task that the ASGI server gives it.

    The engine's nursery stays properly nested that way: if a part of the engine fails, waiting for the shutdown is
    cancelled and the failure comes out here. (As a while_serving generator of Quart it would have been open around a
    yield, which no cancellation passes.)
    """

    app: QueenApp

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()  # lifespan.startup: a server has nothing else to say first
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.app.service.open())
                self.app.nursery = await stack.enter_async_context(trio.open_nursery())
                await self.app.startup()
            except Exception as error:  # whatever it is, the server must be told not to serve
                sentence = error.detail if isinstance(error, StartupError) else f"{type(error).__name__}: {error}"
                log.error("cannot start", error=sentence, exc_info=not isinstance(error, StartupError))
                await send({"type": "lifespan.startup.failed", "message": sentence})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown
            await self.app.shutdown()
        await send({"type": "lifespan.shutdown.complete"})


class QueenApp(QuartTrio):
    """See ``create_app``."""

    asgi_http_class = Connection  # type: ignore[assignment]  # it serves a QueenApp only
    asgi_lifespan_class = Lifespan
    request_class = Request
    response_class = Answered
    session_interface = NoSessions()  # type: ignore[assignment]  # Quart types the default, not the interface

    def __init__(self, settings: Settings) -> None:
        super().__init__(__name__, static_folder=None)
        self.service = self.extensions["queen"] = Service(settings)
        self.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
        self.config["PROPAGATE_EXCEPTIONS"] = False  # an error is an answer, under test and in debug mode too
        self.url_map.converters["segment"] = Segment
        self.url_map.merge_slashes = False  # an empty segment is an empty name
        self.url_map.redirect_defaults = False
        self.register_blueprint(self._blueprint())
        self.register_error_handler(Exception, self._answer_error)

    def _blueprint(self) -> Blueprint:
        blueprint = Blueprint("queen", __name__)
        for route in ROUTES:
            blueprint.add_url_rule(
                route.path.replace("<", "<segment:"),
                f"{route.method} {route.path}".replace(".", ""),
                self._view(route),
                methods=[route.method],
                provide_automatic_options=False,
            )
        return blueprint

    def _view(self, route: Route) -> Callable[..., Awaitable[Response]]:
        async def view(**segments: str) -> Response:
            return await self._serve(route, _current_request(), segments)

        return view

    async def _serve(self, route: Route, request: Request, segments: dict[str, str]) -> Response:
        if request.method == "HEAD" and not route.probe:
            raise MethodNotAllowed([route.method])  # Quart lets HEAD through wherever GET goes; this one would pop
        context = self.service.context
        if context is None:
            raise StorageUnavailable("the server is not running: its lifespan has not started, or has ended")
        body = await self._read_body(request) if route.method == "POST" else b""
        parameters = {name: decode_segment(segment, name) for name, segment in segments.items()}
        request.call = Call(parameters=parameters, query=request.query_string, body=body)
        return self._respond(await route.handler(context, request.call))

    async def _read_body(self, request: Request) -> bytes:
        with request.body_scope:
            try:
                body: bytes = await request.body
                return body
            except RequestEntityTooLarge:
                raise RequestTooLarge from None
        raise RequestTimeout

    def _respond(self, answer: Answer) -> Response:
        status, body = answer
        if not isinstance(body, Delivery):
            return Answered(body, status) if body is not None else Answered(status=status)
        response = Answered(body.whole if body.whole is not None else DeliveryBody(body), status)
        response.delivery = body
        return response

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Match by path alone: a Host header that names no host must not keep a request from its answer."""
        if request is None:
            return None
        return self.url_map.bind("", request.root_path, None, request.scheme, request.method, request.path)

    async def handle_user_exception(self, error: Exception | BaseExceptionGroup) -> Any:  # type: ignore[override]
        """A group is a bug in a handler, since handlers open no nursery: it is answered as one error, not taken apart.

        Quart's own way would answer the first of its errors and drop the rest.
        """
        if isinstance(error, BaseExceptionGroup):
            if not isinstance(error, ExceptionGroup):
                raise error  # it holds a cancellation: not ours to end
            return self._answer_error(error)
        return await super().handle_user_exception(error)

    def _answer_error(self, error: Exception) -> Response:
        """The one place where an error becomes an answer."""
        request = _current_request()
        problem = problem_of(error, request.path)
        request.error_code = problem.code
        if problem.status >= 500:
            self.service.counters.failed_requests += 1
        if problem.code == "internal":
            log.error("unexpected error", exc_info=error)
        response = Answered(problem.encode(request.id), problem.status)
        response.headers.update(problem.headers)
        return response


class Problem(msgspec.Struct, frozen=True):
    """An error as the wire tells it: RFC 9457, plus ``error`` and ``code``, which the published clients read.

    Served as application/json, not application/problem+json: those clients parse nothing else.
    """

    status: int
    code: str
    title: str
    detail: str
    headers: dict[str, str] = {}

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
            }
        )


def problem_of(error: Exception, path: str) -> Problem:
    """What to tell the client about an error: nothing of our inside unless we raised it for it to read."""
    if isinstance(error, NotFound):
        error = RouteNotFound("no_such_route" if path.startswith("/api/v1/") else "Not Found")
    if isinstance(error, QueenError):
        retry = error.retry_after_seconds
        headers = {} if retry is None else {"Retry-After": str(retry)}
        return Problem(error.status, error.code, error.title, error.detail, headers)
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(set(error.valid_methods or ())))
        detail = f"this route answers {allowed}"
        return Problem(405, "method_not_allowed", "Method not allowed", detail, {"Allow": allowed})
    if isinstance(error, HTTPException) and error.code is not None:
        return Problem(error.code, error.name.lower().replace(" ", "_"), error.name, error.description or error.name)
    return Problem(500, "internal", "Internal error", "Internal error: the server's log has it under this request's id")


def _current_request() -> Request:
    return cast("Request", quart.request._get_current_object())


def _log_request(request: Request, status: int | None, seconds: float) -> None:
    """One line for each request: who, what, how much, how long; never a payload."""
    call = request.call
    facts = {} if call is None else call.facts
    streamed = call is not None and call.delivery is not None and call.delivery.whole is None
    patient = call is not None and call.patient
    say = log.debug
    if status is not None and status >= 500:
        say = log.warning
    elif (status is not None and status >= 400) or streamed or (seconds >= SLOW_SECONDS and not patient):
        say = log.info
    say(
        "request",
        method=request.method,
        path=request.path,
        status=status,
        duration_seconds=round(seconds, 6),
        **facts,
        **({} if request.error_code is None else {"code": request.error_code}),
    )
