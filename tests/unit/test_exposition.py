"""What Prometheus is told of the supervisor, and what it is not told when storage is away."""

from __future__ import annotations

from queen.model.snapshot import SlotSnapshot, Snapshot
from queen.routes.wire.metrics import ServerMetrics, write_prometheus

KNOWN = ServerMetrics(
    uptime_seconds=5.0,
    processes=(),
    cluster={"push_messages": 7, "push_writes": 2, "push_write_us": 10},
    recent={},
    healthy=False,
)
SERVER = Snapshot(
    pid=1,
    version="1",
    state="degraded",
    uptime_seconds=9.5,
    url="",
    database="",
    workers_wanted=3,
    workers_active=1,
    restarts=4,
    slots=(
        SlotSnapshot(
            slot=0, state="serving", pid=2, generation=5, restarts=1, requests=70, pushed=8, loop_lag_p99_ms=5
        ),
        SlotSnapshot(slot=1, state="parked", restarts=3),
        SlotSnapshot(slot=1, state="draining", restarts=3, requests=12),
    ),
)


def test_the_supervisor_is_told_of_by_slot_once_each() -> None:
    lines = write_prometheus(KNOWN, None, SERVER).decode().splitlines()
    samples = [line for line in lines if not line.startswith("#")]

    assert len({line.rpartition(" ")[0] for line in samples}) == len(samples)
    for line in (
        "queen_supervisor_workers_wanted 3",
        "queen_supervisor_workers_active 1",
        "queen_supervisor_slots_without_worker 1",
        'queen_supervisor_worker_restarts_total{slot="0"} 1',
        'queen_supervisor_worker_restarts_total{slot="1"} 3',
        'queen_supervisor_worker_requests_total{slot="0"} 70',
        'queen_supervisor_worker_push_messages_total{slot="0"} 8',
        'queen_supervisor_worker_loop_lag_seconds{slot="0",quantile="0.99"} 0.005',
    ):
        assert line in samples


def test_counters_that_may_be_old_are_left_out_rather_than_seen_to_go_back() -> None:
    text = write_prometheus(KNOWN, None).decode()

    assert "queen_file_buffer_db_healthy 0" in text
    assert "_total" not in text
    assert "queen_supervisor" not in text
