"""What the application does around its routes: sizes, hang-ups, failures, lifespan, logs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import structlog
import trio
import trio.testing

from queen.app import create_app
from queen.config.settings import Secret, Settings

from .asgi_driver import Exchange, Http, StartupFailed, open_app, run_lifespan

MiB = 1024 * 1024


# -- ends ---------------------------------------------------------------------------------------------------------


async def test_a_client_that_goes_while_the_last_is_sent_keeps_no_request(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP/2 hypercorn waits for ever to send to a connection that has ended; a stop waited for it."""
    monkeypatch.setattr("queen.app.ENDING_SECONDS", 0.01)
    exchange = http.open("GET", "/livez")
    send = exchange._send

    async def stuck_at_the_end(message: dict[str, Any]) -> None:
        await send(message)
        if message["type"] == "http.response.body":
            exchange.hang_up()
            await trio.sleep_forever()

    monkeypatch.setattr(exchange, "_send", stuck_at_the_end)

    with trio.fail_after(5):
        await exchange.run()

    assert http.app.service.requests_in_flight == 0


async def test_an_answer_to_head_has_no_body(http: Http) -> None:
    head, get = await http.request("HEAD", "/livez"), await http.get("/livez")

    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(get.body))


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def small(settings: Settings) -> AsyncIterator[Http]:
    """An application that takes bodies of 1 MiB at most."""
    async with open_app(msgspec.structs.replace(settings, max_body_bytes=MiB)) as app:
        yield Http(app)


def push_of(size: int) -> bytes:
    head, tail = b'{"items":[{"queue":"q","payload":"', b'"}]}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


async def test_a_body_of_exactly_the_limit_is_taken(small: Http) -> None:
    body = push_of(MiB)

    announced = await small.post("/api/v1/push", body, headers={"Content-Length": str(len(body))})
    in_pieces = await small.post("/api/v1/push", [body[: MiB // 2], body[MiB // 2 :]])

    assert (announced.status, in_pieces.status) == (201, 201)


async def test_a_body_announced_too_large_is_refused_and_then_dropped(small: Http) -> None:
    pieces = [b"x" * 65536] * 32
    exchange = small.open("POST", "/api/v1/push", pieces, headers={"Content-Length": str(32 * 65536)})

    await exchange.run()

    check_too_large(exchange)
    assert exchange.received == 32  # read to its end, or a client that sends first and reads then would see a reset


async def test_a_body_that_grows_too_large_is_refused_and_not_kept(small: Http) -> None:
    pieces = [b"x" * 65536] * 1600  # 100 MiB, all of them one object
    exchange = small.open("POST", "/api/v1/push", pieces)

    tracemalloc.start()
    await exchange.run()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    check_too_large(exchange)
    assert exchange.received == 1600
    assert peak_bytes < 4 * MiB


def check_too_large(exchange: Exchange) -> None:
    assert exchange.complete
    assert exchange.answer.status == 413
    assert exchange.answer.error == "Request body too large"
    assert exchange.answer.headers["access-control-allow-origin"] == "*"


async def test_a_refused_client_that_never_stops_sending_is_left_to_itself(
    small: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.app.LINGER_SECONDS", 0.05)
    exchange = small.open("POST", "/nowhere", [b"x" * 65536])
    monkeypatch.setattr(exchange, "_pieces", Endless())

    with trio.fail_after(30):
        await exchange.run()

    assert exchange.complete
    assert exchange.answer.status == 404


class Endless:
    """Pieces of a body without end."""

    def pop(self, at: int) -> bytes:
        return b"x" * 65536


async def test_a_body_that_stops_arriving_is_answered_408(small: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queen.app.BODY_STALL_SECONDS", 0.05)
    monkeypatch.setattr("queen.app.LINGER_SECONDS", 0.05)
    exchange = small.open("POST", "/api/v1/push", [b'{"items":', b"[]}"])
    monkeypatch.setattr(exchange, "_receive", stalling(exchange))

    with trio.fail_after(30):
        await exchange.run()

    assert exchange.complete
    assert exchange.answer.status == 408


def stalling(exchange: Exchange) -> Callable[[], Any]:
    async def receive() -> dict[str, Any]:
        if exchange.received == 0:
            exchange.received += 1
            return {"type": "http.request", "body": b"{", "more_body": True}
        return await trio.sleep_forever()

    return receive


# -- hang-ups -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stalled_answers(settings: Settings) -> AsyncIterator[tuple[Http, trio.Event]]:
    """An application in which a hook keeps every answer to a pop back, after the batch was taken."""
    app = create_app(settings)
    reached = trio.Event()

    async def stall(response: Any) -> Any:
        if response.delivery is not None:
            reached.set()
            await trio.sleep_forever()
        return response

    app.after_request(stall)
    async with run_lifespan(app):
        yield Http(app), reached


@pytest.mark.parametrize("query", ["batch=10", "batch=10&autoAck=true", "batch=2000"])
async def test_a_client_gone_before_its_answer_began_leaves_no_lease(settings: Settings, query: str) -> None:
    async with stalled_answers(settings) as (http, reached), open_app(settings) as other:
        await http.push("q", *("x" * 100 for _ in range(2000)))
        exchange = http.open("GET", f"/api/v1/pop/queue/q?{query}")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.run)
            await reached.wait()
            exchange.hang_up()

        again = (await Http(other).get("/api/v1/pop/queue/q?batch=2000&wait=true&timeout=20000")).json
    assert exchange.sent == []
    assert len(again["messages"]) == 2000
    assert {message["deliveryAttempt"] for message in again["messages"]} == {1}


async def test_a_client_gone_while_it_waits_takes_nothing(http: Http) -> None:
    exchange = http.open("GET", "/api/v1/pop/queue/q?wait=true&timeout=60000")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.run)
        with trio.fail_after(10):
            while http.app.service.context.engine.statistics()["parked"] == 0:
                await trio.testing.wait_all_tasks_blocked(0.001)
        exchange.hang_up()
    await http.push("q", 1)

    assert exchange.sent == []
    assert (await http.get("/api/v1/pop/queue/q")).json["messages"][0]["data"] == 1


async def test_a_client_gone_while_it_pushes_may_have_pushed_all_or_nothing(http: Http) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(20):
            exchange = http.open("POST", "/api/v1/push", {"items": [{"queue": "q", "payload": number}] * 5})
            nursery.start_soon(exchange.run)
            for _ in range(number):
                await trio.lowlevel.checkpoint()
            exchange.hang_up()

    popped = await http.get("/api/v1/pop/queue/q?batch=1000")

    data = [message["data"] for message in popped.json["messages"]] if popped.status == 200 else []
    assert {data.count(number) for number in data} <= {5}


async def test_a_client_that_stops_reading_holds_little_and_disturbs_nobody(http: Http) -> None:
    for _ in range(10):
        await http.push("q", *("x" * 1000 for _ in range(1000)))
    exchange = http.open("GET", "/api/v1/pop/queue/q?batch=10000")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.run)
        await exchange.started.wait()
        exchange.may_send = trio.Event()
        await http.push("other", 1)
        waits = http.app.extensions["queen"].statistics().backpressure_waits
        sent = len(exchange.sent)
        assert (await http.get("/api/v1/pop/queue/other")).status == 200
        assert http.app.extensions["queen"].statistics().backpressure_waits == waits == 1
        assert len(exchange.sent) == sent < 5
        exchange.may_send.set()

    assert exchange.complete
    assert len(exchange.answer.json["messages"]) == 10_000


async def test_a_large_answer_leaves_in_chunks_of_64_kib(http: Http) -> None:
    await http.push("q", *range(5000))

    with structlog.testing.capture_logs() as lines:
        answer = await http.get("/api/v1/pop/queue/q?batch=5000&consumerGroup=g")

    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert "content-length" not in answer.headers
    assert {len(chunk) for chunk in answer.chunks[:-1]} == {65536}
    assert [message["data"] for message in answer.json["messages"]] == list(range(5000))
    assert http.app.extensions["queen"].statistics().streamed_answers == 1
    assert [line["event"] for line in lines if line["log_level"] == "info"] == [
        f"streaming large response: {len(answer.body) / MiB:.1f} MB",
        "request",
    ]


# -- failures -----------------------------------------------------------------------------------------------------


async def cut_off(sql: Any) -> None:
    """The database takes no connection any more, and those that were are gone."""
    await sql.execute("UPDATE pg_database SET datallowconn = false WHERE datname = current_database()")
    await sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


async def test_without_a_database_requests_are_503_and_probes_tell(http: Http, sql: Any) -> None:
    await http.push("q", 1)
    await cut_off(sql)

    push = await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": 1}]})
    pop = await http.get("/api/v1/pop/queue/q")
    health, ready, alive = [await http.get(target) for target in ("/health", "/readyz", "/livez")]

    for refused in (push, pop):
        assert refused.status == 503
        assert refused.json["code"] in ("storage_unavailable", "outcome_unknown")
        assert refused.headers["retry-after"] == "1"
        assert "postgresql" not in refused.error.replace("PostgreSQL", "")
        assert "SELECT" not in refused.error
    assert (health.status, health.json["status"], health.json["database"]) == (503, "unhealthy", "disconnected")
    assert (ready.status, ready.json) == (503, {"status": "unready", "database": "disconnected"})
    assert alive.status == 200
    assert http.app.extensions["queen"].statistics().failed_requests >= 2


async def test_storage_lost_in_the_middle_of_an_answer_cuts_it_off(http: Http, sql: Any) -> None:
    for _ in range(30):
        await http.push("q", *("x" * 1000 for _ in range(1000)))
    exchange = http.open("GET", "/api/v1/pop/queue/q?batch=30000")
    failures: list[BaseException] = []

    async def run() -> None:
        try:
            await exchange.run()
        except* Exception as group:  # noqa: BLE001  whatever it is, a server has to see it
            failures.append(group)

    with structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await exchange.started.wait()
            exchange.may_send = trio.Event()
            await cut_off(sql)
            exchange.may_send.set()

    assert failures, "the server would have taken the answer for a whole one"
    assert not exchange.complete
    assert exchange.answer.status == 200
    with pytest.raises(json.JSONDecodeError):
        exchange.answer.json  # noqa: B018
    assert "answer cut off" in [line["event"] for line in lines]


async def test_an_error_nobody_expected_tells_the_log_and_not_the_client(settings: Settings) -> None:
    app = create_app(settings)

    async def broken() -> str:
        raise ZeroDivisionError("the inside of it")

    async def broken_twice() -> str:
        raise ExceptionGroup("the inside of it", [ZeroDivisionError("one"), ValueError("two")])

    app.add_url_rule("/broken", "broken", broken)
    app.add_url_rule("/broken-twice", "broken_twice", broken_twice)
    async with run_lifespan(app):
        for target in ("/broken", "/broken-twice"):
            with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
                answer = await Http(app).get(target)

            assert answer.status == 500
            assert answer.json["code"] == "internal"
            assert answer.headers["access-control-allow-origin"] == "*"
            assert b"inside" not in answer.body
            assert b"Traceback" not in answer.body
            told = next(line for line in lines if line["log_level"] == "error")
            assert "the inside of it" in str(told["exc_info"])
            assert told["request_id"] == answer.headers["x-request-id"]


# -- lifespan -----------------------------------------------------------------------------------------------------


async def test_without_its_lifespan_an_application_answers_503(settings: Settings) -> None:
    answer = await Http(create_app(settings)).get("/api/v1/pop/queue/q")

    assert answer.status == 503
    assert answer.error.startswith("the server is not running")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [(None, "no database: set QUEEN_DATABASE_URL"), ("postgresql://nobody@127.0.0.1:1/none", "PostgreSQL")],
)
async def test_an_application_that_cannot_start_says_why_in_a_sentence(url: str | None, sentence: str) -> None:
    app = create_app(Settings(database_url=None if url is None else Secret(url), db_connect_timeout_seconds=0.2))

    with pytest.RaisesGroup(pytest.RaisesExc(StartupFailed, match=sentence), flatten_subgroups=True) as caught:
        async with run_lifespan(app):
            pass

    assert "\n" not in str(caught.value.exceptions[0])


async def test_an_engine_that_fails_is_told_of_and_leaves_503(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        await failing.wait()
        raise ZeroDivisionError("a part of the engine")

    failing = trio.Event()
    monkeypatch.setattr("queen.engine.engine.run_housekeeping", fail)
    app = create_app(settings)

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with run_lifespan(app):
            assert (await Http(app).get("/livez")).status == 200
            failing.set()
            with trio.fail_after(10):
                await trio.sleep_forever()

    assert app.service.stopped.is_set()
    assert (await Http(app).get("/livez")).status == 503


async def test_an_application_serves_again_after_its_lifespan_was_run_again(settings: Settings) -> None:
    app = create_app(settings)

    for number in (1, 2):
        async with run_lifespan(app):
            await Http(app).push("q", number)


# -- logs ---------------------------------------------------------------------------------------------------------


async def test_each_request_is_one_line_with_its_numbers_and_no_payload(http: Http) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": "a secret"}] * 3})
        popped = (await http.get("/api/v1/pop/queue/q?batch=2&consumerGroup=g")).json
        await http.post("/api/v1/ack", {n: popped["messages"][0][n] for n in ("transactionId", "partitionId")})
        await http.post("/api/v1/push", b'{"a secret":')

    assert "secret" not in str(lines)
    lines = [line for line in lines if line["event"] == "request"]
    for line in lines:
        assert isinstance(line.pop("duration_seconds"), float)
        assert isinstance(line.pop("request_id"), str)
        del line["event"]
    push, pop, ack, refused = lines
    assert push == {
        "log_level": "debug",
        "method": "POST",
        "path": "/api/v1/push",
        "status": 201,
        "queue": "q",
        "partition": "Default",
        "messages": 3,
        "duplicates": 0,
    }
    assert pop == {
        "log_level": "debug",
        "method": "GET",
        "path": "/api/v1/pop/queue/q",
        "status": 200,
        "queue": "q",
        "partition": None,
        "group": "g",
        "messages": 2,
        "partitions": 1,
    }
    assert (ack["acks"], ack["refused"], ack["group"]) == (1, 0, "__QUEUE_MODE__")
    assert (refused["log_level"], refused["status"], refused["code"]) == ("info", 400, "invalid_request")
