"""Sends a case to a server and looks at what comes back: every answer whole, none of them a failure of the server's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import trio

from .cases import Case

PATIENCE_SECONDS: Final = 20.0
"""For an answer that must come."""

QUIET_SECONDS: Final = 0.2
"""How long to listen where the server may rightly wait for more."""

_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) ")
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)

DELIBERATE: Final = (b'"code":"not_supported"', b'"code":"unsupported_coding"')
"""The two refusals that are 501 by their meaning. (hypercorn refuses an unknown transfer coding without a word.)"""


class Finding(Exception):
    """A case that a server did not take as it should."""


class Tally:
    """What came of all cases so far. ``statuses``: how often which status came; 0: nothing, and the connection ended
    or stayed silent."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.refused_501 = 0
        self.findings: list[str] = []


async def send(port: int, case: Case, tally: Tally) -> None:
    """Send one case on a connection of its own. What is wrong goes into ``tally.findings``."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        sending = trio.CancelScope()
        received = bytearray()

        async def send_all() -> None:
            with sending:
                try:
                    for piece in case.pieces:
                        await stream.send_all(piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # refused in the middle, and answered already

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            finished = await receive(stream, received, PATIENCE_SECONDS if case.whole else QUIET_SECONDS)
            sending.cancel()
    judge(case, bytes(received), finished, tally)


async def receive(stream: trio.SocketStream, received: bytearray, patience_seconds: float) -> bool:
    """Receive one answer, or until there is nothing more. Returns whether an answer or an end came in time."""
    with trio.move_on_after(patience_seconds):
        while not is_answer(bytes(received)):
            try:
                data = await stream.receive_some(65536)
            except trio.BrokenResourceError:
                return True
            if not data:
                return True
            received += data
        return True
    return False


def is_answer(received: bytes) -> bool:
    """Whether the first answer is all there; what is not HTTP/1.1 is until the connection ends."""
    if received.startswith(b"HTTP/1.1 100 "):
        received = received.partition(b"\r\n\r\n")[2]
    head, end, body = received.partition(b"\r\n\r\n")
    if not end or not head.startswith(b"HTTP/1."):
        return False
    length = _LENGTH.search(head + b"\r\n")
    if length is not None:
        return len(body) >= int(length[1])
    return b"transfer-encoding: chunked" not in head.lower() or body.endswith(b"0\r\n\r\n")


def judge(case: Case, received: bytes, finished: bool, tally: Tally) -> None:
    statuses = [int(status) for status in _STATUS.findall(received)]
    tally.statuses.update(statuses or [0])
    coded = b"transfer-encoding" in b"".join(case.pieces).lower()
    if 501 in statuses and (coded or not finished or any(code in received for code in DELIBERATE)):
        tally.refused_501 += 1
        statuses = [status for status in statuses if status != 501]
    failed = [status for status in statuses if status >= 500]
    if failed:
        tally.findings.append(f"{failed[0]} to {case.name}: {shown(case)}\n    {received[:600]!r}")
    elif case.whole and not (finished and (statuses or tally.refused_501)):
        tally.findings.append(f"no answer to {case.name}: {shown(case)}")


def shown(case: Case) -> str:
    data = b"".join(case.pieces)
    return repr(data if len(data) <= 1500 else data[:1200] + b" ... " + data[-200:])
