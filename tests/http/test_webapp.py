"""The dashboard that WEBAPP_ROOT names, and what browsers are told; both ways of serving."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from queen.config.settings import CorsSettings, JwtSettings, PageSettings, Secret, Settings

from .asgi_driver import Http, open_app
from .conftest import WAY

Serve = Callable[..., AbstractAsyncContextManager[Http]]

KEY = "a-secret-of-thirty-two-bytes-or-more"


@pytest.fixture
def serve(settings: Settings) -> Serve:
    @asynccontextmanager
    async def serve(**changes: Any) -> AsyncIterator[Http]:
        async with open_app(msgspec.structs.replace(settings, **changes)) as app:
            yield WAY(app)

    return serve


@pytest.fixture
def webapp(tmp_path: Path) -> Path:
    root = tmp_path / "dashboard"
    (root / "assets").mkdir(parents=True)
    (root / "index.html").write_text("<h1>q</h1>")
    (root / "favicon.ico").write_bytes(b"\0ico")
    (root / "assets" / "app-1a2b.js").write_text("start()")
    (root / "assets" / "a b.css").write_text("h1 {}")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    return root


async def test_files_are_served_as_what_they_are(serve: Serve, webapp: Path) -> None:
    async with serve(webapp_root=webapp) as http:
        page, script, styles, icon = [
            await http.get(path) for path in ("/", "/assets/app-1a2b.js", "/assets/a%20b.css", "/favicon.ico")
        ]

    assert (page.status, page.body, page.headers["content-type"]) == (200, b"<h1>q</h1>", "text/html; charset=utf-8")
    assert (script.body, script.headers["content-type"]) == (b"start()", "text/javascript; charset=utf-8")
    assert (styles.body, styles.headers["content-type"]) == (b"h1 {}", "text/css; charset=utf-8")
    assert icon.body == b"\0ico"
    assert page.headers["cache-control"] == "no-cache"  # it names the assets of the next version tomorrow
    assert "immutable" in script.headers["cache-control"]


async def test_an_address_of_the_dashboard_is_its_page(serve: Serve, webapp: Path) -> None:
    async with serve(webapp_root=webapp) as http:
        for path in ("/queues", "/queues/orders?tab=2", "/assets", "/x.html", "//", "/%00", "/" + "x" * 5000):
            answer = await http.get(path)
            assert (answer.status, answer.body) == (200, b"<h1>q</h1>"), path
        assert (await http.get("/%ff")).status == 400


async def test_nothing_beside_the_folder_is_served(serve: Serve, webapp: Path) -> None:
    async with serve(webapp_root=webapp) as http:
        for path in (
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/assets/..%2f..%2fsecret.txt",
            "/link.txt",
            "//etc/passwd",
        ):
            assert b"secret" not in (await http.get(path)).body, path
            assert b"root:" not in (await http.get(path)).body, path


async def test_what_is_missing_is_said(serve: Serve, webapp: Path) -> None:
    async with serve(webapp_root=webapp) as http:
        assert (await http.get("/assets/app-0000.js")).status == 404  # a script that is a page would be a riddle
        assert (await http.get("/api/v1/nothing")).status == 404
        assert (await http.get("/streams/v1/nothing")).status == 404
        assert (await http.post("/", b"")).status == 404
        assert (await http.get("/health")).json["status"] == "healthy"
        assert (await http.get("/api/v1/push")).status == 405
    (webapp / "index.html").unlink()
    async with serve(webapp_root=webapp) as http:
        assert (await http.get("/")).status == 404
    async with serve() as http:
        assert (await http.get("/")).json == {"error": "Not Found"}


async def test_head_has_the_headers_of_the_page(serve: Serve, webapp: Path) -> None:
    async with serve(webapp_root=webapp) as http:
        assert (await http.request("HEAD", "/")).headers["content-type"] == "text/html; charset=utf-8"


async def test_the_dashboard_needs_no_token_and_the_api_does(serve: Serve, webapp: Path) -> None:
    jwt = JwtSettings(enabled=True, secret=Secret(KEY))
    async with serve(webapp_root=webapp, jwt=jwt) as http:
        assert (await http.get("/")).status == 200
        assert (await http.get("/queues")).status == 200
        assert (await http.get("/api/v1/resources/queues")).status == 401
        assert (await http.get("/api/v1/nothing")).status == 401


# -- other settings that change answers ---------------------------------------------------------------------------


async def test_origins_may_be_named(serve: Serve) -> None:
    cors = CorsSettings(
        allowed_origins=("https://a.test", "https://b.test:8443"),
        allowed_methods="GET",
        allowed_headers="X-Mine",
        max_age_seconds=60,
    )
    async with serve(cors=cors) as http:
        ours = await http.get("/livez", headers={"Origin": "https://b.test:8443"})
        other = await http.request("OPTIONS", "/api/v1/push", headers={"Origin": "https://b.test"})
        none = await http.get("/livez")

    assert ours.headers["access-control-allow-origin"] == "https://b.test:8443"
    for answer in (other, none):
        assert "access-control-allow-origin" not in answer.headers
    for answer in (ours, other, none):
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["access-control-allow-methods"] == "GET"
        assert answer.headers["access-control-allow-headers"] == "X-Mine"
        assert answer.headers["access-control-max-age"] == "60"


async def test_pages_are_as_long_as_the_operator_says(serve: Serve) -> None:
    async with serve(pages=PageSettings(default_limit=2, max_limit=3, default_offset=1)) as http:
        for n in range(5):
            await http.push(f"q{n}", 1)

        async def names(query: str) -> list[str]:
            return [queue["name"] for queue in (await http.get(f"/api/v1/resources/queues{query}")).json["queues"]]

        assert await names("") == ["q3", "q2"]
        assert await names("?limit=x&offset=0") == ["q4", "q3"]
        assert await names("?limit=100&offset=0") == ["q4", "q3", "q2"]
        assert await names("?limit=1&offset=2") == ["q2"]


async def test_a_longest_page_alone_leaves_shorter_ones_as_they_are(serve: Serve) -> None:
    async with serve(pages=PageSettings(max_limit=3)) as http:
        for n in range(5):
            await http.push(f"q{n}", 1)
        assert len((await http.get("/api/v1/resources/queues")).json["queues"]) == 3
        assert len((await http.get("/api/v1/resources/queues?limit=2")).json["queues"]) == 2
        assert (await http.get("/api/v1/dlq")).json["pagination"] == {"limit": 3, "offset": 0}


async def test_probes_and_figures_can_be_switched_off(serve: Serve) -> None:
    async with serve(health_endpoint=False, metrics_endpoint=False) as http:
        for path in ("/health", "/metrics", "/metrics/prometheus"):
            assert ((await http.get(path)).status, (await http.get(path)).json) == (404, {"error": "Not Found"})
        assert (await http.get("/livez")).status == 200
        assert (await http.get("/readyz")).status == 200
