"""What a worker writes when its supervisor finds that it hangs: all stacks, the frame that blocks, the tree of tasks.

None of it needs the loop, which is what hangs. The stacks are written by a signal handler in C, so they come even when
the interpreter is held by code that does not let go of it; the rest is the work of a thread. __main__.py, which is
the first to run, registers the one and blocks the other signal, for all threads.
"""

from __future__ import annotations

import linecache
import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator
from itertools import groupby
from types import FrameType
from typing import Any, Final

import structlog
import trio

TASKS: Final = signal.SIGUSR2
MAX_TASKS: Final = 500  # lines of the tree; ten thousand pops that wait alike are one line

log = structlog.get_logger(__name__)

_LIBRARY: Final = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))


def start_dumper() -> None:
    """Have a thread write about the loop of the calling thread, whenever it is asked to."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    looping = threading.get_ident()

    def wait_and_write() -> None:
        while True:
            signal.sigwait({TASKS})
            frame = sys._current_frames()[looping]
            try:
                tasks = describe_tasks(root)
            except RuntimeError:  # a set that changed while it was read
                tasks = "the loop turns again"
            log.error("the loop is blocked", **describe_block(frame), tasks=tasks)

    threading.Thread(target=wait_and_write, name="dumper", daemon=True).start()


def describe_block(frame: FrameType) -> dict[str, str]:
    """The frame that a thread is in, and the innermost one of code that came with no library, which has called it."""
    frames = [frame]
    while frames[-1].f_back is not None:
        frames.append(frames[-1].f_back)
    ours = next((each for each in frames if not each.f_code.co_filename.startswith(_LIBRARY)), frame)
    return {"frame": describe_frame(frame), "called_from": describe_frame(ours)}


def describe_frame(frame: FrameType) -> str:
    """Function, file, line and what stands there."""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno}): {line}"


def describe_tasks(root: trio.lowlevel.Task) -> str:
    """The tree of tasks, one a line, each with where it waits. Siblings that wait alike are told together."""
    found = list(_lines(root, 0))
    return "\n".join(found[:MAX_TASKS] + ([f"… and {len(found) - MAX_TASKS} more"] if len(found) > MAX_TASKS else []))


def _lines(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}{task.name} at {_where(task.coro)}"
    children = [child for nursery in list(task.child_nurseries) for child in list(nursery.child_tasks)]
    blocks = sorted("\n".join(_lines(child, depth + 1)) for child in children)
    for block, alike in groupby(blocks):
        count = len(list(alike))
        head, *rest = block.split("\n")
        yield f"{head} (and {count - 1} like it)" if count > 1 else head
        yield from rest


def _where(coroutine: Any) -> str:
    """The innermost frame that a coroutine is in. Where it runs just now: the outermost that can be seen."""
    place = "its end"
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None and not frame.f_code.co_filename.startswith(os.path.dirname(trio.__file__)):
            place = f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return place
