"""Status, analytics, metrics and the switches of the system, over HTTP."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
import trio

from queen.config.settings import Settings
from queen.routes import ROUTES
from tests.conftest import OpenBroker, Session, wait_until

from .admin_kit import ack, ask, bury, configure, consume, order, pop
from .asgi_driver import Http, open_app

SERIES = (
    "status",
    "analytics/worker-metrics",
    "analytics/system-metrics",
    "analytics/queue-lag",
    "analytics/queue-ops",
    "analytics/queue-parked-replicas",
    "analytics/retention",
)


async def refresh(http: Http) -> Any:
    return await order(http, "POST", "stats", "refresh")


async def work(http: Http) -> None:
    """Something of every kind on queue q: 5 messages pushed, 3 consumed, 1 set aside."""
    await http.push("q", 1, 2, 3, partition="a")
    await http.push("q", 4, 5, partition="b")
    assert len(await consume(http, "q", "g")) == 5
    assert len(await pop(http, "q", "h", batch=2)) == 2
    await pop(http, "q", "g")
    await http.push("q", 6)
    await bury(http, "q", "no luck", "g")


# -- status -------------------------------------------------------------------------------------------------------


async def test_the_status_says_what_was_done_and_what_there_is(http: Http) -> None:
    await work(http)
    await refresh(http)

    status = await ask(http, "status")

    assert status["bucketMinutes"] == 1
    assert status["pointCount"] == len(status["throughput"]) >= 1
    assert sum(point["ingested"] for point in status["throughput"]) == 6
    assert sum(point["processed"] for point in status["throughput"]) == 6
    assert sum(point["dlqCount"] for point in status["throughput"]) == 1
    assert set(status["throughput"][0]) == {
        "timestamp",
        "ingested",
        "processed",
        "popMessages",
        "ingestedPerSecond",
        "processedPerSecond",
        "popPerSecond",
        "avgLagMs",
        "maxLagMs",
        "avgEventLoopLagMs",
        "maxEventLoopLagMs",
        "minFreeSlots",
        "dbErrors",
        "ackFailed",
        "dlqCount",
        "queenCpuUserPct",
        "queenCpuSysPct",
        "queenRssMb",
        "dbPoolActive",
        "dbPoolIdle",
        "dbPoolSize",
    }
    (queue,) = status["queues"]
    assert (queue["name"], queue["partitions"], queue["totalConsumed"]) == ("q", 3, 6)
    messages = status["messages"]
    assert (messages["total"], messages["processing"], messages["pending"], messages["deadLetter"]) == (6, 2, 4, 1)
    assert messages["requests"] == {"push": 3, "pop": messages["requests"]["pop"], "ack": messages["requests"]["ack"]}
    assert messages["batchEfficiency"]["push"] == 2.0
    assert status["leases"] == {"active": 1, "partitionsWithLeases": 1, "totalBatchSize": 2, "totalAcked": 0}
    assert status["deadLetterQueue"] == {
        "totalMessages": 1,
        "affectedPartitions": 1,
        "topErrors": [{"error": "no luck", "count": 1}],
    }
    (worker,) = status["workers"]
    assert set(worker) >= {"hostname", "workerId", "freeSlots", "dbConnections", "jobQueueSize", "messagesProcessed"}
    assert status["errors"] == {"dbErrors": 0, "ackFailed": 0, "dlqMessages": 1}


async def test_counts_are_exact_without_a_refresh(http: Http) -> None:
    await http.push("q", 1, 2, 3)
    assert (await ask(http, "status"))["messages"]["total"] == 3
    await pop(http, "q", batch=1, autoAck="true")

    assert (await ask(http, "status"))["messages"]["pending"] == 2


async def test_a_refresh_takes_an_empty_body_and_tells_each_part(http: Http) -> None:
    await http.push("q", 1)

    answer = await refresh(http)

    assert set(answer) == {"partition", "queue", "namespace", "task", "system", "cleanup"}


@pytest.mark.parametrize(
    ("hours", "minutes"), [(1, 1), (2, 5), (6, 5), (7, 15), (24, 15), (25, 60), (7 * 24, 60), (8 * 24, 360)]
)
async def test_a_longer_window_has_coarser_points(http: Http, hours: int, minutes: int) -> None:
    await http.push("q", 1, 2)
    await refresh(http)
    end = datetime.now(UTC) + timedelta(minutes=1)
    window = {"from": (end - timedelta(hours=hours)).isoformat(), "to": end.isoformat()}

    status = await ask(http, "status", **window)

    assert status["bucketMinutes"] == minutes
    assert sum(point["ingested"] for point in status["throughput"]) == 2


@pytest.mark.parametrize("path", SERIES)
@pytest.mark.parametrize(
    "query", ["from=nonsense&to=x", "from=2030-01-01&to=2020-01-01", "from=0001-01-01&to=9999-12-31", "to=0001-01-01"]
)
async def test_an_odd_window_is_answered(http: Http, path: str, query: str) -> None:
    answer = await http.get(f"/api/v1/{path}?{query}&limit=x&queue=nothing")

    assert answer.status == 200, answer.body


async def test_status_queues_is_a_page_with_its_total(http: Http) -> None:
    for number in range(3):
        await configure(http, f"q{number}", "n" if number else "m", f"t{number}")

    page = await ask(http, "status", "queues", limit=2, offset=1)

    assert [queue["name"] for queue in page["queues"]] == ["q1", "q0"]
    assert page["pagination"] == {"limit": 2, "offset": 1, "total": 3}
    assert (await ask(http, "status", "queues", namespace="n"))["pagination"]["total"] == 2
    (only,) = (await ask(http, "status", "queues", queue="q1"))["queues"]
    assert only["task"] == "t1"


async def test_the_status_of_a_queue_has_its_options_partitions_and_totals(http: Http) -> None:
    await configure(http, "q", "n", "t", leaseTime=30, retryLimit=2, priority=4, maxSize=9, deadLetterQueue=True)
    await http.push("q", 1, 2, partition="p")
    await ack(http, await pop(http, "q", batch=1))

    shown = await ask(http, "status", "queues", "q")

    queue = shown["queue"]
    assert (queue["name"], queue["namespace"], queue["task"], queue["priority"]) == ("q", "n", "t", 4)
    assert queue["config"] == {
        "leaseTime": 30,
        "retryLimit": 2,
        "retryDelay": 1000,
        "ttl": 3600,
        "maxQueueSize": 9,
        "deadLetterQueue": True,
    }
    partition = shown["partitions"][1]
    assert partition["messages"] == partition["stats"]
    assert (partition["stats"]["total"], partition["stats"]["pending"], partition["stats"]["completed"]) == (2, 1, 1)
    assert partition["cursor"]["totalConsumed"] == 1
    assert partition["lastActivity"] is not None
    assert shown["totals"]["messages"]["total"] == shown["totals"]["total"] == 2


async def test_the_messages_of_a_queue_are_a_bare_array(http: Http) -> None:
    await http.push("a b", 1, 2, 3)
    await ack(http, await pop(http, "a b", batch=1))

    messages = await ask(http, "status", "queues", "a b", "messages", limit=2)

    assert [message["status"] for message in messages] == ["pending", "pending"]
    assert set(messages[0]) == {
        "id",
        "transactionId",
        "partitionId",
        "queuePath",
        "queue",
        "partition",
        "status",
        "createdAt",
    }
    done = await ask(http, "status", "queues", "a b", "messages", status="completed")
    assert len(done) == 1
    assert await ask(http, "status", "queues", "nothing", "messages") == []


@pytest.mark.parametrize("interval", ["minute", "hour", "day"])
async def test_analytics_counts_messages_by_interval(http: Http, interval: str) -> None:
    await http.push("q", 1, 2, 3)
    await refresh(http)

    answer = await ask(http, "status", "analytics", interval=interval)

    assert (answer["interval"], answer["dataPoints"][-1]["messages"]) == (interval, 3)
    assert set(answer) == {"dataPoints", "interval", "from", "to"}


async def test_there_is_no_buffer_to_speak_of(http: Http) -> None:
    assert await ask(http, "status", "buffers") == {"pending": 0, "failed": 0, "dbHealthy": True, "worker": 0}


# -- analytics ----------------------------------------------------------------------------------------------------


async def test_worker_metrics_sum_the_workers(http: Http) -> None:
    await work(http)
    await refresh(http)

    answer = await ask(http, "analytics", "worker-metrics")

    assert sum(point["pushMessages"] for point in answer["timeSeries"]) == 6
    assert sum(point["ackSuccess"] for point in answer["timeSeries"]) == 6
    assert answer["summary"]["totalPushMessages"] == 6
    assert answer["summary"]["pendingMessages"] == 4
    (queue,) = answer["queues"]
    assert (queue["queueName"], queue["popCount"]) == ("q", 8)
    (worker,) = answer["workers"]
    assert (worker["live"], worker["pushMessages"]) == (True, 6)


async def test_system_metrics_have_a_series_for_each_worker(http: Http, settings: Settings) -> None:
    async with open_app(msgspec.structs.replace(settings, metrics_sample_seconds=0.01)) as app:
        quick = Http(app)
        monitor = app.service.context.engine.monitor  # type: ignore[union-attr]
        await wait_until(lambda: monitor._samples.count > 2)
        await refresh(quick)

        answer = await ask(quick, "analytics", "system-metrics")

    (point,) = answer["replicas"][0]["timeSeries"]
    assert point["sampleCount"] > 2
    rss = point["metrics"]["memory"]["rss_bytes"]
    assert 10_000_000 < rss["min"] <= rss["avg"] <= rss["max"]
    assert point["metrics"]["database"]["pool_size"]["last"] == 5
    assert set(point["metrics"]) == {"cpu", "memory", "database", "threadpool", "registries", "shared_state"}


async def test_queue_lag_is_from_push_to_delivery(http: Http, sql: Session) -> None:
    await http.push("q", 1, 2)
    await sql.execute("UPDATE queen.segments SET created_at = created_at - interval '5 seconds'")
    await consume(http, "q")
    await refresh(http)

    (point,) = await ask(http, "analytics", "queue-lag")

    assert (point["queueName"], point["popCount"]) == ("q", 2)
    assert 5000 <= point["avgLagMs"] <= point["maxLagMs"] < 10_000


async def test_queue_ops_has_a_series_for_each_queue(http: Http) -> None:
    await work(http)
    await http.push("other", 1)
    await refresh(http)

    answer = await ask(http, "analytics", "queue-ops")

    assert answer["queues"] == ["other", "q"]
    mine = [point for point in answer["series"] if point["queueName"] == "q"]
    assert sum(point["pushRequests"] for point in mine) == 3
    assert sum(point["pushMessages"] for point in mine) == 6
    assert sum(point["popEmpty"] for point in mine) > 0
    assert sum(point["partitionsCreated"] for point in mine) == 3
    assert mine[0]["partitionCount"] == 3
    only = await ask(http, "analytics", "queue-ops", queue="other")
    assert only["queues"] == ["other"]


async def test_parked_pops_are_counted_by_queue_and_worker(http: Http) -> None:
    exchange = http.open("GET", "/api/v1/pop/queue/q?wait=true&timeout=60000")
    await configure(http, "q")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)
        await refresh(http)

        answer = await ask(http, "analytics", "queue-parked-replicas")
        operations = await ask(http, "analytics", "queue-ops")
        exchange.hang_up()

    (point,) = answer["series"]
    assert (point["queueName"], point["parkedCount"]) == ("q", 1)
    assert answer["replicas"] == [{"hostname": point["hostname"], "workerId": point["workerId"]}]
    assert operations["series"][0]["parkedCount"] == 1


async def test_retention_counts_what_it_removed(http: Http) -> None:
    http.app.service.context.engine.store.activity.count("q", retention_messages=7, expiries=1)
    await configure(http, "q")
    await refresh(http)

    answer = await ask(http, "analytics", "retention")

    assert answer["totals"] == {
        "retentionMsgs": 7,
        "completedRetentionMsgs": 0,
        "evictionMsgs": 0,
        "totalMsgs": 7,
        "eventCount": 1,
    }


async def test_postgresql_says_how_it_is(http: Http) -> None:
    answer = await ask(http, "analytics", "postgres-stats")

    assert set(answer) == {
        "timestamp",
        "database",
        "databaseCache",
        "tableCache",
        "indexCache",
        "cacheSummary",
        "deadTuples",
        "hotUpdates",
        "activeQueries",
        "autovacuumStatus",
        "bufferConfig",
        "bufferUsage",
        "tableSizes",
    }
    assert answer["database"]["sizeBytes"] > 0
    assert any(table["name"] == "segments" for table in answer["tableSizes"])


# -- metrics ------------------------------------------------------------------------------------------------------


async def test_metrics_are_of_the_whole_server(http: Http) -> None:
    await http.push("q", 1, 2, 3)
    await refresh(http)

    answer = await http.get("/metrics")

    assert answer.status == 200
    metrics = answer.json
    assert set(metrics) == {"uptime", "requests", "messages", "database", "memory", "cpu"}
    assert metrics["messages"]["total"] == 3
    assert metrics["requests"]["total"] >= 2
    assert metrics["database"]["poolSize"] == 5
    assert metrics["memory"]["rss"] > 10_000_000


_LINE = re.compile(r'[a-z_]+(\{([a-z_]+="(\\.|[^"\\])*",?)*\})? -?[0-9.e+-]+')


async def test_prometheus_gets_text_that_it_can_read(http: Http) -> None:
    await http.push('a"b\\c\nd', 1)
    await bury(http, 'a"b\\c\nd')
    await refresh(http)

    answer = await http.get("/metrics/prometheus")

    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    families: set[str] = set()
    for line in lines:
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in families
            families.add(name)
        elif not line.startswith("#"):
            assert _LINE.fullmatch(line), line
            assert line.split("{")[0].split()[0] in families, line
    assert 'queen_cluster_push_messages_total{scope="cluster"} 1' in lines
    assert 'queen_dlq_depth_by_queue{queue="a\\"b\\\\c\\nd"} 1' in lines
    assert 'queen_dlq_depth{scope="cluster"} 1' in lines
    assert 'queen_queue_push_messages_per_minute{queue="a\\"b\\\\c\\nd"} 1' in lines  # of the minute that has begun
    assert "queen_file_buffer_db_healthy 1" in lines


async def test_prometheus_gets_every_family_of_the_contract(http: Http, sql: Session) -> None:
    await work(http)
    exchange = http.open("GET", "/api/v1/pop/queue/q?consumerGroup=g&wait=true&timeout=60000")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)
        await refresh(http)
        # the rates are of the last whole minute
        for table in ("queue_series", "worker_series"):
            await sql.execute(
                f"INSERT INTO queen.{table} SELECT (jsonb_populate_record(t, jsonb_build_object("
                f"'at', t.at - interval '1 minute'))).* FROM queen.{table} t WHERE span = 1"
            )
        body = (await http.get("/metrics/prometheus")).body.decode()
        exchange.hang_up()

    families = set(re.findall(r"^# TYPE (\w+)", body, re.MULTILINE))
    assert families >= {
        "queen_uptime_seconds",
        "queen_cpu_user_microseconds_total",
        "queen_cpu_system_microseconds_total",
        "queen_process_resident_memory_bytes",
        "queen_process_virtual_memory_bytes",
        "queen_db_pool_size",
        "queen_db_pool_idle",
        "queen_db_pool_active",
        "queen_threadpool_size",
        "queen_threadpool_queue_size",
        "queen_response_registry_size",
        "queen_file_buffer_pending",
        "queen_file_buffer_failed",
        "queen_file_buffer_db_healthy",
        "queen_maintenance_mode_enabled",
        "queen_sidecar_op_count",
        "queen_sidecar_op_latency_microseconds",
        "queen_sidecar_op_items",
        "queen_queue_backoff_groups",
        "queen_queue_backoff_queues",
        "queen_queue_backoff_avg_interval_milliseconds",
        "queen_shared_state_enabled",
        "queen_cluster_push_requests_total",
        "queen_cluster_pop_requests_total",
        "queen_cluster_ack_requests_total",
        "queen_cluster_transactions_total",
        "queen_cluster_push_messages_total",
        "queen_cluster_pop_messages_total",
        "queen_cluster_ack_messages_total",
        "queen_cluster_ack_total",
        "queen_cluster_db_errors_total",
        "queen_cluster_dlq_total",
        "queen_queue_push_requests_per_minute",
        "queen_queue_push_messages_per_minute",
        "queen_queue_pop_messages_per_minute",
        "queen_queue_pop_empty_per_minute",
        "queen_queue_pop_lag_milliseconds",
        "queen_queue_ack_per_minute",
        "queen_queue_transactions_per_minute",
        "queen_queue_parked_consumers",
        "queen_queue_metrics_age_seconds",
        "queen_worker_event_loop_lag_milliseconds",
        "queen_worker_free_slots",
        "queen_worker_db_connections",
        "queen_worker_job_queue_size",
        "queen_worker_backoff_size",
        "queen_worker_jobs_done_per_minute",
        "queen_worker_requests_per_minute",
        "queen_worker_messages_per_minute",
        "queen_worker_ack_per_minute",
        "queen_worker_lag_milliseconds",
        "queen_worker_db_errors_per_minute",
        "queen_worker_dlq_per_minute",
        "queen_worker_metrics_age_seconds",
        "queen_dlq_depth",
        "queen_dlq_depth_by_queue",
    }


async def test_totals_only_grow_over_restarts(settings: Settings) -> None:
    totals = []
    for _ in range(2):
        async with open_app(settings) as app:
            http = Http(app)
            await http.push("q", 1, 2)
            await refresh(http)
            body = (await http.get("/metrics/prometheus")).body.decode()
            totals.append(int(re.findall(r"^queen_cluster_push_messages_total\S* (\d+)", body, re.MULTILINE)[0]))

    assert totals == [2, 4]


async def test_what_was_not_yet_reported_is_told_at_the_end(settings: Settings, sql: Session) -> None:
    async with open_app(settings) as app:
        await Http(app).push("q", 1, 2)

    total = await sql.fetchval("SELECT value FROM queen.cluster_counters WHERE name = 'push_messages'")
    assert total == 2
    assert await sql.fetchval("SELECT count(*) FROM queen.processes") == 0


async def test_every_worker_answers_for_all(http: Http, open_broker: OpenBroker) -> None:
    async with open_broker(worker_id="other-1") as other:
        await other.push("q", 1, 2, 3)
        await other.engine.monitor.refresh()
        await refresh(http)

        metrics = (await http.get("/metrics")).json
        workers = (await ask(http, "analytics", "worker-metrics"))["workers"]

    assert metrics["messages"]["total"] == 3
    assert metrics["database"]["poolSize"] == 10
    assert {worker["workerId"] for worker in workers} == {"", "other-1"}


async def test_old_series_are_forgotten(http: Http, sql: Session) -> None:
    await http.push("q", 1)
    await refresh(http)
    await sql.execute("UPDATE queen.queue_series SET at = at - interval '10 days' WHERE span < 360")
    await sql.execute("UPDATE queen.worker_series SET at = at - interval '3 days' WHERE span = 1")

    await http.app.service.context.engine.store.metrics.forget({1: 2, 15: 7, 360: 90})

    left = await sql.fetch("SELECT DISTINCT span FROM queen.queue_series ORDER BY span")
    assert [row["span"] for row in left] == [360]
    assert await sql.fetchval("SELECT count(*) FROM queen.worker_series WHERE span = 1") == 0
    assert await sql.fetchval("SELECT count(*) FROM queen.worker_series WHERE span = 15") == 1


async def test_a_refresh_writes_what_the_other_workers_did(http: Http, open_broker: OpenBroker) -> None:
    async with open_broker() as other:
        monitor = other.engine.monitor
        await wait_until(lambda: monitor.process_id in {each.process_id for each in monitor.processes})  # it has spoken
        for pushed in (1, 2, 3):
            await other.push("q", pushed)
            await order(http, "POST", "stats", "refresh")

            series = (await ask(http, "analytics", "queue-ops", queue="q"))["series"]
            assert sum(point["pushMessages"] for point in series) == pushed


# -- switches -----------------------------------------------------------------------------------------------------


async def pause(http: Http, *, enabled: bool) -> None:
    answer = await order(http, "POST", "system", "maintenance", "pop", body={"enabled": enabled})
    assert answer["popMaintenanceMode"] is enabled
    assert isinstance(answer["message"], str)


async def test_while_pops_are_switched_off_nothing_is_handed_out_or_leased(http: Http, sql: Session) -> None:
    await http.push("q", 1, 2)
    assert await ask(http, "system", "maintenance", "pop") == {"popMaintenanceMode": False}

    await pause(http, enabled=True)

    assert await ask(http, "system", "maintenance", "pop") == {"popMaintenanceMode": True}
    assert (await ask(http, "system", "maintenance"))["popMaintenanceMode"] is True
    for query in ({}, {"autoAck": "true"}, {"wait": "true", "timeout": 60_000}):
        with trio.fail_after(2):
            assert await pop(http, "q", **query) == []
    assert await sql.fetchval("SELECT count(*) FROM queen.cursors WHERE lease_id IS NOT NULL") == 0
    await pause(http, enabled=False)
    assert await consume(http, "q") == [1, 2]


async def test_a_pop_that_waits_ends_when_pops_are_switched_off(http: Http) -> None:
    exchange = http.open("GET", "/api/v1/pop/queue/q?wait=true&timeout=60000")
    async with trio.open_nursery() as consumers:
        consumers.start_soon(exchange.run)
        await wait_until(lambda: http.app.service.context.engine.statistics()["parked"] == 1)
        with trio.fail_after(2):
            await pause(http, enabled=True)
            await exchange.started.wait()

    assert exchange.answer.status == 204


async def test_other_workers_follow_before_the_answer(http: Http, open_broker: OpenBroker) -> None:
    await http.push("q", 1)
    async with open_broker() as other:
        monitor = other.engine.monitor
        await wait_until(lambda: monitor.process_id in {each.process_id for each in monitor.processes})  # it has spoken
        for _ in range(3):
            await pause(http, enabled=True)
            assert len(await other.pop("q")) == 0
            await pause(http, enabled=False)
            assert not other.engine.pops_paused

        assert len(await other.pop("q")) == 1


async def test_pushes_and_acks_go_on_while_pops_are_switched_off(http: Http) -> None:
    await http.push("q", 1)
    messages = await pop(http, "q")
    await pause(http, enabled=True)

    assert (await ack(http, messages))[0]["leaseReleased"]
    assert (await http.push("q", 2))[0]["status"] == "queued"


async def test_the_switch_is_kept_over_a_restart(settings: Settings) -> None:
    async with open_app(settings) as app:
        await Http(app).push("q", 1)
        await pause(Http(app), enabled=True)

    async with open_app(settings) as app:
        assert await pop(Http(app), "q") == []


@pytest.mark.parametrize("body", [{}, {"enabled": None}, {"enabled": "true"}, {"enabled": 1}])
async def test_a_switch_is_on_or_off(http: Http, body: Any) -> None:
    answer = await http.post("/api/v1/system/maintenance/pop", body)

    assert (answer.status, answer.error) == (400, "enabled (boolean) is required")


async def test_maintenance_mode_is_off(http: Http) -> None:
    assert await ask(http, "system", "maintenance") == {
        "maintenanceMode": False,
        "popMaintenanceMode": False,
        "bufferedMessages": 0,
        "bufferHealthy": True,
        "bufferStats": {"pending": 0, "failed": 0, "dbHealthy": True},
    }


@pytest.mark.parametrize(
    "path", ["/api/v1/system/shared-state", "/internal/api/shared-state/stats", "/internal/api/inter-instance/stats"]
)
async def test_servers_share_nothing_but_the_database(http: Http, path: str) -> None:
    answer = await http.get(path)

    assert (answer.status, answer.json["enabled"]) == (200, False)


async def test_a_notification_of_another_server_is_taken(http: Http) -> None:
    answer = await http.post("/internal/api/notify", {"queue": "q", "partition": "p"})

    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_the_database_of_the_other_server_is_not_migrated_from(http: Http) -> None:
    for method, what in (
        ("POST", "test-connection"),
        ("POST", "start"),
        ("POST", "validate"),
        ("POST", "reset"),
        ("GET", "status"),
    ):
        answer = await http.request(method, f"/api/v1/migration/{what}")
        assert (answer.status, answer.error) == (501, "not supported")


# -- all of them --------------------------------------------------------------------------------------------------


async def test_every_get_route_answers_on_an_empty_server(http: Http) -> None:
    for route in ROUTES:
        if route.method == "GET":
            answer = await http.get(re.sub(r"<\w+>", "x", route.path))
            assert answer.status < 500 or answer.json["code"] == "not_supported", (route.path, answer.body)
