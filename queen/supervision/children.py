"""What all child processes have in common: their output. How one ended: exits.py; when to start another: nursery.py."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

import trio

from queen.supervision.handover import ChildProcess

NEVER_SERVED: Final = 3
"""Exit code of a process that could not start and has said why: starting it again changes nothing."""

BOOT_CRASHES: Final = 3
"""Deaths of children that were never ready, after which it is not to be expected that the next one will be."""

LAST_WORDS_SECONDS: Final = 1.0  # for reading what a dead child left in its pipe
MAX_OUTPUT_LINE_BYTES: Final = 64 * 1024


async def kill(process: ChildProcess) -> None:
    """For ``deliver_cancel``: a child whose time is up gets no more of it."""
    process.kill()


async def start_process(nursery: trio.Nursery, command: list[str], **options: Any) -> trio.Process:
    """Start it in that nursery, by ``trio.run_process``.

    Raises:
        OSError: there is no process to be had, nor a thread to start one from.
    """
    try:
        process: trio.Process = await nursery.start(partial(trio.run_process, command, **options))
    except RuntimeError as error:
        if not str(error).startswith("can't start new thread"):
            raise
        raise OSError(errno.EAGAIN, str(error)) from error
    return process


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """The lines of a child's output, without their ends, until it closes. A line without end is cut."""
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        *whole, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        for line in whole:
            yield line
        if len(buffer) > MAX_OUTPUT_LINE_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
