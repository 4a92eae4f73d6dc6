"""What a connection goes through: hang-ups, slow clients, waiting, draining, and clients of another protocol."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, closing, contextmanager
from typing import Any
from uuid import uuid4

import h2.config
import h2.connection
import h2.events
import pytest
import structlog
import trio
import trio.testing

from queen.balance import Balance, Pool
from queen.config.settings import Settings
from queen.errors import StorageUnavailable
from queen.serving import connection, serve, watch
from queen.serving.serve import HowToDrain

from .conftest import Standing
from .support import Client, Server, open_server, request

PUSH = b'{"items":[{"queue":"q","payload":1}]}'
POLL = request("GET", "/api/v1/pop/queue/q?wait=true&timeout=20000")
POP = request("GET", "/api/v1/pop/queue/q")


async def until(condition: Callable[[], bool]) -> None:
    """Look until it holds: what a server makes of bytes on a socket it tells nobody else."""
    with trio.fail_after(5):
        while True:
            if condition():
                return
            await trio.sleep(0.002)


async def parked(server: Server, count: int) -> None:
    """Until that many pops wait."""
    context = server.service.context
    assert context is not None
    await until(lambda: context.engine.statistics()["parked"] == count)


def parked_at(server: Server) -> int:
    context = server.service.context
    assert context is not None
    return context.engine.statistics()["parked"]


async def in_flight(server: Server, count: int) -> None:
    await until(lambda: server.service.requests_in_flight == count)


# -- hang-ups -----------------------------------------------------------------------------------------------------


async def test_a_client_that_hangs_up_during_a_long_poll_takes_no_lease(server: Server) -> None:
    gone = await server.connect()
    await gone.send(POLL)
    await parked(server, 1)

    await gone.aclose()
    await parked(server, 0)

    async with await server.connect() as client:
        assert (await client.exchange(request("POST", "/api/v1/push", PUSH))).status == 201
        assert (await client.exchange(POP)).status == 200
    await in_flight(server, 0)


async def test_a_client_that_has_left_leaves_no_connection_behind(server: Server) -> None:
    idle, parking, sending = [await server.connect() for _ in range(3)]
    assert await idle.is_open()
    await parking.send(POLL)
    await sending.send(request("POST", "/api/v1/push", PUSH)[:-1])
    await in_flight(server, 2)
    assert server.load.connections == 3

    for gone in (idle, parking, sending):
        await gone.aclose()

    await until(lambda: server.load.connections == 0)  # long before they have been idle for too long


async def test_a_client_that_ends_its_side_during_a_long_poll_has_hung_up(server: Server) -> None:
    async with await server.connect() as gone:
        await gone.send(POLL)
        await parked(server, 1)

        await gone.stream.send_eof()
        await parked(server, 0)

        assert await gone.receive() is None


async def test_a_hang_up_is_heard_behind_unread_requests(fast_server: Server) -> None:
    gone = await fast_server.connect()
    await gone.send(POLL)
    await parked(fast_server, 1)
    await gone.send(POLL)

    await gone.aclose()

    await parked(fast_server, 0)
    await in_flight(fast_server, 0)


async def test_a_reset_is_a_hang_up(server: Server) -> None:
    gone = await server.connect()
    await gone.send(POLL)
    await parked(server, 1)

    gone.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await gone.aclose()

    await parked(server, 0)


async def test_a_second_long_poll_on_a_connection_is_watched_too(fast_server: Server) -> None:
    gone = await fast_server.connect()
    assert (await gone.exchange(request("GET", "/api/v1/pop/queue/q?wait=true&timeout=1"))).status == 204
    await gone.send(POLL)
    await parked(fast_server, 1)

    await gone.aclose()

    await parked(fast_server, 0)


async def test_a_client_that_hangs_up_in_the_middle_of_a_body_leaves_nothing(server: Server) -> None:
    gone = await server.connect()
    await gone.send(request("POST", "/api/v1/push", PUSH)[:-1])
    await in_flight(server, 1)

    await gone.aclose()

    await in_flight(server, 0)
    async with await server.connect() as client:
        assert (await client.exchange(POP)).status == 204


async def test_a_woken_long_poll_is_answered(server: Server) -> None:
    async with await server.connect() as consumer, await server.connect() as producer:
        await consumer.send(POLL)
        await parked(server, 1)
        await producer.exchange(request("POST", "/api/v1/push", PUSH))

        answer = await consumer.receive()

        assert answer is not None
        assert [message["data"] for message in answer.json["messages"]] == [1]


# -- slow clients -------------------------------------------------------------------------------------------------


async def test_a_head_that_does_not_end_is_given_up(fast_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    async with await fast_server.connect() as client:
        await client.send(b"GET /livez HTTP/1.1\r\nHo")

        answer = await client.receive()

        assert answer is not None
        assert (answer.status, answer.json["code"]) == (408, "request_timeout")
        assert answer.headers["connection"] == "close"
        assert not await client.is_open()


async def test_a_body_that_does_not_go_on_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("queen.app", "queen.serving.connection"):
        monkeypatch.setattr(f"{module}.BODY_STALL_SECONDS", 0.1)
        monkeypatch.setattr(f"{module}.LINGER_SECONDS", 0.1)
    async with await server.connect() as client:
        await client.send(request("POST", "/api/v1/push", PUSH)[:-1])

        answer = await client.receive()

        assert answer is not None
        assert (answer.status, answer.json["code"]) == (408, "request_timeout")
        assert not await client.is_open()


async def test_the_framing_of_a_body_is_no_progress(fast_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_STALL_SECONDS", 0.3)
    async with await fast_server.connect() as client:
        await client.send(b"POST /api/v1/push HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nc;")
        with trio.move_on_after(5) as patience:
            while not client.answers:
                await client.send(b"x")
                with trio.move_on_after(0.05):
                    await client.receive(to_head=True)

        assert not patience.cancelled_caught
        assert client.answers[0].status == 408


async def test_an_idle_connection_is_closed(server_that_tires: Server) -> None:
    async with await server_that_tires.connect() as client:
        assert await client.is_open()

        assert await client.receive() is None


@pytest.fixture(params=[True, False], ids=["fast", "hypercorn"])
async def server_that_tires(
    request: pytest.FixtureRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.05)
    async with open_server(settings, fast=request.param, keep_alive_seconds=0.2) as server:
        yield server


async def test_a_long_poll_is_not_idle(server_that_tires: Server) -> None:
    async with await server_that_tires.connect() as client:
        answer = await client.exchange(request("GET", "/api/v1/pop/queue/q?wait=true&timeout=700"))

        assert answer.status == 204
        assert await client.is_open()


# -- answers ------------------------------------------------------------------------------------------------------


async def test_every_answer_has_the_same_headers_either_way(settings: Settings) -> None:
    targets = [
        ("GET", "/livez"), ("GET", "/health"), ("GET", "/nope"), ("GET", "/api/v1/nope"), ("PUT", "/api/v1/pop"),
        ("POST", "/livez"), ("OPTIONS", "/x"), ("GET", "/api/v1/pop/queue/q"), ("POST", "/api/v1/push"),
        ("GET", "/api/v1/pop/queue/%ff"), ("DELETE", "/api/v1/resources/queues/q"), ("PUT", "/api/v1/ack"),
    ]  # fmt: skip
    seen: list[list[Any]] = []
    for fast in (True, False):
        async with open_server(settings, fast=fast) as server, await server.connect() as client:
            answers = [
                await client.exchange(request(method, target, X_Request_Id=f"id-{at}"))
                for at, (method, target) in enumerate(targets)
            ]
        for answer in answers:
            answer.headers.pop("date")
        seen.append([(answer.status, answer.headers, without_uptime(answer.body)) for answer in answers])

    assert seen[0] == seen[1]


def without_uptime(body: bytes) -> Any:
    value = json.loads(body) if body else None
    if isinstance(value, dict):
        value.pop("uptime", None)
    return value


@pytest.mark.parametrize("given", ["abc-1.2:3_X", "a" * 128])
async def test_a_request_id_is_echoed(client: Client, given: str) -> None:
    assert (await client.exchange(request("GET", "/livez", X_Request_Id=given))).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", "\xe9"])
async def test_a_request_id_that_is_unfit_for_a_log_is_replaced(client: Client, given: str) -> None:
    line = b"X-Request-Id: " + given.encode("latin-1")
    answer = await client.exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n")

    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 16


async def test_pipelined_requests_are_answered_in_order_and_read_as_they_are(fast_server: Server) -> None:
    ids = [f"id-{number}" for number in range(3000)]
    async with await fast_server.connect() as client, trio.open_nursery() as sending:
        sending.start_soon(client.send, b"".join(request("GET", "/health", X_Request_Id=id) for id in ids))

        answers = [await client.receive() for _ in ids]

    assert [answer.headers["x-request-id"] for answer in answers if answer] == ids


async def test_head_answers_as_get_without_a_body(standing: Standing) -> None:
    async with await standing.server.connect() as client:
        length = (await client.exchange(request("GET", "/livez"))).headers["content-length"]
        await client.send(request("HEAD", "/livez", Connection="close"))
        received = b""
        while data := await client.stream.receive_some():
            received += data

    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert f"content-length: {length}".encode() in head.lower()
    assert body == b""


async def test_an_expecting_client_is_told_to_go_on(client: Client) -> None:
    whole = request("POST", "/api/v1/push", b'{"items":[]}', Expect="100-continue")
    await client.send(whole[:-12])
    told = await client.receive()
    await client.send(whole[-12:])
    answer = await client.receive()

    assert told is not None
    assert answer is not None
    assert (told.status, answer.status) == (100, 201)
    assert await client.is_open()


async def test_an_expecting_client_is_told_at_once_that_its_body_is_too_large(fast_server: Server) -> None:
    too_large = str(fast_server.service.settings.max_body_bytes + 1)
    async with await fast_server.connect() as client:
        await client.send(
            request("POST", "/api/v1/push", Expect="100-continue").replace(
                b"Length: 0", b"Length: " + too_large.encode()
            )
        )

        answer = await client.receive()

        assert answer is not None
        assert answer.status == 413
        assert answer.headers["connection"] == "close"


async def test_an_error_of_ours_ends_the_request_and_not_the_connection(
    fast_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def push(*_: object) -> None:
        raise RuntimeError("a bug")

    assert fast_server.service.context is not None
    monkeypatch.setattr(fast_server.service.context.engine, "push", push)
    async with await fast_server.connect() as client:
        answer = await client.exchange(request("POST", "/api/v1/push", PUSH))

        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert "a bug" not in answer.body.decode()
        assert await client.is_open()
    assert fast_server.service.statistics().failed_requests == 1


async def test_requests_are_counted_alike(server: Server) -> None:
    async with await server.connect() as client:
        await client.exchange(request("POST", "/api/v1/push", PUSH))
        await client.exchange(POP)
        await client.exchange(request("GET", "/nope"))

    done = server.service.statistics()
    assert (done.requests, done.failed_requests, done.pushed, done.popped) == (3, 0, 1, 1)


async def test_a_request_is_logged_alike(server: Server) -> None:
    with structlog.testing.capture_logs() as logs:
        async with await server.connect() as client:
            await client.exchange(request("POST", "/api/v1/push", PUSH))
            await client.exchange(request("GET", "/nope"))
        await in_flight(server, 0)

    lines = [line for line in logs if line["event"] == "request"]
    for line in lines:
        assert line.pop("duration_seconds") > 0
    stored = {"queue": "q", "partition": "Default", "messages": 1, "duplicates": 0}
    assert lines == [
        {"event": "request", "log_level": "debug", "method": "POST", "path": "/api/v1/push", "status": 201, **stored},
        {
            "event": "request",
            "log_level": "info",
            "method": "GET",
            "path": "/nope",
            "status": 404,
            "code": "no_such_route",
        },
    ]


# -- large answers ------------------------------------------------------------------------------------------------


BIG_POP = request("GET", "/api/v1/pop/queue/q?batch=10000")


async def push_much(server: Server, mebibytes: int) -> None:
    items = [{"queue": "q", "payload": uuid4().hex * 32} for _ in range(1024)]
    async with await server.connect() as client:
        for _ in range(mebibytes):
            answer = await client.exchange(request("POST", "/api/v1/push", json.dumps({"items": items}).encode()))
            assert answer.status == 201


async def test_a_large_answer_comes_in_chunks_and_whole(server: Server) -> None:
    await push_much(server, 3)
    async with await server.connect() as client:
        answer = await client.exchange(BIG_POP)

        assert answer.headers["transfer-encoding"] == "chunked"
        assert len(answer.json["messages"]) == 3 * 1024
        assert await client.is_open()


async def test_an_old_client_is_not_sent_chunks(fast_server: Server) -> None:
    await push_much(fast_server, 1)
    async with await fast_server.connect() as client:
        await client.send(BIG_POP.replace(b"HTTP/1.1", b"HTTP/1.0"))
        received = b""
        while data := await client.stream.receive_some():
            received += data

    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert len(json.loads(body)["messages"]) == 1024


async def test_an_answer_that_breaks_off_does_not_look_complete(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push_much(server, 3)
    assert server.service.context is not None
    claims = server.service.context.engine.store.claims
    whole = claims.slices

    async def slices(outcome: Any) -> AsyncIterator[Any]:
        count = 0
        parts: Any = whole(outcome)
        async with aclosing(parts) as pieces:
            async for piece in pieces:
                yield piece
                if (count := count + piece.count) > 1024:
                    raise StorageUnavailable("PostgreSQL went away")

    monkeypatch.setattr(claims, "slices", slices)
    async with await server.connect() as client:
        await client.send(BIG_POP)
        answer = await client.receive()

        assert answer is not None
        assert answer.status == 200
        assert len(answer.body) > 1024 * 1024
        assert not answer.complete


async def test_a_client_that_stops_reading_is_given_up(fast_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_STALL_SECONDS", 0.2)
    await push_much(fast_server, 16)
    async with await fast_server.connect(receive_buffer_bytes=4096) as client:
        await client.send(BIG_POP + POP)
        await in_flight(fast_server, 1)

        await in_flight(fast_server, 0)

        assert fast_server.service.counters.backpressure_waits > 0


async def test_a_client_that_stops_reading_does_not_outlast_the_drain(fast_server: Server) -> None:
    await push_much(fast_server, 16)
    async with await fast_server.connect(receive_buffer_bytes=4096) as client:
        await client.send(BIG_POP)
        await client.receive(to_head=True)

        fast_server.how_to_drain = HowToDrain(grace_seconds=0.2)
        fast_server.stop.set()

        with trio.fail_after(5):
            await fast_server.stopped.wait()


# -- draining -----------------------------------------------------------------------------------------------------


async def test_idle_connections_end_when_the_drain_begins(server: Server) -> None:
    async with await server.connect() as client:
        assert await client.is_open()

        server.stop.set()

        assert await client.receive() is None
    with trio.fail_after(5):
        await server.stopped.wait()


async def test_what_is_begun_is_answered_in_the_drain(fast_server: Server) -> None:
    async with await fast_server.connect() as client:
        await client.send(request("GET", "/api/v1/pop/queue/q?wait=true&timeout=500"))
        await parked(fast_server, 1)

        fast_server.stop.set()
        answer = await client.receive()

        assert answer is not None
        assert answer.status == 204
        assert answer.headers["connection"] == "close"
        assert await client.receive() is None


async def test_a_server_that_was_replaced_answers_on_idle_connections_and_says_that_it_was_the_last(
    server: Server,
) -> None:
    async with await server.connect() as client, await server.connect() as other:
        assert await client.is_open()
        assert await other.is_open()
        server.how_to_drain = HowToDrain(grace_seconds=20.0, linger_seconds=0.2, keep_backlog=True)

        server.stop.set()
        await trio.testing.wait_all_tasks_blocked()
        answer = await client.exchange(request("GET", "/livez"))

        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert await client.receive() is None
        assert await other.receive() is None  # it was idle for too long
    with trio.fail_after(5):
        await server.stopped.wait()


async def test_what_has_come_when_an_idle_connection_is_to_end_is_answered_and_does_not_hold_up_the_end(
    server: Server,
) -> None:
    async with await server.connect() as client:
        assert await client.is_open()
        await trio.testing.wait_all_tasks_blocked()  # it knows that it is idle

        server.stop.set()
        await client.send(request("GET", "/livez"))  # no task of the server has run in between
        answer = await client.receive()

        assert answer is not None
        assert answer.status == 200
        assert await client.receive() is None
    with trio.fail_after(5):
        await server.stopped.wait()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with closing(Pool()) as pool:
        pool.board.slots = 2
        yield pool


@contextmanager
def joined(pool: Pool, slot: int) -> Iterator[Balance]:
    """A worker's part in a pool."""
    with closing(Balance(slot, *(os.dup(descriptor) for descriptor in pool.descriptors))) as balance:
        yield balance


async def test_idle_connections_of_a_server_that_was_replaced_live_on_in_another(
    settings: Settings, pool: Pool
) -> None:
    with joined(pool, 0) as ours, joined(pool, 1) as theirs:
        async with AsyncExitStack() as stack:
            old = await stack.enter_async_context(open_server(settings, fast=True, balance=ours))
            new = await stack.enter_async_context(open_server(settings, fast=True, balance=theirs))
            clients = [await stack.enter_async_context(await old.connect()) for _ in range(4)]
            idle, polling = clients[:3], clients[3]
            assert [await client.is_open() for client in idle] == [True] * 3
            await polling.send(POLL)
            await until(lambda: sum(parked_at(server) for server in (old, new)) == 1)
            served = old.service.counters.requests + new.service.counters.requests
            old.how_to_drain = HowToDrain(grace_seconds=20.0, linger_seconds=20.0, keep_backlog=True)

            for server in (old, new):  # both, as the kernel and the pool may have dealt the connections either way
                server.service.begin_drain(replaced=True)
            old.stop.set()
            answer = await polling.receive()
            with trio.fail_after(5):
                await old.stopped.wait()

            assert answer is not None
            assert answer.status == 204
            assert "connection" not in answer.headers
            before = new.service.counters.requests
            assert [await client.is_open() for client in clients] == [True] * 4
            assert new.service.counters.requests == before + 4
            assert served == 4


async def test_a_connection_for_which_there_is_no_room_elsewhere_ends_where_it_is(
    settings: Settings, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined(pool, 0) as balance:
        monkeypatch.setattr(balance, "give", lambda _: False)
        async with open_server(settings, fast=True, balance=balance) as server, await server.connect() as client:
            assert await client.is_open()
            server.how_to_drain = HowToDrain(grace_seconds=20.0, linger_seconds=0.2, keep_backlog=True)

            server.stop.set()

            assert await client.receive() is None
            with trio.fail_after(5):
                await server.stopped.wait()


async def test_a_connection_that_waits_to_be_accepted_when_the_drain_begins_is_served(server: Server) -> None:
    connected = socket.create_connection(("127.0.0.1", server.port))  # without a turn for the server
    connected.sendall(request("GET", "/livez"))
    server.stop.set()
    async with Client(trio.SocketStream(trio.socket.from_stdlib_socket(connected))) as client:
        answer = await client.receive()

        assert answer is not None
        assert answer.status == 200
        assert await client.receive() is None
    with trio.fail_after(5):
        await server.stopped.wait()


async def test_a_client_of_the_last_hour_that_says_nothing_does_not_hold_up_the_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "FIRST_REQUEST_SECONDS", 0.1)
    async with await server.connect() as client:
        server.stop.set()

        assert await client.receive() is None
    with trio.fail_after(5):
        await server.stopped.wait()


# -- other protocols ----------------------------------------------------------------------------------------------


async def get_by_http2(client: Client, speaker: h2.connection.H2Connection, received: bytes = b"") -> int:
    """The status of the answer on the first stream."""
    with trio.fail_after(5):
        while True:
            for event in speaker.receive_data(received or await client.stream.receive_some()):
                if isinstance(event, h2.events.ResponseReceived):
                    return int(dict(event.headers)[b":status"])
            received = b""
            await client.send(speaker.data_to_send())


@pytest.mark.parametrize("cut_at", [0, 1, 3, 4, 14, 20])
async def test_http2_is_left_to_hypercorn(standing: Standing, cut_at: int) -> None:
    async with await standing.server.connect() as client:
        speaker = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        speaker.initiate_connection()
        fields = [(":method", "GET"), (":path", "/livez"), (":authority", "x"), (":scheme", "http")]
        speaker.send_headers(1, fields, end_stream=True)
        preface = speaker.data_to_send()
        for piece in (preface[:cut_at], preface[cut_at:]):
            await client.send(piece)

        assert await get_by_http2(client, speaker) == 200


async def test_an_upgrade_to_http2_is_left_to_hypercorn(standing: Standing) -> None:
    async with await standing.server.connect() as client:
        speaker = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        settings = speaker.initiate_upgrade_connection()
        assert settings is not None
        await client.send(
            request(
                "GET", "/livez", Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings=settings.decode()
            )
        )
        received = b""
        while b"\r\n\r\n" not in received:
            received += await client.stream.receive_some()
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101")
        await client.send(speaker.data_to_send())

        assert await get_by_http2(client, speaker, rest) == 200


async def test_a_post_with_an_upgrade_is_answered_as_it_is(client: Client) -> None:
    """Java's own client offers HTTP/2 with its first request, whatever that is."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAEAAEAAAAIAAAAB"}

    answer = await client.exchange(request("POST", "/api/v1/push", b'{"items":[]}', **offer))

    assert answer.status == 201
    assert await client.is_open()


async def test_an_upgrade_behind_another_request_is_refused(fast_server: Server) -> None:
    async with await fast_server.connect() as client:
        await client.send(request("GET", "/livez") + request("GET", "/livez", Connection="Upgrade", Upgrade="h2c"))
        answers = [await client.receive(), await client.receive()]

        assert [answer.status if answer else None for answer in answers] == [200, 400]
        assert not await client.is_open()
