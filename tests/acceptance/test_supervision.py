"""What the supervisor does with workers that hang, grow, are to be replaced, or are too few or too many."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartServer
from .support import NO_DATABASE, TINY, Server, children, cluster_state, destroy, eventually, is_alive


def events(server: Server, name: str) -> list[dict[str, Any]]:
    """The log lines of that event."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def serving(server: Server) -> set[int]:
    """The workers that answer now."""
    return {int(server.get(seconds=10)[1]) for _ in range(20)}


class Load:
    """Requests one after another on connections that are kept, until ``stop``. Each that fails is remembered."""

    def __init__(self, server: Server, clients: int = 4, path: str = "/") -> None:
        self.failures: list[str] = []
        self.answered = 0
        self._server = server
        self._path = path
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        while not self._stopped.is_set():
            try:
                connection.request("GET", self._path)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.failures.append(str(answer.status))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
            self.answered += 1
            time.sleep(0.001)
        connection.close()


# -- hanging -----------------------------------------------------------------------------------------------------------


def test_a_worker_whose_loop_is_blocked_says_where_and_is_replaced(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment={"QUEEN_HANG_SECONDS": "1"}).wait_ready()
    (hung,) = server.worker_pids
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /block HTTP/1.1\r\nHost: here\r\n\r\n")

        eventually(10, lambda: not is_alive(hung))

    assert eventually(10, server.answers)
    (blocked,) = events(server, "the loop is blocked")
    assert "time.sleep(60)" in blocked["frame"]
    assert "tiny_app.py" in blocked["called_from"]
    assert "run_worker" in blocked["tasks"]
    assert blocked["slot"] == 0
    stacks = [line["line"] for line in events(server, "output")]  # by a handler that needs no interpreter
    assert any("tiny_app.py" in line for line in stacks)
    (died,) = events(server, "worker died")
    assert died["how"] == "hung: no sign of life for 1 s"


def test_new_connections_do_not_wait_for_a_worker_that_hangs(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=2).wait_ready()
    stopped, other = server.worker_pids
    os.kill(stopped, signal.SIGSTOP)

    with ThreadPoolExecutor(20) as clients:  # of so many, some fall to each; it would be killed after ten seconds
        answers = list(clients.map(lambda _: server.get(seconds=5), range(20)))

    assert answers == [(200, str(other).encode())] * 20
    assert is_alive(stopped)
    os.kill(stopped, signal.SIGCONT)
    assert eventually(10, lambda: serving(server) == {stopped, other})


def test_a_worker_that_is_stopped_is_replaced(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment={"QUEEN_HANG_SECONDS": "1"}).wait_ready()
    (stopped,) = server.worker_pids

    os.kill(stopped, signal.SIGSTOP)

    eventually(10, lambda: not is_alive(stopped))
    assert eventually(10, server.answers)


def test_a_worker_that_is_merely_busy_is_left_alone(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment={"QUEEN_HANG_SECONDS": "1"}).wait_ready()
    workers = server.worker_pids

    assert server.get("/busy?4", seconds=30)[0] == 200

    assert server.worker_pids == workers
    assert events(server, "worker hangs: its loop gives no sign of life") == []


def test_a_supervisor_that_was_stopped_takes_nobody_for_dead(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=2, environment={"QUEEN_HANG_SECONDS": "1"}).wait_ready()
    workers = server.worker_pids

    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(3)  # longer than the limit: the time that passes is what is tested
    assert server.answers()
    os.kill(server.process.pid, signal.SIGCONT)
    assert server.get("/busy?1", seconds=30)[0] == 200  # the supervisor looks around meanwhile

    assert server.worker_pids == workers
    assert server.stop() == 0


# -- the spare ---------------------------------------------------------------------------------------------------------


def test_a_spare_takes_the_slot_of_a_worker_that_died(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, spare=True).wait_ready()
    (first,) = serving(server)
    (spare,) = eventually(20, lambda: set(server.worker_pids) - {first})
    eventually(20, lambda: events(server, "spare worker ready"))

    destroy(first)

    assert eventually(10, server.answers)
    assert serving(server) == {spare}
    ready = events(server, "worker ready")[-1]
    assert ready["pid"] == spare
    eventually(20, lambda: set(server.worker_pids) - {first, spare})
    assert server.stop() == 0


# -- reload ------------------------------------------------------------------------------------------------------------


def test_a_reload_under_load_replaces_all_workers_and_fails_no_request(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=2, spare=True).wait_ready()
    eventually(20, lambda: events(server, "spare worker ready"))
    before = serving(server)

    with Load(server) as load:
        server.process.send_signal(signal.SIGHUP)
        eventually(30, lambda: events(server, "reloaded"))
        so_far = load.answered
        eventually(30, lambda: load.answered > so_far + 200)

    assert load.failures == []
    assert serving(server).isdisjoint(before)
    eventually(10, lambda: len(server.worker_pids) == 3)
    assert server.stop() == 0


def test_a_reload_to_code_that_does_not_come_up_changes_nothing(start_server: StartServer, scratch: Path) -> None:
    fault = scratch / "fault"
    server = start_server(*TINY, *NO_DATABASE, workers=2, environment={"TINY_FAULT": f"boot-crash-if:{fault}"})
    server.wait_ready()
    workers = server.worker_pids
    fault.touch()

    server.process.send_signal(signal.SIGHUP)
    (given_up,) = eventually(20, lambda: events(server, "reload given up, the old workers stay"))

    assert given_up["failure"] == "exited with code 9"
    assert server.worker_pids == workers
    assert serving(server) == set(workers)
    fault.unlink()
    server.process.send_signal(signal.SIGHUP)
    eventually(20, lambda: events(server, "reloaded"))


def test_a_server_under_nohup_reloads_all_the_same(start_server: StartServer) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to what it starts
    try:
        server = start_server(*TINY, *NO_DATABASE, workers=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    server.wait_ready()

    server.process.send_signal(signal.SIGHUP)

    eventually(20, lambda: events(server, "reloaded"))


def test_a_request_in_flight_is_finished_by_the_worker_that_is_replaced(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1).wait_ready()
    (old,) = server.worker_pids
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/busy?3")

    server.process.send_signal(signal.SIGHUP)
    answer = connection.getresponse()

    assert int(answer.read()) == old
    connection.close()
    eventually(20, lambda: events(server, "reloaded"))
    assert old not in serving(server)


# -- new code for the supervisor itself --------------------------------------------------------------------------------


def test_an_upgrade_under_load_keeps_process_and_database_and_fails_no_request(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=2, spare=True).wait_ready()
    before, postgres = serving(server), server.postgres_pid

    with Load(server) as load:
        server.process.send_signal(signal.SIGUSR2)
        eventually(30, lambda: events(server, "taken over"))
        eventually(30, lambda: events(server, "reloaded"))
        so_far = load.answered
        eventually(30, lambda: load.answered > so_far + 200)

    assert load.failures == []
    after = serving(server)
    assert after.isdisjoint(before)
    assert server.postgres_pid == postgres
    assert postgres in children(server.process.pid)
    assert len(server.output.splitlines()) == 1

    victim = after.pop()
    destroy(victim)  # whoever took over looks after them
    eventually(20, lambda: [line for line in events(server, "worker died") if line["pid"] == victim])
    os.kill(postgres, signal.SIGKILL)
    eventually(20, lambda: server.log.count("database system is ready to accept connections") == 2)
    assert server.postgres_pid != postgres
    assert eventually(20, server.answers)
    assert server.stop() == 0
    assert cluster_state(server.home) == "shut down"


def test_an_upgrade_twice_and_a_stop_before_its_workers_are_replaced(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=1).wait_ready()
    offspring = children(server.process.pid)

    server.process.send_signal(signal.SIGUSR2)
    eventually(30, lambda: events(server, "reloaded"))
    server.process.send_signal(signal.SIGUSR2)
    eventually(30, lambda: len(events(server, "taken over")) == 2)

    assert server.stop() == 0
    offspring |= {line["pid"]: "" for line in events(server, "worker ready")}
    assert not [pid for pid in offspring if is_alive(pid)]
    assert cluster_state(server.home) == "shut down"


def test_an_upgrade_to_a_program_or_a_worker_that_does_not_come_up_changes_nothing(
    start_server: StartServer, scratch: Path
) -> None:
    code, fault = scratch / "code", scratch / "fault"
    code.mkdir()
    server = start_server(
        *(*TINY, *NO_DATABASE),
        workers=2,
        python_path=(code,),
        environment={"TINY_FAULT": f"boot-crash-if:{fault}"},
    ).wait_ready()
    workers = server.worker_pids

    (code / "structlog.py").write_text("this is no Python")  # found before the real one
    server.process.send_signal(signal.SIGUSR2)
    (given_up,) = eventually(20, lambda: events(server, "upgrade given up, the old server goes on"))
    assert given_up["failure"] == "SyntaxError: invalid syntax"

    (code / "structlog.py").unlink()
    fault.touch()
    server.process.send_signal(signal.SIGUSR2)
    eventually(20, lambda: len(events(server, "upgrade given up, the old server goes on")) == 2)
    assert "exited with code 9" in server.log

    assert server.worker_pids == workers
    assert serving(server) == set(workers)
    assert server.stop() == 0


# -- more and fewer ----------------------------------------------------------------------------------------------------


def test_workers_are_added_and_removed_by_signal_and_no_request_fails(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1).wait_ready()

    with Load(server, clients=2) as load:
        server.process.send_signal(signal.SIGTTIN)
        eventually(20, lambda: len(events(server, "worker ready")) == 2)
        eventually(10, lambda: len(serving(server)) == 2)
        server.process.send_signal(signal.SIGTTOU)
        eventually(20, lambda: len(server.worker_pids) == 1)
        server.process.send_signal(signal.SIGTTOU)  # there is always one
        so_far = load.answered
        eventually(20, lambda: load.answered > so_far + 100)

    assert load.failures == []
    assert len(server.worker_pids) == 1
    assert server.stop() == 0


def test_a_worker_that_has_grown_too_large_is_replaced_before_it_is_killed(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment={"QUEEN_MAX_WORKER_RSS_MB": "150"}).wait_ready()
    (large,) = server.worker_pids

    assert server.get("/grow?200000000")[0] == 200

    (replaced,) = eventually(20, lambda: events(server, "worker replaced"))
    assert "MiB of 150 that it may" in replaced["why"]
    assert replaced["old_pid"] == large
    eventually(20, lambda: not is_alive(large))
    assert events(server, "worker died") == []
    assert server.answers()


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_connections_that_wait_in_the_backlog_are_answered_before_the_end(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1).wait_ready()
    (worker,) = server.worker_pids
    os.kill(worker, signal.SIGSTOP)  # it accepts nothing meanwhile
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    server.process.send_signal(signal.SIGTERM)
    eventually(10, lambda: events(server, "stopping"))
    os.kill(worker, signal.SIGCONT)

    for client in clients:
        with client:
            client.settimeout(10)
            assert client.recv(12) == b"HTTP/1.1 200"
    assert server.wait_exit(10) == 0


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_strangers_are_buried_and_children_keep_their_exit_codes(start_server: StartServer) -> None:
    """As the first process of a container, it becomes the parent of whoever loses theirs."""
    subreaper = "import ctypes, sys, queen.cli; ctypes.CDLL(None).prctl(36, 1); sys.exit(queen.cli.main())"
    server = start_server(*TINY, *NO_DATABASE, workers=1, program=("-c", subreaper)).wait_ready()
    (worker,) = server.worker_pids
    assert server.get("/orphan")[0] == 200  # a grandchild of ours, whose parent has ended

    (reaped,) = eventually(20, lambda: events(server, "reaped a stranger"))
    assert not Path(f"/proc/{reaped['pid']}").exists()

    with pytest.raises((OSError, http.client.HTTPException)):
        server.get("/exit")
    died = eventually(10, lambda: events(server, "worker died"))
    assert (died[0]["pid"], died[0]["how"]) == (worker, "exited with code 7")
