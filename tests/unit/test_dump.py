"""What a worker that hangs writes about itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from types import FrameType

import trio
import trio.testing

from queen.worker.dump import MAX_TASKS, describe_block, describe_tasks


async def wait_for_ever() -> None:
    await trio.sleep_forever()


async def wait_within() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_ever)


def root() -> trio.lowlevel.Task:
    task = trio.lowlevel.current_root_task()
    assert task is not None
    return task


async def test_the_tree_says_where_every_task_waits_and_tells_those_that_wait_alike_together() -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(wait_for_ever)
        nursery.start_soon(wait_within)
        await trio.testing.wait_all_tasks_blocked()
        lines = describe_tasks(root()).splitlines()
        nursery.cancel_scope.cancel()

    (alike,) = [line for line in lines if "and 999 like it" in line]
    assert "wait_for_ever (test_dump.py:" in alike
    within = next(number for number, line in enumerate(lines) if "test_dump.wait_within at" in line)
    indent = len(lines[within]) - len(lines[within].lstrip())
    assert lines[within + 1].startswith(" " * (indent + 2))
    assert "wait_for_ever at" in lines[within + 1]


async def test_a_tree_that_has_no_end_is_cut() -> None:
    async with trio.open_nursery() as nursery:
        for number in range(2 * MAX_TASKS):
            nursery.start_soon(wait_for_ever, name=f"task {number}")
        await trio.testing.wait_all_tasks_blocked()
        lines = describe_tasks(root()).splitlines()
        nursery.cancel_scope.cancel()

    assert len(lines) == MAX_TASKS + 1
    assert lines[-1].startswith("… and ")


def test_the_frame_that_blocks_and_who_of_ours_has_called_it() -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        leave.wait()  # blocks in a library

    thread = threading.Thread(target=block)
    thread.start()
    entered.wait()
    frame: FrameType | None = None
    while frame is None or frame.f_code.co_filename == __file__:  # until it has got from our line into the library's
        frame = sys._current_frames()[thread.ident or 0]
    said = describe_block(frame)
    leave.set()
    thread.join()

    assert "wait" in said["frame"]
    assert "threading.py" in said["frame"]
    assert "test_dump.py" in said["called_from"]
    assert "leave.wait()" in said["called_from"]


def test_a_loop_that_never_comes_back_is_described_by_a_thread() -> None:
    program = """
import os, signal, sys, trio
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
from queen.observability import logs
from queen.worker.dump import start_dumper
async def main():
    logs.configure("info", "json", slot=3)
    start_dumper()
    print("blocked", flush=True)
    while True:
        pass
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.send_signal(signal.SIGUSR2)
        said = json.loads(child.stderr.readline())
        child.kill()

    assert said["event"] == "the loop is blocked"
    assert said["slot"] == 3
    assert said["frame"].startswith("main (<string>:")
    assert "__main__.main at main (<string>:" in said["tasks"]
