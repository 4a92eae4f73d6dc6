"""One connection that speaks plain HTTP/1.1, in one task: receive, answer, again.

What the bytes mean is parser.py's, what a request does is a handler's (routes/). A request costs this task one wait,
one receive and one send; whatever is rare (a body in pieces, a client that reads slowly) pays for its own deadlines.

::

    idle ──► head ──► body ──► handler ──► answer ──► idle
      │        │        │         │           │
      │        └────────┴── too long: 408 ────┤ too long without progress
      └── ended ───► closed ◄── hang-up ◄────┘
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from typing import Final, NoReturn
from urllib.parse import unquote

import structlog
import trio

from queen.errors import QueenError, RequestStalled, RequestTooLarge
from queen.observability.doing import ConnectionRecord
from queen.routes.access import find_admitted
from queen.routes.answers import (
    BODY_STALL_SECONDS,
    LINGER_SECONDS,
    Problem,
    log_request,
    problem_of,
    request_id,
)
from queen.routes.call import Answer
from queen.routes.paths import encoded_path
from queen.service import Service
from queen.serving.heads import CHUNKED, CONTINUE, head_of
from queen.serving.parser import Parser, Request
from queen.serving.watch import Watch
from queen.streaming.delivery import Delivery

HEAD_SECONDS: Final = 30.0
"""From the first byte of a request to the end of its headers. Slower is a client that holds connections open."""

SEND_STALL_SECONDS: Final = 300.0
"""An answer of which the client takes nothing for this long is given up. On a loopback or a jumbo network one window
may be 64 KiB, and a reader of 1 KiB/s takes a minute to open it."""

HEAD_BYTES: Final = 16 * 1024
"""What is received at once where a request may begin. It bounds how far a client may be ahead with pipelined requests:
900 of the smallest, half a megabyte of ours. A push of 100 small messages fits."""

MAX_SHOWN_PATH: Final = 200

log = structlog.get_logger("queen.http")


class Connection:
    """Serves one client until either side ends it. Used by one task; ``hang_up`` and ``retire`` may come from another.

    Args:
        connected: not blocking, with TCP_NODELAY. Closed by the caller.
        buffer: to receive into. May be shared: nothing is kept in it while another connection runs.
    """

    def __init__(self, service: Service, watch: Watch, connected: socket.socket, buffer: memoryview) -> None:
        self.idle_since = math.inf
        self.used = False
        self._service = service
        self._watch = watch
        self._socket = connected
        self._buffer = buffer
        self._parser = Parser(service.settings.max_body_bytes)
        self._scope = trio.CancelScope()
        self._busy = False  # with a handler or its answer: a hang-up ends it
        self._hung_up = False
        self._retired = False
        self._heir: Callable[[int], bool] | None = None  # takes over the connection, once it is idle
        self._given = False  # it has: nothing may be received here any more
        self._deaf = False  # we have ended receiving: what looks like a hang-up is our own doing
        self._task: trio.lowlevel.Task | None = None
        self._request: Request | None = None
        self._waits = ""  # for its client, where that takes long; for what, and since when
        self._waits_since = 0.0
        self._request_since = 0.0

    def fileno(self) -> int:
        return self._socket.fileno()

    def doing(self) -> ConnectionRecord:
        """What it is at. Only what takes long is recorded as it happens: a quick request pays for none of this."""
        now = trio.current_time()
        request = self._request
        if self._waits:
            waits, since = self._waits, self._waits_since
        elif request is not None:
            waits, since = "", self._request_since
        else:
            waits, since = "idle", min(self.idle_since, now)
        return ConnectionRecord(
            client=self._client,
            task=self._task,
            request="" if request is None else f"{request.method} {request.path[:MAX_SHOWN_PATH]}",
            request_seconds=0.0 if request is None else now - self._request_since,
            waits=waits,
            seconds=now - since,
        )

    def hang_up(self) -> None:
        self._hung_up = not self._deaf
        if self._hung_up and self._busy:
            self._scope.cancel()

    def retire(self) -> None:
        self._retired = True

    def bequeath(self, heir: Callable[[int], bool]) -> None:
        self._heir = heir
        if self.idle_since < math.inf and self._hand_on():
            self._scope.cancel()

    def _hand_on(self) -> bool:
        """Give the connection away, if its heir takes it: by a descriptor of its own it lives on in another process.
        Nothing of a request may have been received."""
        if self._heir is None or self._hung_up or self._retired or self._parser.in_head:
            return False
        self._given = self._heir(self._socket.fileno())
        return self._given

    def end_idle(self) -> None:
        self._retired = True
        if self.idle_since < math.inf:
            self._deaf = True
            with contextlib.suppress(OSError):  # it is gone already
                self._socket.shutdown(socket.SHUT_RD)  # what has arrived is still served, then comes the end

    async def run(self) -> bytes | None:
        """Serve. Returns what was received of something that is no plain HTTP/1.1, if it comes to that.

        A hang-up cancels what is being done, at whatever point; so does the caller's own cancellation.
        """
        self._task = trio.lowlevel.current_task()
        try:
            with self._watch.watching(self), self._scope:
                await self._serve()
        except Exception as error:  # a bug of ours ends this connection and not its neighbours
            log.error("unexpected error", exc_info=error)
        return self._parser.foreign

    async def _serve(self) -> None:
        parser, requests = self._parser, self._parser.requests
        while True:
            if requests:
                await trio.lowlevel.checkpoint()  # pipelined: others have their turn in between
            elif not parser.stopped:
                if self._hand_on():
                    return
                await self._receive_head()
            if requests:
                request = requests.popleft()
                if await self._exchange(request):
                    continue
                if not request.complete:
                    await self._linger()
            elif parser.failure is not None:
                await self._refuse(parser.failure)
            return

    async def _exchange(self, request: Request) -> bool:
        """Answer one request. Returns whether the connection goes on."""
        service, started_at = self._service, trio.current_time()
        self._request, self._request_since = request, started_at
        self.used = True
        service.counters.requests += 1
        service.requests_in_flight += 1
        given = request.headers.get(b"x-request-id")
        id = request_id("" if given is None else given.decode("latin-1"))
        structlog.contextvars.bind_contextvars(request_id=id)
        status: int | None = None  # None in the log: the client hung up before there was an answer
        problem: Problem | None = None
        try:
            try:
                answer = await self._handle(request)
            except Exception as error:  # noqa: BLE001  the one place where an error becomes an answer
                problem = problem_of(error)
                answer = Answer(problem.status, problem.encode(id), headers=problem.headers)
                if problem.status >= 500:
                    service.counters.failed_requests += 1
            status = answer.status
            return await self._answer(request, id, answer)
        finally:
            self._busy = False
            self._request = None
            if request.call is not None and request.call.delivery is not None:
                await request.call.delivery.abandon()
            seconds = trio.current_time() - started_at
            log_request(request.method, request.path, status, seconds, request.call, problem.code if problem else None)
            service.requests_in_flight -= 1

    async def _handle(self, request: Request) -> Answer:
        if request.method == "OPTIONS":
            return Answer(204, None)
        path = request.path
        if not path.startswith("/"):  # absolute form, as sent to a proxy
            path = encoded_path({"path": unquote(path), "raw_path": path.encode()})
        context = self._service.require_context()
        authorization = request.headers.get(b"authorization", b"").decode("latin-1")
        route, names, subject = await find_admitted(context.access, request.method, path, authorization)
        body = await self._receive_body(request) if route.method == "POST" else b""
        request.call = self._service.make_call(route, names, request.query, body, subject)
        self._busy = True
        if self._hung_up:
            self._scope.cancel()
        return await route.handler(context, request.call)

    async def _answer(self, request: Request, id: str, answer: Answer) -> bool:
        """Send an answer. Returns whether the connection goes on."""
        status, body, content_type, headers = answer
        cors = self._service.cors
        lines = cors.lines(request.headers.get(b"origin", b"") if cors.by_origin else b"")
        close = self._retired or not (request.keep_alive and request.complete)
        if isinstance(body, Delivery):
            body.begin()
            if body.whole is None:
                chunked = request.version != "1.0"
                framing = CHUNKED if chunked else b""
                head = head_of(status, self._watch.date, id, lines, framing, headers, close=close)
                return await self._stream(head, body, chunked=chunked) and not close
            body = body.whole
        framing = b"" if body is None else b"content-length: %d\r\n" % len(body)
        head = head_of(status, self._watch.date, id, lines, framing, headers, close=close, content_type=content_type)
        await self._send(head if body is None or request.method == "HEAD" else head + body)
        return not close

    async def _stream(self, head: bytes, delivery: Delivery, *, chunked: bool) -> bool:
        """Send a large answer while it is made. False: it was cut off, which every client can tell from a whole one."""
        await self._send(head)
        try:
            async with delivery.open_chunks() as chunks:
                async for chunk in chunks:
                    await self._send(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
        except QueenError:  # in the log already
            return False
        if chunked:
            await self._send(b"0\r\n\r\n")
        return True

    async def _refuse(self, error: QueenError) -> None:
        """Answer something that is no request, and end."""
        problem, id = problem_of(error), request_id("")
        log.info("refused", error=error.detail, code=error.code, request_id=id)
        body = problem.encode(id)
        framing = b"content-length: %d\r\n" % len(body)
        lines = self._service.cors.lines()
        await self._send(
            head_of(problem.status, self._watch.date, id, lines, framing, problem.headers, close=True) + body
        )
        await self._linger()

    async def _linger(self) -> None:
        """Let the client see an answer although it is still sending: see LINGER_SECONDS."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_WR)
        with self._waiting("for its client to hang up"), trio.move_on_after(LINGER_SECONDS):
            while await self._receive_some():
                pass

    async def _receive_head(self) -> None:
        parser = self._parser
        while not (parser.requests or parser.stopped or parser.in_head):
            self.idle_since = trio.current_time()
            await self._receive()
            self.idle_since = math.inf
        if parser.requests or parser.stopped:
            return
        with self._waiting("for the rest of a head"), trio.move_on_after(HEAD_SECONDS):
            while not (parser.requests or parser.stopped):
                await self._receive()
            return
        parser.failure = RequestStalled(HEAD_SECONDS)

    async def _receive_body(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            RequestTooLarge: it is over the limit, by its announcement or by what has come of it.
            RequestStalled: it did not go on.
            InvalidRequest: its framing is wrong.
        """
        if not request.complete and request.parts is not None:
            if not request.body_bytes and request.headers.get(b"expect", b"").lower() == b"100-continue":
                await self._send(CONTINUE)
            while not request.complete and request.parts is not None:
                if self._parser.failure is not None:
                    raise self._parser.failure
                await self._receive_more_of(request)
        if request.parts is None:
            raise RequestTooLarge
        return request.take_body()

    async def _receive_more_of(self, request: Request) -> None:
        before = request.body_bytes
        with self._waiting("for more of the body"), trio.move_on_after(BODY_STALL_SECONDS):
            while request.body_bytes == before and not request.complete and self._parser.failure is None:
                await self._receive()
            return
        raise RequestStalled(BODY_STALL_SECONDS)

    async def _receive(self) -> None:
        """Receive once, and parse it."""
        count = await self._receive_some()
        if not count:
            await self._end()
        self._parser.feed(self._buffer[:count])

    async def _receive_some(self) -> int:
        """Receive into the buffer; 0: the client has ended. Waits first: there is seldom something already."""
        room = self._buffer if self._parser.in_body else self._buffer[:HEAD_BYTES]
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if self._given:  # a moment after there was something to receive: that is for the heir
                await trio.sleep_forever()  # cancelled
            try:
                return self._socket.recv_into(room)
            except BlockingIOError:  # readiness is a hint
                continue
            except OSError:
                return 0

    async def _send(self, data: bytes) -> None:
        """Send all of it. A client that is gone, or takes nothing for too long, ends the connection."""
        rest = memoryview(data)
        while True:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                pass
            except OSError:
                await self._end()
            if not rest:
                return
            with self._waiting("for its client to read"), trio.move_on_after(SEND_STALL_SECONDS) as waiting:
                await trio.lowlevel.wait_writable(self._socket)
            if waiting.cancelled_caught:
                log.info("client stopped reading", seconds=SEND_STALL_SECONDS, unsent_bytes=len(rest))
                await self._end()

    def _client(self) -> str:
        try:
            address = self._socket.getpeername()
        except OSError:
            return "a client that is gone"
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client on this machine"

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Record what the client makes us wait for."""
        self._waits, self._waits_since = what, trio.current_time()
        try:
            yield
        finally:
            self._waits = ""

    async def _end(self) -> NoReturn:
        """The client is gone: whatever is being done for it is cancelled."""
        self._scope.cancel()
        await trio.sleep_forever()
