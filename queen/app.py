"""The ASGI application: routes served through Quart on Trio, errors made answers, sizes bounded, requests logged.

Opens the engine with its lifespan. Decides nothing about messages; what a request means is in routes/.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Final, NoReturn, Self, cast

import quart
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope
from quart import Blueprint, Response
from quart.ctx import RequestContext
from quart.globals import request_ctx
from quart.sessions import SessionInterface, SessionMixin
from quart.typing import ResponseReturnValue
from quart.utils import encode_headers
from quart.wrappers.base import BaseRequestWebsocket
from quart.wrappers.response import DataBody, ResponseBody
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGILifespan
from quart_trio.wrappers import TrioRequest, TrioResponse
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.routing import BaseConverter, MapAdapter

from queen.config.settings import Settings
from queen.errors import MethodNotAllowed, RequestStalled, RequestTooLarge, RouteNotFound
from queen.routes import ROUTES, Route
from queen.routes.access import find_admitted
from queen.routes.answers import (
    BODY_STALL_SECONDS,
    LINGER_SECONDS,
    Problem,
    log_request,
    problem_of,
    request_id,
)
from queen.routes.call import Answer, Call
from queen.routes.paths import encoded_path
from queen.routes.table import find_route
from queen.service import Service
from queen.streaming.delivery import Delivery

log = structlog.get_logger("queen.http")

ENDING_SECONDS: Final = 1.0
"""How long the server may take to send the last of an answer whose client has gone. hypercorn waits for ever for an
HTTP/2 connection that ended before it."""


def create_app(settings: Settings) -> QueenApp:
    """The server as an ASGI 3 application for Trio; complete by itself, and fit to be mounted in another one.

    Its lifespan opens and closes the engine; without one, requests are answered 503.
    """
    return QueenApp(settings)


class Request(TrioRequest):
    """``path`` stays percent-encoded. ``call`` is what the handler was given, once it has been.

    ``subject``: of the token that let it in.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = request_id(self.headers.get("X-Request-Id", ""))
        self.body_scope = trio.CancelScope(deadline=trio.current_time() + BODY_STALL_SECONDS)
        self.subject: str | None = None
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
        path = root_path + encoded_path(cast("dict[str, Any]", scope)) or "/"
        super().__init__(app, cast("HTTPScope", {**scope, "root_path": root_path, "path": path}))
        self._received = trio.Event()
        self._answering = False
        self._ending = False

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
        # the server's bookkeeping after the last byte is not for us to cut short, if it comes to an end
        nursery.cancel_scope.deadline = trio.current_time() + ENDING_SECONDS if self._ending else -math.inf

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
                    log_request(
                        request.method,
                        request.path,
                        status,
                        trio.current_time() - started_at,
                        request.call,
                        request.error_code,
                    )
        finally:
            service.requests_in_flight -= 1
        nursery.cancel_scope.cancel()

    async def _answer(self, request: Request, response: Response, send: ASGISendCallable) -> None:
        """Send all of it, awaiting the client's socket.

        A body that is there goes out at once: cutting it would add only calls. An error in the middle of one that is
        still being made leaves it without its end, which every client can tell from a whole one.
        """
        if isinstance(response, Answered) and response.delivery is not None:
            response.delivery.begin()
        self._answering = True
        if response.status_code == 204:
            response.headers.remove("content-type")
        cors = self.app.service.cors.lines(request.headers.get("Origin", "").encode("latin-1"))
        headers = [*encode_headers(response.headers), *cors, (b"x-request-id", request.id.encode())]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        last = b""
        if isinstance(response.response, DataBody):
            if request.method != "HEAD":  # not every server drops the body of an answer to that
                last = response.response.data
        else:
            async with response.response as body:
                async for data in body:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        if not self._received.is_set():
            await send({"type": "http.response.body", "body": last, "more_body": True})
            last = b""
            with trio.move_on_after(LINGER_SECONDS):
                await self._received.wait()
        self._ending = True
        await send({"type": "http.response.body", "body": last, "more_body": False})


class Lifespan(TrioASGILifespan):
    """The service's, and what Quart wants around its requests within."""

    app: QueenApp

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await self.app.service.live(receive, send, self.app.enter)


class QueenApp(QuartTrio):
    """See ``create_app``."""

    asgi_http_class = Connection  # type: ignore[assignment]  # it serves a QueenApp only
    asgi_lifespan_class = Lifespan
    request_class = Request
    response_class = Answered
    session_interface = NoSessions()  # type: ignore[assignment]  # Quart types the default, not the interface

    def __init__(self, settings: Settings, service: Service | None = None) -> None:
        """``service``: one that somebody else opens and closes."""
        super().__init__(__name__, static_folder=None)
        self.service = self.extensions["queen"] = service or Service(settings)
        self.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
        self.config["PROPAGATE_EXCEPTIONS"] = False  # an error is an answer, under test and in debug mode too
        self.url_map.converters["segment"] = Segment
        self.url_map.merge_slashes = False  # an empty segment is an empty name
        self.url_map.redirect_defaults = False
        self.register_blueprint(self._blueprint())
        probes = {route.path for route in ROUTES if route.probe}
        for rule in self.url_map.iter_rules():
            if rule.methods is not None and rule.rule not in probes:
                rule.methods.discard("HEAD")  # put there beside every GET: a pop would lose what it takes
        self.before_request(self._admit)
        self.register_error_handler(Exception, self._answer_error)

    async def enter(self, stack: AsyncExitStack) -> None:
        """Open what Quart wants around its requests, to be closed by ``stack``."""

        async def shut_down(failure: type[BaseException] | None, *_: object) -> None:
            if failure is None:
                await self.shutdown()

        self.nursery = await stack.enter_async_context(trio.open_nursery())
        await self.startup()
        stack.push_async_exit(shut_down)

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

    async def _admit(self) -> None:
        """Before anything else is done with a request, its body read or its path looked at by Quart."""
        context, request = self.service.context, _current_request()
        if context is not None and context.access is not None:
            authorization = request.headers.get("Authorization", "")
            with suppress(RouteNotFound, MethodNotAllowed):  # said below, or it is a view beside ours
                *_, request.subject = await find_admitted(context.access, request.method, request.path, authorization)

    async def _serve(self, route: Route, request: Request, segments: Mapping[str, str]) -> Response:
        context = self.service.require_context()
        body = await self._read_body(request) if route.method == "POST" else b""
        request.call = self.service.make_call(route, segments, request.query_string, body, request.subject)
        return self._respond(await route.handler(context, request.call))

    async def _read_body(self, request: Request) -> bytes:
        with request.body_scope:
            try:
                body: bytes = await request.body
                return body
            except RequestEntityTooLarge:
                raise RequestTooLarge from None
        raise RequestStalled(BODY_STALL_SECONDS)

    async def dispatch_request(self, request_context: RequestContext | None = None) -> ResponseReturnValue:
        request = _current_request()
        if request.routing_exception is not None:  # no route of ours, or not with this method, or a page
            route, names = find_route(request.method, request.path)
            return await self._serve(route, request, names)
        return await super().dispatch_request(request_context)

    def _respond(self, answer: Answer) -> Response:
        status, body, content_type, headers = answer
        if not isinstance(body, Delivery):
            if body is None:
                return Answered(status=status)
            return Answered(body, status, headers={"content-type": content_type, **headers})
        response = Answered(body.whole if body.whole is not None else DeliveryBody(body), status)
        response.delivery = body
        return response

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Match by path alone: a Host header that names no host must not keep a request from its answer."""
        if request is None:
            return None
        return self.url_map.bind("", request.root_path, None, request.scheme, request.method, request.path)

    def raise_routing_exception(self, request: BaseRequestWebsocket) -> NoReturn:
        """For a websocket: there are none. What HTTP asks for does not come here."""
        raise RouteNotFound("Not Found")

    async def handle_user_exception(self, error: Exception | BaseExceptionGroup) -> Any:
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
        problem = _problem_of(error)
        request.error_code = problem.code
        if problem.status >= 500:
            self.service.counters.failed_requests += 1
        response = Answered(problem.encode(request.id), problem.status)
        response.headers.update(problem.headers)
        return response


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, HTTPException) and error.code is not None:  # raised by Quart, or by a view beside ours
        return Problem(error.code, error.name.lower().replace(" ", "_"), error.name, error.description or error.name)
    return problem_of(error)


def _current_request() -> Request:
    return cast("Request", request_ctx.request)
