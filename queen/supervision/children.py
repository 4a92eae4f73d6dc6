"""What all child processes have in common: their output, how they ended, and when to start one again."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

NEVER_SERVED: Final = 3
"""Exit code of a process that could not start and has said why: starting it again changes nothing."""

BOOT_CRASHES: Final = 3
"""Deaths in a row of a child that was never ready, after which it is not to be expected that the next one will be."""

LAST_WORDS_SECONDS: Final = 1.0  # for reading what a dead child left in its pipe
MAX_OUTPUT_LINE_BYTES: Final = 64 * 1024


class Backoff:
    """How long to wait before a child that died is started again.

    At once after a first death, then from one second doubling to ten, with jitter so that slots do not march in step.
    A child that served for a while had a mishap, not a fault: the count starts anew.
    """

    FIRST_SECONDS: Final = 1.0
    MAX_SECONDS: Final = 10.0
    SERVED_SECONDS: Final = 2.0

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._deaths = 0

    def after_death(self, served_seconds: float) -> float:
        """Seconds to wait, given how long the child that just died had served."""
        self._deaths = 1 if served_seconds >= self.SERVED_SECONDS else self._deaths + 1
        if self._deaths == 1:
            return 0.0
        wait: float = self.FIRST_SECONDS * 2 ** min(self._deaths - 2, 10)
        return min(self.MAX_SECONDS, wait * (1.0 + self._draw() / 4))


async def kill(process: trio.Process) -> None:
    """For ``deliver_cancel``: a child whose time is up gets no more of it."""
    process.kill()


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


def describe_exit(returncode: int | None) -> str:
    """How a process ended, for people."""
    if returncode is None:
        return "has not ended"
    if returncode >= 0:
        return f"exited with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed by {name}{' (perhaps for lack of memory)' if name == 'SIGKILL' else ''}"
