"""Workers of one server even out their connections: who has more than a fair share hands a new one on to others.

The kernel spreads connections over listening sockets by a hash, which knows no load: of 200 over 8 workers the busiest
has 1.8 times, at worst 2.9 times those of the least busy (perf.even_load, 2026-11). So each worker writes how many it
has onto a *board*, memory that all of them share; one that accepts, and sees that it has more than its share, puts the
connection into a queue that all of them share too, and one that has less takes it from there. Nobody is asked and
nobody waits for anybody: a worker that hangs takes nothing, and then a heavier one does; a connection handed on is
never handed on again. The supervisor holds both and takes no part.

A single listening socket for all, from which whoever is free accepts, came to 2.2 times with 4 workers, and left one of
8 without any.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

import trio

MAX_SLOTS: Final = 1024
ABSENT: Final = 0xFFFF_FFFF
"""In the place of a count: nobody serves this slot."""

SLACK: Final = 1 / 8
"""How much more than its share a worker may have before it hands on, and at least one connection: to be exact would
cost a hand-over for every other connection."""

NO_DESCRIPTOR_SECONDS: Final = 0.1
"""Between two looks into the queue of a worker that has no descriptor left to take a connection under."""

PATIENCE_SECONDS: Final = 0.005
"""How long a worker leaves a connection in the queue for a lighter one to take."""

_CELL_BYTES: Final = 4
_DESCRIPTOR: Final = struct.Struct("i")
_ANCILLARY_BYTES: Final = socket.CMSG_LEN(_DESCRIPTOR.size)


class Board:
    """How many connections each worker has. Cell 0 is the number of slots; each other is written by its worker alone,
    and by the supervisor once that is dead."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory behind that descriptor, which stays the caller's."""
        self._memory = mmap.mmap(descriptor, (1 + MAX_SLOTS) * _CELL_BYTES)
        self._cells = memoryview(self._memory).cast("I")

    @property
    def slots(self) -> int:
        return self._cells[0]

    @slots.setter
    def slots(self, count: int) -> None:
        self._cells[0] = min(count, MAX_SLOTS)

    def write(self, slot: int, connections: int) -> None:
        if slot < MAX_SLOTS:
            self._cells[1 + slot] = connections

    def share(self) -> float:
        """What each of those that serve would have if all had as many."""
        counts = [count for count in self._cells[1 : 1 + self._cells[0]] if count != ABSENT]
        return sum(counts) / len(counts) if counts else 0.0

    @property
    def anybody(self) -> bool:
        """Whether any slot is served."""
        return any(count != ABSENT for count in self._cells[1 : 1 + self._cells[0]])

    def close(self) -> None:
        self._cells.release()
        self._memory.close()


class Pool:
    """The board and the queue of a server, as its supervisor holds them for its workers."""

    def __init__(self, left: tuple[int, int, int] | None = None) -> None:
        """Make them, or go on with those behind these descriptors, which are ours from now on."""
        if left is not None:
            self._memory, takes, gives = left
            self.board = Board(self._memory)
            self._takes, self._gives = socket.socket(fileno=takes), socket.socket(fileno=gives)
            return
        self._memory = os.memfd_create("queen connections", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, (1 + MAX_SLOTS) * _CELL_BYTES)
        self.board = Board(self._memory)
        for slot in range(MAX_SLOTS):
            self.board.write(slot, ABSENT)
        # one message is one connection, whole, for one receiver
        self._takes, self._gives = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._gives.setblocking(False)

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """What a worker needs for a Balance, in that order."""
        return self._memory, self._takes.fileno(), self._gives.fileno()

    def give_backlog(self, listener: socket.socket) -> int:
        """Have the workers serve what waits to be accepted there, if any serves; returns how many that were."""
        given = 0
        listener.setblocking(False)
        waiting = waiting_at(listener)
        while self.board.anybody and (connected := next(waiting, None)) is not None:
            with connected:
                if not _put(self._gives, connected.fileno()):
                    break
            given += 1
        return given

    def close(self) -> None:
        self.board.close()
        os.close(self._memory)
        self._takes.close()
        self._gives.close()


class Balance:
    """A worker's part in it. Takes ownership of the descriptors."""

    def __init__(self, slot: int, memory: int, takes: int, gives: int) -> None:
        self._slot = slot
        self._board = Board(memory)
        os.close(memory)
        self._takes, self._gives = socket.socket(fileno=takes), socket.socket(fileno=gives)
        self._takes.setblocking(False)
        self._gives.setblocking(False)
        self._left = False
        self._connections = 0
        self.handed_on = 0
        self.taken = 0
        self._board.write(slot, 0)

    def note(self, connections: int) -> None:
        """This worker has so many connections now."""
        self._connections = connections
        if not self._left:
            self._board.write(self._slot, connections)

    @property
    def is_heavy(self) -> bool:
        """Whether this worker has more than its share, by more than SLACK."""
        share = self._board.share()
        return self._connections > share + max(1.0, share * SLACK)

    def hand_on(self, connected: int) -> bool:
        """Put an accepted connection into the queue; then it is for the caller to close its own descriptor of it.

        False: the queue is full, or this worker has left. Serve it.
        """
        return not self._left and self.give(connected)

    def give(self, connected: int) -> bool:
        """The same for a worker that has left, of a connection on which nothing is begun: others go on with it."""
        given = _put(self._gives, connected)
        self.handed_on += given
        return given

    async def run(self, serve: Callable[[socket.socket], None]) -> None:
        """Take connections that others hand on, until cancelled. ``serve`` begins to serve one, which it closes."""
        while True:
            await trio.lowlevel.wait_readable(self._takes)
            if self._connections > self._board.share():
                await trio.sleep(PATIENCE_SECONDS)
            if not self._has_descriptor():
                await trio.sleep(NO_DESCRIPTOR_SECONDS)  # for others: taken now, a connection would be lost
                continue
            connected = self.take_nowait()
            if connected is not None:
                serve(connected)

    def take_nowait(self) -> socket.socket | None:
        """One that was handed on, if there is any that nobody else was faster to take."""
        try:
            _, ancillary, _, _ = self._takes.recvmsg(1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except OSError:  # there is none
            return None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) == _DESCRIPTOR.size:
                self.taken += 1
                return socket.socket(fileno=_DESCRIPTOR.unpack(data)[0])
        return None  # no descriptor was left to have it under

    def _has_descriptor(self) -> bool:
        try:
            os.close(os.dup(self._takes.fileno()))
        except OSError:
            return False
        return True

    def leave(self, *, replaced: bool) -> None:
        """Take part no more. ``replaced``: another writes for this slot by now."""
        if not self._left and not replaced:
            self._board.write(self._slot, ABSENT)
        self._left = True

    def close(self) -> None:
        self._board.close()
        self._takes.close()
        self._gives.close()


def waiting_at(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait to be accepted at a socket that does not block, until none is left; or no descriptor
    is, and then no more can be done."""
    while True:
        try:
            connected, _ = listener.accept()
        except ConnectionAbortedError:  # it has hung up already
            continue
        except OSError:
            return
        yield connected


def _put(gives: socket.socket, connected: int) -> bool:
    """Put a connection into the queue. False: it is full, or there is no memory: whoever cannot give serves."""
    try:
        socket.send_fds(gives, [b"c"], [connected])
    except OSError:
        return False
    return True
