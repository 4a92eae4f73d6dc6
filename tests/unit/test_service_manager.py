"""What the service manager is told and hands over, the pidfile, and how an exit is explained."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from queen.errors import StartupError
from queen.supervision import exits
from queen.supervision.exits import count_oom_kills, explain_exit
from queen.supervision.pidfile import pidfile
from queen.supervision.service_manager import ServiceManager


@pytest.fixture(params=["in a directory", "abstract"])
def ears(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket as a service manager has it, and its address as NOTIFY_SOCKET names it."""
    name = str(tmp_path / "notify") if request.param == "in a directory" else f"@queen-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if name.startswith("@") else name)
        listening.settimeout(5)
        yield name, listening


def test_what_is_told_arrives(ears: tuple[str, socket.socket]) -> None:
    name, listening = ears
    manager = ServiceManager({"NOTIFY_SOCKET": name})

    manager.ready("2 workers\nand more")
    manager.reloading("r")
    manager.stopping("s")

    assert listening.recv(4096) == f"READY=1\nMAINPID={os.getpid()}\nSTATUS=2 workers and more\n".encode()
    reloading = dict(line.split("=") for line in listening.recv(4096).decode().splitlines())
    assert reloading.keys() == {"RELOADING", "MONOTONIC_USEC", "STATUS"}
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert listening.recv(4096) == b"STOPPING=1\nSTATUS=s\n"


def test_where_nobody_listens_telling_does_nothing_and_is_said(tmp_path: Path) -> None:
    ServiceManager({}).ready("")
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("")


def test_children_are_not_handed_what_is_meant_for_us() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "LISTEN_FDS": "1", "LISTEN_PID": "9", "WATCHDOG_USEC": "5", "PATH": "/bin"}

    manager = ServiceManager.take_environment(environ)

    assert environ == {"PATH": "/bin"}
    assert manager.environment == {
        "NOTIFY_SOCKET": "/n",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "9",
        "WATCHDOG_USEC": "5",
    }


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "10000000"}, 10.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 10.0),
    ],
)
def test_whether_it_watches(environment: dict[str, str], seconds: float | None) -> None:
    assert ServiceManager(environment).watchdog_seconds == seconds


async def test_the_watchdog_is_answered_twice_as_often_as_it_must_be_and_only_while_all_is_well(
    ears: tuple[str, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    name, listening = ears
    manager = ServiceManager({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000"})
    healthy = True

    with trio.move_on_after(0):
        await manager.run_watchdog(lambda: healthy)
    assert listening.recv(100) == b"WATCHDOG=1\n"

    with trio.move_on_after(19):  # at 0, 5, 10, 15
        await manager.run_watchdog(lambda: trio.current_time() < 12)
    listening.setblocking(False)
    assert [listening.recv(100) for _ in range(3)] == [b"WATCHDOG=1\n"] * 3
    with pytest.raises(BlockingIOError):
        listening.recv(100)


PASSED = """
import os, sys
from queen.supervision.service_manager import ServiceManager
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
passed = ServiceManager.take_environment(os.environ).passed_listener()
print(None if passed is None else passed.getsockname()[1], os.get_inheritable(3))
"""


def start_with(passed: socket.socket, count: str = "1") -> subprocess.CompletedProcess[str]:
    """An interpreter that was passed that socket as service managers do."""
    return subprocess.run(
        [sys.executable, "-c", PASSED, str(passed.fileno())],
        pass_fds=(passed.fileno(),),
        env=os.environ | {"LISTEN_FDS": count},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_passed_socket_is_taken_and_not_handed_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        done = start_with(passed)

        assert done.stdout.split() == [str(passed.getsockname()[1]), "False"], done.stderr


def test_what_is_passed_and_is_no_listening_socket_is_refused() -> None:
    with socket.socket() as passed:
        assert "is no listening TCP socket" in start_with(passed).stderr
        assert "passed 2 sockets: pass one" in start_with(passed, "2").stderr


def test_a_socket_that_was_passed_to_another_process_is_not_ours() -> None:
    assert ServiceManager({"LISTEN_PID": "1", "LISTEN_FDS": "1"}).passed_listener() is None


def test_a_pidfile_holds_the_process_id_and_goes_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    with pidfile(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(StartupError, match=f"process {os.getpid()} holds the pidfile"), pidfile(path):
            pass
        assert path.exists()

    assert not path.exists()


def test_a_pidfile_of_a_process_that_was_killed_is_replaced_whoever_has_its_id_now(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")  # a process that lives, and never held the file

    with pidfile(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_pidfile_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(StartupError, match="cannot be written: No such file or directory"),
        pidfile(tmp_path / "a" / "b"),
    ):
        pass


@pytest.mark.parametrize(
    ("sentence", "explained"),
    [
        ("exited with code 3", {"returncode": 3}),
        ("was killed by SIGSEGV (a fault in compiled code)", {"returncode": -11}),
        ("was killed by SIGTERM", {"returncode": -15}),
        ("was killed by signal 40", {"returncode": -40}),
        (
            "hung up and did not end: killed by its supervisor",
            {"returncode": -9, "killed_by_us": True, "rss_bytes": 1 << 30},
        ),
        ("was killed by SIGKILL (perhaps out of memory)", {"returncode": -9}),
        (
            "was killed by SIGKILL (perhaps out of memory; it held 256 MiB when last seen)",
            {"returncode": -9, "rss_bytes": 256 << 20},
        ),
        (
            "was killed by SIGKILL (out of memory; it held 256 MiB when last seen)",
            {"returncode": -9, "rss_bytes": 256 << 20, "oom_kills": 1},
        ),
        ("has not ended", {"returncode": None}),
    ],
)
def test_how_a_process_ended(sentence: str, explained: dict[str, int | None]) -> None:
    assert explain_exit(**explained) == sentence  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/app\n", "app/memory.events", "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("0::/elsewhere\n", "memory.events", "oom_kill 2\n"),
        ("4:cpu:/\n5:memory:/app\n", "memory/app/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_kills_for_memory_are_counted_where_the_kernel_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, file: str, text: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(exits, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(exits, "_MOUNT", tmp_path)

    assert count_oom_kills() == 2


def test_where_the_kernel_tells_nothing_no_kill_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exits, "_CGROUP", tmp_path / "none")

    assert count_oom_kills() == 0
