"""What the wire says while pushes go to the spool: in an outage, in maintenance, and when it is full."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from queen.config.settings import Settings
from tests.conftest import wait_until

from .admin_kit import ask, consume, order, pop
from .asgi_driver import Http, open_app

if TYPE_CHECKING:
    from tests.conftest import Outage

MAX_BYTES = 100_000


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return msgspec.structs.replace(settings, spool_dir=tmp_path / "spool", spool_max_bytes=MAX_BYTES)


async def switch(http: Http, *, enabled: bool) -> Any:
    return await order(http, "POST", "system", "maintenance", body={"enabled": enabled})


async def drained(http: Http) -> None:
    spooling = http.app.service.require_context().engine.spooling
    await wait_until(lambda: not spooling.active, 20)


async def test_a_push_in_maintenance_is_answered_buffered(http: Http) -> None:
    answer = await switch(http, enabled=True)
    assert isinstance(answer.pop("message"), str)
    assert answer == {"maintenanceMode": True, "bufferedMessages": 0, "bufferHealthy": True}

    trace = "6b1f4e0a-3c57-4f0e-9a43-0f7a1c2d3e4f"
    items = [
        {"queue": "q", "payload": 1, "transactionId": "a", "traceId": trace},
        {"queue": "q", "partition": "p", "payload": 2},
    ]
    pushed = await http.post("/api/v1/push", {"items": items})

    assert pushed.status == 201
    first, second = pushed.json
    assert first == {
        "index": 0,
        "transaction_id": "a",
        "status": "buffered",
        "trace_id": trace,
        "transactionId": "a",
        "queueName": "q",
        "queue": "q",
        "partition": "Default",
    }
    assert (second["status"], second["partition"], second["index"]) == ("buffered", "p", 1)
    assert second["transactionId"] == second["transaction_id"] != ""
    assert (await http.post("/api/v1/push", {"items": []})).json == []


async def test_the_status_pages_tell_what_waits(http: Http) -> None:
    await switch(http, enabled=True)
    await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": n} for n in range(3)]})

    assert await ask(http, "system", "maintenance") == {
        "maintenanceMode": True,
        "popMaintenanceMode": False,
        "bufferedMessages": 3,
        "bufferHealthy": True,
        "bufferStats": {"pending": 3, "failed": 0, "dbHealthy": True},
    }
    buffers = await ask(http, "status", "buffers")
    assert (buffers["pending"], buffers["failed"], buffers["dbHealthy"]) == (3, 0, True)
    health = await http.get("/health")
    assert health.status == 200
    assert (health.json["spool"]["active"], health.json["spool"]["pending"]) == (True, 3)
    metrics = (await http.get("/metrics/prometheus")).body.decode().splitlines()
    assert {"queen_file_buffer_pending 3", "queen_file_buffer_failed 0", "queen_maintenance_mode_enabled 1"} <= {
        *metrics
    }

    assert (await switch(http, enabled=False))["maintenanceMode"] is False
    await drained(http)
    assert await consume(http, "q") == [0, 1, 2]
    assert (await ask(http, "status", "buffers"))["pending"] == 0
    assert (await http.push("q", 4))[0]["status"] == "queued"


async def test_in_an_outage_pushes_are_buffered_and_probes_tell(http: Http, outage: Outage) -> None:
    await http.push("q", 1)
    await outage.begin()

    assert (await http.push("q", 2))[0]["status"] == "buffered"
    health, ready = await http.get("/health"), await http.get("/readyz")
    refused = [await http.get("/api/v1/pop/queue/q"), await http.post("/api/v1/system/maintenance", {"enabled": True})]

    assert (health.status, health.json["status"], health.json["spool"]["pending"]) == (503, "unhealthy", 1)
    assert (ready.status, ready.json["status"], ready.json["database"]) == (200, "ready", "disconnected")
    assert (await ask(http, "system", "maintenance"))["bufferStats"] == {"pending": 1, "failed": 0, "dbHealthy": False}
    for answer in refused:
        assert (answer.status, answer.json["code"]) == (503, "storage_unavailable")
        assert answer.headers["retry-after"] == "1"
    await outage.end()
    await drained(http)
    assert await consume(http, "q") == [1, 2]
    assert (await http.get("/health")).status == 200


async def test_a_push_that_the_spool_has_no_room_for_is_refused(http: Http) -> None:
    await switch(http, enabled=True)

    answer = await http.post("/api/v1/push", {"items": [{"queue": "q", "payload": "x" * MAX_BYTES}]})

    assert answer.status == 500
    assert answer.headers["retry-after"] == "5"
    [item] = answer.json
    assert (item["status"], item["queue"], item["partition"]) == ("failed", "q", "Default")
    assert (item["code"], item["error"].partition(";")[0]) == ("spool_full", "the spool holds the 0 MiB it may hold")
    assert (await http.push("q", 1))[0]["status"] == "buffered"
    await switch(http, enabled=False)
    await drained(http)
    assert await consume(http, "q") == [1]


async def test_maintenance_is_on_after_a_restart(settings: Settings) -> None:
    async with open_app(settings) as app:
        await switch(Http(app), enabled=True)

    async with open_app(settings) as app:
        assert (await Http(app).push("q", 1))[0]["status"] == "buffered"
        assert await pop(Http(app), "q") == []


@pytest.mark.parametrize("body", [{}, {"enabled": None}, {"enabled": "true"}, {"enabled": 1}])
async def test_maintenance_is_on_or_off(http: Http, body: Any) -> None:
    answer = await http.post("/api/v1/system/maintenance", body)

    assert (answer.status, answer.error) == (400, "enabled (boolean) is required")


async def test_maintenance_needs_a_spool(settings: Settings) -> None:
    async with open_app(msgspec.structs.replace(settings, spool_dir=None)) as app:
        answer = await Http(app).post("/api/v1/system/maintenance", {"enabled": True})

        assert (answer.status, answer.json["code"]) == (501, "not_supported")
        assert (await switch(Http(app), enabled=False))["maintenanceMode"] is False
