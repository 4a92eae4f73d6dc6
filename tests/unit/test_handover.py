"""What a supervisor leaves to itself when it executes its program anew, and children that were started before that."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from queen.control import ControlChannel, Drain, Heartbeat
from queen.errors import StartupError
from queen.supervision import handover
from queen.supervision.handover import ChildProcess, Handover, LeftProcess, LeftServer, LeftSlot, LeftWorker

WORKER = LeftWorker(
    pid=100,
    control=10,
    output=11,
    received=b'{"type":"re\xff',
    generation=3,
    serving_seconds=1.5,
    heartbeat=Heartbeat(rss_bytes=1, requests=2),
)
WHOLE = Handover(
    form=handover.FORM,
    port=5,
    passed=False,
    pool=(6, 7, 8),
    slots=(
        LeftSlot(listener=9, worker=WORKER, restarts=2, last_exit="exited with code 1", done={"requests": 7}),
        LeftSlot(listener=None, worker=None, restarts=0, last_exit="", done={}),
    ),
    server=LeftServer(pid=101, output=12, lock=13, socket_directory="/run/pg", generation=1),
    generation=3,
    uptime_seconds=60.0,
)


def start(script: str) -> tuple[subprocess.Popen[bytes], LeftProcess]:
    """A child, and how it looks to the program that comes after."""
    child = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    output = os.dup(child.stdout.fileno())
    child.stdout.close()
    child.returncode = 0  # it is not this one that waits for it
    return child, LeftProcess(child.pid, output)


async def kill(process: ChildProcess) -> None:
    process.kill()


def test_all_that_is_left_is_read_as_it_was_and_every_descriptor_stays_open() -> None:
    assert handover.decode(handover.encode(WHOLE)) == WHOLE
    assert WHOLE.descriptors() == [5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_what_is_left_in_another_form_is_refused() -> None:
    with pytest.raises(StartupError, match="is of form 9 and this version reads"):
        handover.decode(handover.encode(msgspec.structs.replace(WHOLE, form=9)))
    with pytest.raises(StartupError, match="cannot be read"):
        handover.decode(b'{"form":1}')


def test_a_process_that_was_started_as_usual_has_been_left_nothing(tmp_path: Path) -> None:
    assert handover.take_handover({}) is None
    assert not handover.is_trial({})
    left = msgspec.structs.replace(WHOLE, slots=(), server=None, port=0, pool=(0, 1, 2))
    (tmp_path / "left").write_bytes(handover.encode(left))
    environ = {handover.VARIABLE: str(os.open(tmp_path / "left", os.O_RDONLY))}
    inheritable = [os.get_inheritable(descriptor) for descriptor in range(3)]
    try:
        assert handover.take_handover(environ) == left
    finally:
        for descriptor, value in enumerate(inheritable):
            os.set_inheritable(descriptor, value)
    assert environ == {}  # no child takes it for its own


def test_a_program_that_cannot_be_executed_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = (there.fileno(),) * 3
    left = msgspec.structs.replace(WHOLE, slots=(), server=None, port=here.fileno(), pool=pool)
    with here, there:
        with pytest.raises(FileNotFoundError):
            handover.execute_anew(left, {})

        assert not os.get_inheritable(here.fileno())
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("exit 0", 0), ("kill -TERM $$", -signal.SIGTERM)])
async def test_the_exit_code_of_a_child_that_was_left(script: str, code: int) -> None:
    _, process = start(script)
    async with trio.open_nursery() as waiting:
        for _ in range(3):
            waiting.start_soon(process.wait)

    assert process.returncode == code
    process.kill()  # harmless


async def test_the_output_of_a_child_that_was_left() -> None:
    _, process = start("echo said")
    assert process.stdout is not None
    async with process.stdout as output:
        assert await output.receive_some() == b"said\n"
    await process.run(kill)


async def test_a_child_that_was_left_is_ended_when_whoever_runs_it_is_cancelled() -> None:
    _, process = start("exec sleep 60")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run, kill)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert process.returncode == -signal.SIGKILL


async def test_half_a_message_that_was_received_before_is_not_lost() -> None:
    here, there = socket.socketpair()
    with here:
        async with ControlChannel(there, b'{"type":"dr') as channel:
            here.sendall(b'ain"}\n')

            assert await channel.receive() == Drain()
