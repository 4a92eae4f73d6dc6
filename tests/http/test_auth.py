"""Authentication at the routes: who may call which, and whose name a message carries."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import jwt
import msgspec
import pytest
import structlog
import trio

from queen.auth.levels import Level
from queen.config.settings import JwtSettings, Secret, Settings
from queen.routes import ROUTES, Route

from .asgi_driver import Answer, Exchange, Http, open_app

SECRET = "a secret that is long enough for HS256"
SKIPPED = JwtSettings().skip_paths
ROLES = {"nobody": Level.OPEN, "read-only": Level.READ_ONLY, "read-write": Level.READ_WRITE, "admin": Level.ADMIN}


def token(role: str = "read-write", **claims: Any) -> str:
    now = int(time.time())
    return jwt.encode(
        {"sub": "alice", "username": "alice", "role": role, "iat": now, "exp": now + 3600} | claims, SECRET
    )


def bearer(role: str = "read-write", **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(role, **claims)}"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, jwt=JwtSettings(enabled=True, secret=Secret(SECRET)))


class Authorized(Http):
    """Sends a token with every request that names none."""

    def open(
        self, method: str, target: str, body: Any = b"", headers: Mapping[str, str] | None = None, root_path: str = ""
    ) -> Exchange:
        return super().open(method, target, body, headers or bearer(), root_path)


@pytest.fixture
async def alice(http: Http) -> Http:
    """The application as a producer and consumer with a token sees it."""
    return Authorized(http.app)


# -- levels -------------------------------------------------------------------------------------------------------


def level_by_contract(method: str, path: str) -> Level:
    """What the contract asks for on a path: contract/auth.md §3, read as rules."""
    if path in ("/livez", "/readyz"):
        return Level.OPEN
    if path in ("/", "/health", "/metrics", "/metrics/prometheus", "/openapi.json") or path.startswith("/assets/"):
        return Level.READ_ONLY  # open through the skip paths, where they are in them
    if re.match(r"/api/v1/(system|migration|shared-state|stats/refresh)\b|/internal/", path):
        return Level.ADMIN
    if method == "DELETE" and re.match(r"/api/v1/(resources/queues|consumer-groups|queues/<\w+>/clear)", path):
        return Level.ADMIN
    if method == "GET" and path.startswith("/api/v1/") and not path.startswith("/api/v1/pop"):
        if path.startswith("/api/v1/ephemeral/pop"):
            return Level.READ_WRITE
        return Level.READ_ONLY
    if path in ("/streams/v1/state/get", "/api/v1/fetch", "/api/v1/partitions/changed"):
        return Level.READ_ONLY
    return Level.READ_WRITE


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_has_the_level_of_the_contract(route: Route) -> None:
    assert route.level is level_by_contract(route.method, route.path)


async def test_every_route_lets_in_who_has_its_level_and_nobody_else(http: Http) -> None:
    for route in ROUTES:
        target = re.sub(r"<\w+>", "x", route.path)
        for role, level in ROLES.items():
            answer = await http.request(route.method, target, headers=bearer(role))
            if target in SKIPPED or level >= route.level:
                assert answer.status not in (401, 403), (route, role, answer.body)
            else:
                assert (answer.status, answer.error) == (403, "Insufficient permissions"), (route, role)
        answer = await http.request(route.method, target)
        if target in SKIPPED or route.level is Level.OPEN:
            assert answer.status not in (401, 403), route
        else:
            assert (answer.status, answer.error) == (401, "Authentication required"), route


async def test_a_token_without_a_role_is_refused_even_where_reading_is_enough(http: Http) -> None:
    answer = await http.get("/api/v1/dlq", headers={"Authorization": token(role=7)})  # type: ignore[arg-type]

    assert (answer.status, answer.json["code"]) == (403, "forbidden")


async def test_what_is_no_route_is_told_only_to_who_may_know(http: Http) -> None:
    for method, path in (("GET", "/api/v1/nothing"), ("POST", "/nothing"), ("PUT", "/api/v1/push")):
        assert (await http.request(method, path)).status == 401
        assert (await http.request(method, path, headers=bearer("read-only"))).status == 403
        assert (await http.request(method, path, headers=bearer())).status in (404, 405)
    assert (await http.get("/nothing")).json == {"error": "Not Found"}  # a page would be open, and there is none


async def test_options_is_open_on_any_path(http: Http) -> None:
    for path in ("/api/v1/push", "/api/v1/resources/queues/q", "/nothing"):
        answer = await http.request("OPTIONS", path)
        assert answer.status == 204
        assert answer.headers["access-control-allow-headers"] == "Content-Type, Authorization"


async def test_open_paths_need_no_token_and_look_at_none(http: Http) -> None:
    assert (await http.get("/health")).status == 200
    assert (await http.get("/health", headers={"Authorization": "Bearer nonsense"})).status == 200
    assert (await http.request("HEAD", "/livez")).status == 200


# -- answers ------------------------------------------------------------------------------------------------------

REFUSALS = {
    "": "Authentication required",
    "Bearer ": "Authentication required",
    "Bearer nonsense": "Token decode error:",
    f"Bearer {jwt.encode({'role': 'admin'}, '', 'none')}": "Unsupported algorithm: none",
    f"Bearer {jwt.encode({'role': 'admin'}, 'x' * 64, 'HS512')}": "Unsupported algorithm: HS512",
    f"Bearer {jwt.encode({'role': 'admin'}, 'x' * 32)}": "Invalid token signature",
    f"Bearer {token(exp=int(time.time()) - 100)}": "Token has expired",
    f"Bearer {token(nbf=int(time.time()) + 3000)}": "Token verification failed:",
}


@pytest.mark.parametrize(("header", "error"), REFUSALS.items(), ids=REFUSALS.values())
async def test_a_refusal_says_why_as_every_error_does(http: Http, header: str, error: str) -> None:
    body = {"items": [{"queue": "q", "payload": 1}]}
    answer = await http.post("/api/v1/push", body, headers={"Authorization": header})

    assert answer.status == 401
    assert answer.error.startswith(error)
    assert answer.json["code"] == "unauthenticated"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {}", "{}"])
async def test_the_scheme_may_be_in_any_case_or_missing(http: Http, form: str) -> None:
    answer = await http.get("/api/v1/dlq", headers={"Authorization": form.format(token())})

    assert answer.status == 200


async def test_a_body_is_not_read_for_who_may_not_send_one(http: Http) -> None:
    exchange = http.open("POST", "/api/v1/push", [b'{"items":[', b" " * 1000, b"]}"])
    await exchange.run()

    assert exchange.answer.status == 401


async def test_nothing_is_applied_for_who_may_not(http: Http, alice: Http) -> None:
    await alice.push("q", 1)

    for role in ("read-only", "nobody"):
        refused = await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": 2}]}, headers=bearer(role))
        assert refused.status == 403
        assert (await http.get("/api/v1/pop/queue/q", headers=bearer(role))).status == 403
    assert (await http.request("DELETE", "/api/v1/resources/queues/q", headers=bearer())).status == 403

    messages = (await alice.get("/api/v1/pop/queue/q?batch=10")).json["messages"]
    assert [message["data"] for message in messages] == [1]


async def test_no_token_and_no_secret_is_in_the_log(http: Http) -> None:
    forged = jwt.encode({"role": "admin", "sub": "mallory"}, "x" * 32)
    with structlog.testing.capture_logs() as logs:
        await http.post("/api/v1/push", {"items": []}, headers=bearer())
        await http.get(f"/api/v1/dlq?token={token()[:10]}", headers={"Authorization": f"Bearer {forged}"})
        await http.get("/api/v1/dlq", headers={"Authorization": "Bearer nonsense"})

    told = repr(logs)
    assert len(logs) >= 3
    for secret in (SECRET, token()[:30], token().split(".")[2], forged, "nonsense"):
        assert secret not in told


def test_settings_show_no_secret(settings: Settings) -> None:
    shown = msgspec.structs.replace(settings.jwt, jwks_url=Secret("https://me:hunter2@idp/keys"))

    assert SECRET not in repr(settings)
    assert "hunter2" not in repr(shown)


# -- whose message it is ------------------------------------------------------------------------------------------


async def pop(http: Http, queue: str = "q", **options: Any) -> list[Any]:
    messages: list[Any] = (await http.get(f"/api/v1/pop/queue/{queue}?batch=100", **options)).json["messages"]
    return messages


def subs(messages: list[Any]) -> list[Any]:
    return [message["producerSub"] for message in messages]


async def test_a_pushed_message_carries_the_subject_of_its_token(http: Http, alice: Http) -> None:
    await alice.push("q", 1)
    await http.post("/api/v1/push", {"items": [{"queue": "q"}]}, headers=bearer(sub="bob"))

    assert subs(await pop(alice)) == ["alice", "bob"]


@pytest.mark.parametrize("sub", ["", None, 7, ["alice"], {"a": 1}, ...])
async def test_a_subject_that_is_no_text_or_empty_is_null(http: Http, alice: Http, sub: Any) -> None:
    now = int(time.time())
    claims = {"role": "admin", "exp": now + 60} | ({} if sub is ... else {"sub": sub})
    header = jwt.api_jws.encode(json.dumps(claims).encode(), SECRET)

    answer = await http.post("/api/v1/push", {"items": [{"queue": "q"}]}, headers={"Authorization": header})

    assert answer.status == 201
    assert subs(await pop(alice)) == [None]


@pytest.mark.parametrize("sub", ['"quoted"', "line\nbreak", "nul\0", "ünï 😀", "x" * 1000])
async def test_a_subject_may_be_any_text(http: Http, alice: Http, sub: str) -> None:
    answer = await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": 1}]}, headers=bearer(sub=sub))

    assert answer.status == 201
    [message] = await pop(alice)
    assert (message["producerSub"], message["data"]) == (sub, 1)


async def test_a_subject_in_the_body_is_ignored(alice: Http) -> None:
    item = {"queue": "q", "payload": {"producerSub": "mallory"}, "producerSub": "mallory"}

    await alice.post("/api/v1/push", {"items": [item], "producerSub": "mallory"})

    [message] = await pop(alice)
    assert message["producerSub"] == "alice"
    assert message["data"] == {"producerSub": "mallory"}


async def test_transaction_pushes_carry_the_subject(alice: Http) -> None:
    operations = [
        {"type": "push", "items": [{"queue": "q", "payload": 1, "producerSub": "mallory"}]},
        {"type": "push", "queue": "q", "payload": 2, "producerSub": "mallory"},
    ]

    answer = await alice.post("/api/v1/transaction", {"operations": operations})

    assert answer.json["success"] is True
    assert subs(await pop(alice)) == ["alice", "alice"]


async def test_stream_sink_pushes_carry_the_subject(http: Http, alice: Http) -> None:
    [pushed] = await alice.push("source", 1)
    query = {"name": "n", "source_queue": "source", "config_hash": "h"}
    query_id = (await alice.post("/streams/v1/queries", query)).json["query_id"]
    cycle = {
        "query_id": query_id,
        "partition_id": pushed["partition_id"],
        "push_items": [{"queue": "q", "payload": 1, "producerSub": "mallory"}],
        "producerSub": "mallory",
    }

    answer = await http.post("/streams/v1/cycle", cycle, headers=bearer(sub="bob"))

    assert answer.json["success"] is True
    assert subs(await pop(alice)) == ["bob"]


async def test_the_subject_is_shown_wherever_a_message_is(alice: Http) -> None:
    await alice.post("/api/v1/configure", {"queue": "q", "options": {"retryLimit": 0}})
    [pushed] = await alice.push("q", 1)
    [message] = await pop(alice)

    detail = await alice.get(f"/api/v1/messages/{pushed['partition_id']}/{pushed['transaction_id']}")
    listed = await alice.get("/api/v1/messages?queue=q")
    await alice.post(
        "/api/v1/ack", {name: message[name] for name in ("transactionId", "partitionId", "leaseId")} | {"status": "dlq"}
    )
    dead = await alice.get("/api/v1/dlq?queue=q")

    assert detail.json["producerSub"] == "alice"
    assert subs(listed.json["messages"]) == ["alice"]
    assert subs(dead.json["messages"]) == ["alice"]


async def test_messages_of_one_flush_keep_their_own_subjects(http: Http, alice: Http) -> None:
    async def produce(name: str) -> None:
        items = [{"queue": "q", "payload": name} for _ in range(20)]
        await http.post("/api/v1/push", {"items": items}, headers=bearer(sub=name))

    async with trio.open_nursery() as producers:
        for n in range(10):
            producers.start_soon(produce, f"producer-{n}")

    messages: list[Any] = (await alice.get("/api/v1/pop/queue/q?batch=1000")).json["messages"]
    assert len(messages) == 200
    assert all(message["producerSub"] == message["data"] for message in messages)


class TestWithoutAuthentication:
    @pytest.fixture
    async def open_http(self, settings: Settings) -> AsyncIterator[Http]:
        async with open_app(msgspec.structs.replace(settings, jwt=JwtSettings())) as app:
            yield Http(app)

    async def test_a_message_has_no_subject_whatever_is_sent(self, open_http: Http) -> None:
        item = {"queue": "q", "payload": 1, "producerSub": "mallory"}
        for headers in ({}, bearer(), {"Authorization": "Bearer nonsense"}):
            answer = await open_http.post("/api/v1/push", {"items": [item]}, headers=headers)
            assert answer.status == 201

        assert subs(await pop(open_http)) == [None] * 3

    async def test_every_route_is_open(self, open_http: Http) -> None:
        answers: list[Answer] = [
            await open_http.request(route.method, re.sub(r"<\w+>", "x", route.path)) for route in ROUTES
        ]

        assert not [answer for answer in answers if answer.status in (401, 403)]
