"""What the API's description promises, asked of the running application."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from queen.config.settings import JwtSettings, Secret, Settings
from queen.routes import ROUTES
from queen.routes.wire import query as query_module

from .asgi_driver import Http, open_app

NAMES = dict.fromkeys(("partition_id", "lease_id"), "5f0c8c1e-3a52-4d0e-9b57-6f1c2d9e7a40")


async def test_the_description_is_served_as_json(http: Http) -> None:
    answer = await http.get("/openapi.json")

    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["openapi"] == "3.1.0"
    assert "/api/v1/push" in answer.json["paths"]


async def test_the_description_is_for_those_who_may_read(settings: Settings) -> None:
    jwt = JwtSettings(enabled=True, secret=Secret("s" * 40))

    async with open_app(msgspec.structs.replace(settings, jwt=jwt)) as app:
        assert (await Http(app).get("/openapi.json")).status == 401


async def test_every_route_reads_the_parameters_that_it_declares(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that read another struct than its route names would take what the description does not tell."""
    read: set[type[msgspec.Struct]] = set()
    parameters_of = query_module.parameters_of

    def remember(kind: type[msgspec.Struct]) -> Any:
        read.add(kind)
        return parameters_of(kind)

    monkeypatch.setattr(query_module, "parameters_of", remember)
    for route in ROUTES:
        if route.method == "POST":
            continue
        path = "/".join(
            NAMES.get(part[1:-1], "nothing") if part.startswith("<") else part for part in route.path.split("/")
        )
        target = f"{path}?queue=nothing&namespace=nothing"
        read.clear()
        answer = await http.request(route.method, target)

        assert answer.status < 500 or answer.status == 501, (target, answer.body)
        assert read == ({route.query} if route.query is not None else set()), target


async def test_a_handler_of_a_body_never_reads_the_query() -> None:
    assert [route.path for route in ROUTES if route.method == "POST" and route.query is not None] == []
