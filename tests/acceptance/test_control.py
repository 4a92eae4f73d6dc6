"""What operators and service managers see of a real server, and what it does when they tell it to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartServer
from .support import HERE, NO_DATABASE, PROJECT, TINY, Server, destroy, eventually, pg_bin


class Operator:
    """Runs commands that find the server by its control socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        name, *rest = command
        return subprocess.run(
            [sys.executable, "-P", "-m", "queen", name, "--control-socket", str(self.path), *rest],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, PROJECT)))},
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
            cwd="/",
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "--json", check=False).stdout or "{}")
        return found


@pytest.fixture
def operator(scratch: Path) -> Operator:
    return Operator(scratch / "a-control-socket")


@pytest.fixture
def tiny(start_server: StartServer, operator: Operator) -> Server:
    """A server of two workers that needs no database."""
    return start_server(*TINY, *NO_DATABASE, "--control-socket", str(operator.path)).wait_ready()


def test_status_shows_every_worker_and_says_by_its_exit_code_that_all_is_well(tiny: Server, operator: Operator) -> None:
    done = operator.run("status")

    head, columns, *slots = done.stdout.splitlines()
    assert re.match(rf"queen-trio \S+ serving, 2 of 2 workers, up \S+, http://127.0.0.1:{tiny.port}, ", head)
    assert columns.split()[:4] == ["slot", "pid", "gen", "state"]
    assert {int(line.split()[1]) for line in slots} == set(tiny.worker_pids)
    assert all(line.split()[3] == "serving" for line in slots)


def test_status_explains_how_a_worker_ended(tiny: Server, operator: Operator) -> None:
    destroy(tiny.worker_pids[0])

    seen = eventually(10, lambda: (now := operator.status())["restarts"] == 1 and now["state"] == "serving" and now)
    assert isinstance(seen, dict)
    ends = [slot["last_exit"] for slot in seen["slots"] if slot["restarts"]]
    assert len(ends) == 1
    assert re.fullmatch(r"was killed by SIGKILL \(perhaps out of memory(; it held \d+ MiB when last seen)?\)", ends[0])


def test_a_server_that_lost_its_workers_is_degraded_and_status_says_so_by_its_exit_code(
    start_server: StartServer, operator: Operator, scratch: Path
) -> None:
    broken = scratch / "broken"
    server = start_server(
        *TINY,
        *NO_DATABASE,
        *("--control-socket", str(operator.path)),
        environment={"TINY_FAULT": f"boot-crash-if:{broken}"},
    ).wait_ready()
    broken.touch()
    destroy(server.worker_pids[0])

    eventually(15, lambda: operator.status()["state"] == "degraded")

    done = operator.run("status", check=False)
    assert done.returncode == 1
    assert "without a worker: slot" in done.stdout
    assert "exited with code 9" in done.stdout


def test_where_no_server_runs_every_command_says_so(operator: Operator) -> None:
    for command in (["status"], ["top"], ["tree"], ["reload"], ["stop"], ["workers", "2"]):
        done = operator.run(*command, check=False)

        assert done.returncode == 3
        assert done.stderr.startswith(f"queen-trio: no server answers on {operator.path}")


def test_workers_are_added_and_removed(tiny: Server, operator: Operator) -> None:
    operator.run("workers", "3")
    eventually(10, lambda: operator.status()["workers_active"] == 3)
    assert len(tiny.worker_pids) == 3

    operator.run("workers", "1")
    eventually(10, lambda: len(tiny.worker_pids) == 1)
    assert operator.run("workers", "0", check=False).stderr == (
        "queen-trio: 0 workers cannot be run: give a number from 1 to 1024\n"
    )


def test_reload_waits_until_every_worker_is_a_new_one(tiny: Server, operator: Operator) -> None:
    before = set(tiny.worker_pids)

    done = operator.run("reload")

    assert done.stdout == "2 workers replaced\n"
    eventually(10, lambda: not before & set(tiny.worker_pids))
    assert tiny.answers()


def test_stop_returns_when_the_process_is_gone(tiny: Server, operator: Operator) -> None:
    done = operator.run("stop")

    assert done.stdout == f"process {tiny.process.pid} has ended\n"
    assert tiny.wait_exit(1) == 0
    assert not operator.path.exists()


def test_top_without_a_terminal_prints_a_table_each_time(tiny: Server, operator: Operator) -> None:
    done = operator.run("top", "--interval", "0.1", "--count", "2")

    assert done.stdout.count("slot ") == 2
    assert "\x1b" not in done.stdout


def test_top_ends_when_nobody_reads_it_any_more(tiny: Server, operator: Operator) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "queen", "top", "--control-socket", str(operator.path), "--interval", "0.1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, PROJECT)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    ) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        assert top.stdout.readline().startswith(b"queen-trio")
        top.stdout.close()

        assert top.wait(10) == 0
        assert top.stderr.read() == b""


def test_top_on_a_terminal_draws_in_place(tiny: Server, operator: Operator) -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "queen", "top"),
            *("--control-socket", str(operator.path), "--interval", "0.1", "--count", "2"),
        ],
        env=os.environ
        | {"PYTHONPATH": str(PROJECT), "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40", "NO_COLOR": ""},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd="/",
    ) as process:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while chunk := os.read(ours, 65536):
                drawn += chunk
    os.close(ours)

    assert process.returncode == 0, drawn
    assert b"\x1b[?1049h" in drawn  # the other screen
    assert drawn.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in drawn  # and back
    assert b"serving" in drawn


def test_the_tree_reaches_from_the_supervisor_to_the_backend_that_blocks(
    start_server: StartServer, operator: Operator
) -> None:
    server = start_server("--control-socket", str(operator.path), workers=1).wait_ready()
    run = server.home / "run"
    assert server.get("/readyz")[0] == 200
    body = b'{"items":[{"queue":"orders","payload":1}]}'
    request = b"POST /api/v1/push HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with connect(server) as client:
        client.sendall(request)
        assert client.recv(12).endswith(b"201")
    with locked(run, "queen.partitions") as blocker, connect(server) as client, connect(server) as parked:
        client.sendall(request)
        parked.sendall(b"GET /api/v1/pop/queue/other?wait=true&timeout=20000 HTTP/1.1\r\nHost: x\r\n\r\n")

        def look() -> Any:
            tree = json.loads(operator.run("tree", "--json").stdout)
            found = {branch["name"]: branch for branch in branches(tree, "request")}
            push = found.get("POST /api/v1/push", {})
            blocked = [sql for sql in branches(push, "sql") if blocker in sql.get("blocked_by", ())]
            return (tree, found, blocked) if blocked and len(found) == 2 else None

        tree, found, (blocked, *_) = eventually(10, look)
        drawn = operator.run("tree").stdout

    assert (tree["kind"], tree["pid"]) == ("supervisor", server.process.pid)
    assert [worker["pid"] for worker in branches(tree, "worker")] == server.worker_pids
    assert len(list(branches(tree, "connection"))) == 2
    assert next(branches(found["POST /api/v1/push"], "write"))["at"] == "in flight"
    assert blocked["at"].startswith("active, Lock ")
    assert blocked["seconds"] > 0
    assert "wakeups" in found["GET /api/v1/pop/queue/other"]["at"]
    assert f"blocked by PostgreSQL pid {blocker}" in drawn


def test_metrics_of_the_supervisor_are_on_every_worker_and_go_on_when_one_dies(
    start_server: StartServer, operator: Operator
) -> None:
    server = start_server("--control-socket", str(operator.path), workers=2).wait_ready()

    def total() -> float:
        text = server.get("/metrics/prometheus")[1].decode()
        counts = re.findall(r"^queen_supervisor_worker_requests_total\{slot=\"\d\"\} (\S+)", text, re.MULTILINE)
        return sum(map(float, counts)) if len(counts) == 2 else 0.0

    for _ in range(20):
        server.get("/livez")
    before = eventually(10, lambda: (seen := total()) >= 20 and seen)
    destroy(server.worker_pids[0])
    eventually(10, lambda: operator.status()["workers_active"] == 2)

    after = [total() for _ in range(4)]
    assert after == sorted(after)
    assert before <= after[0] < before + 40
    text = server.get("/metrics/prometheus")[1].decode()
    assert "queen_supervisor_workers_active 2" in text
    assert len(re.findall(r"^queen_supervisor_worker_restarts_total.* 1$", text, re.MULTILINE)) == 1

    server.process.send_signal(signal.SIGSTOP)  # a supervisor that does not answer keeps no scrape from being answered
    try:
        status, body = server.get("/metrics/prometheus")
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert status == 200
    assert b"queen_cluster_push_messages_total" in body
    assert b"queen_supervisor" not in body


def test_a_second_server_is_kept_off_the_control_socket_and_off_the_pidfile(
    start_server: StartServer, scratch: Path
) -> None:
    path, pid = scratch / "socket", scratch / "pid"
    first = start_server(
        *TINY, *NO_DATABASE, "--control-socket", str(path), "--pidfile", str(pid), workers=1
    ).wait_ready()
    assert pid.read_text() == f"{first.process.pid}\n"

    second = start_server(*TINY, *NO_DATABASE, "--control-socket", str(path), workers=1)
    assert second.wait_exit() == 3
    assert f"another server answers on the control socket {path}" in second.log
    third = start_server(*TINY, *NO_DATABASE, "--pidfile", str(pid), workers=1)
    assert third.wait_exit() == 3
    assert f"process {first.process.pid} holds the pidfile" in third.log

    assert Operator(path).status()["pid"] == first.process.pid
    first.process.kill()
    first.process.wait()
    fourth = start_server(
        *TINY, *NO_DATABASE, "--control-socket", str(path), "--pidfile", str(pid), workers=1
    ).wait_ready()
    assert pid.read_text() == f"{fourth.process.pid}\n"
    assert fourth.stop() == 0
    assert not pid.exists()
    assert not path.exists()


def test_a_control_socket_that_nobody_asked_for_and_that_cannot_be_made_is_no_reason_not_to_serve(
    start_server: StartServer, scratch: Path
) -> None:
    (scratch / "file").touch()
    nowhere = {"RUNTIME_DIRECTORY": str(scratch / "file" / "below")}
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment=nowhere).wait_ready()
    assert server.answers()
    assert "no control socket" in server.log

    asked = start_server(*TINY, *NO_DATABASE, "--control-socket", str(scratch / "file" / "socket"), workers=1)
    assert asked.wait_exit() == 3
    assert "cannot be made: Not a directory" in asked.log


def test_the_service_manager_is_told_what_happens(start_server: StartServer, scratch: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ears:
        ears.bind(str(scratch / "notify"))
        ears.settimeout(20)
        server = start_server(
            *(*TINY, *NO_DATABASE),
            environment={"NOTIFY_SOCKET": str(scratch / "notify"), "WATCHDOG_USEC": "400000"},
            workers=1,
        )

        def hear(word: str) -> dict[str, str]:
            while True:
                told = dict(line.split("=", 1) for line in ears.recv(4096).decode().splitlines())
                if word in told:
                    return told

        ready = hear("READY")
        assert ready["MAINPID"] == str(server.process.pid)
        assert ready["STATUS"].startswith("1 worker, listening on http://127.0.0.1:")
        hear("WATCHDOG")
        hear("WATCHDOG")
        server.process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC" in hear("RELOADING")
        hear("READY")
        server.process.send_signal(signal.SIGTERM)
        hear("STOPPING")
        assert server.wait_exit(10) == 0
    environments = [Path(f"/proc/{pid}/environ") for pid in server.worker_pids]
    assert not [path for path in environments if b"NOTIFY_SOCKET" in path.read_bytes()]


def test_an_upgrade_keeps_the_pidfile_answers_on_the_control_socket_and_tells_the_service_manager(
    start_server: StartServer, operator: Operator, scratch: Path
) -> None:
    pid = scratch / "pid"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ears:
        ears.bind(str(scratch / "notify"))
        ears.settimeout(30)
        server = start_server(
            *(*TINY, *NO_DATABASE, "--control-socket", str(operator.path), "--pidfile", str(pid)),
            environment={"NOTIFY_SOCKET": str(scratch / "notify")},
            workers=1,
        ).wait_ready()
        before = operator.status()

        server.process.send_signal(signal.SIGUSR2)

        heard = b""
        while b"READY=1" not in heard.partition(b"RELOADING=1")[2]:
            heard += ears.recv(4096)
    after = operator.status()
    assert after["pid"] == before["pid"] == server.process.pid
    assert pid.read_text() == f"{server.process.pid}\n"
    assert after["uptime_seconds"] > before["uptime_seconds"]
    assert after["slots"][0]["generation"] > before["slots"][0]["generation"]
    assert server.stop() == 0
    assert not pid.exists()
    assert not operator.path.exists()


def test_upgrade_waits_until_the_new_program_and_its_workers_serve_and_says_when_they_do_not(
    start_server: StartServer, operator: Operator, scratch: Path
) -> None:
    broken = scratch / "broken"
    server = start_server(
        *(*TINY, *NO_DATABASE, "--control-socket", str(operator.path)),
        environment={"TINY_FAULT": f"boot-crash-if:{broken}"},
        workers=1,
    ).wait_ready()

    done = operator.run("upgrade")
    assert re.fullmatch(r"queen-trio (\S+) goes on as \1, 1 workers replaced\n", done.stdout)
    assert operator.status()["pid"] == server.process.pid
    broken.touch()
    done = operator.run("upgrade", check=False)
    assert done.returncode == 1
    assert done.stderr == "queen-trio: not upgraded; the server's log says why\n"

    assert operator.status()["state"] == "serving"
    assert server.answers()


def test_connections_that_stay_are_spread_evenly(start_server: StartServer, operator: Operator) -> None:
    server = start_server(
        *TINY, *NO_DATABASE, "--control-socket", str(operator.path), workers=5, environment={"QUEEN_SPARE": "false"}
    ).wait_ready()

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"

        def spread() -> list[int]:
            counts = [slot["connections"] for slot in operator.status()["slots"]]
            return counts if sum(counts) == 100 else []

        counts = eventually(10, spread)
    assert max(counts) <= 1.5 * min(counts)


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-P", "-m", "queen", *sys.argv[2:]])
"""


def test_a_socket_that_was_passed_is_served_by_all_workers_and_loses_nobody_over_a_restart(scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        port = passed.getsockname()[1]

        def start() -> subprocess.Popen[bytes]:
            with (scratch / "log").open("wb") as output:
                return subprocess.Popen(
                    [
                        *(sys.executable, "-c", ACTIVATE, str(passed.fileno())),
                        *("run", "--workers", "2", *TINY, *NO_DATABASE, "--control-socket", str(scratch / "socket")),
                    ],
                    pass_fds=(passed.fileno(),),
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, PROJECT)))},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd="/",
                )

        def ask() -> int:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b""
                while chunk := client.recv(4096):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.1 200"), answer
            return int(re.findall(rb"\d+", answer)[-2])  # then comes the end of the chunks

        first = second = start()
        try:
            operator = Operator(scratch / "socket")
            eventually(20, lambda: operator.status().get("workers_active") == 2)
            assert operator.status()["url"] == f"http://127.0.0.1:{port}"
            pids = {slot["pid"] for slot in operator.status()["slots"]}
            eventually(20, lambda: ask() in pids)
            first.terminate()
            assert first.wait(20) == 0
            with socket.create_connection(("127.0.0.1", port), timeout=30) as waiting:  # nobody serves: it waits
                waiting.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                second = start()
                assert waiting.recv(12) == b"HTTP/1.1 200"
            second.terminate()
            assert second.wait(20) == 0
        finally:
            for process in (first, second):
                process.kill()
                process.wait()


def test_a_status_line_of_json_names_slot_pid_and_generation_of_every_child(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=1).wait_ready()

    events = [json.loads(line) for line in server.log.splitlines()]
    ready = [event for event in events if event["event"] == "worker ready"]
    assert [(event["slot"], event["pid"], event["generation"]) for event in ready] == [(0, server.worker_pids[0], 1)]
    assert all(event["generation"] == 1 and event["pid"] for event in events if event["event"] == "postgres")


@contextlib.contextmanager
def locked(run: Path, table: str) -> Iterator[int]:
    """Somebody else holds that table; yields the pid of the backend that does."""
    command = [str(pg_bin() / "psql"), "-XAtq", "-h", str(run), "-p", "5432", "-U", "queen", "-d", "postgres"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as psql:
        assert psql.stdin is not None
        assert psql.stdout is not None
        psql.stdin.write(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE; SELECT pg_backend_pid();\n")
        psql.stdin.flush()
        yield int(psql.stdout.readline())
        psql.stdin.write("ROLLBACK;\n")
        psql.stdin.close()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def branches(tree: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """All branches of that kind, at whatever depth."""
    if tree.get("kind") == kind:
        yield tree
    for below in tree.get("branches", ()):
        yield from branches(below, kind)
