"""What systemd and its like are told, and what they hand over: sd_notify(3) and sd_listen_fds(3), without a library.

Where nobody asked to be told (``NOTIFY_SOCKET`` is unset), telling does nothing. Children are told nothing of either:
:func:`take_environment` removes the variables, and :attr:`ServiceManager.environment` gives them back for a successor.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final, Self

import structlog
import trio

from queen.errors import StartupError

log = structlog.get_logger(__name__)

FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class ServiceManager:
    """The service manager that started this process, if one did."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._address = environment.get("NOTIFY_SOCKET", "")

    @classmethod
    def take_environment(cls, environ: MutableMapping[str, str]) -> Self:
        """Read and remove its variables, so that no child takes them for its own."""
        return cls({name: environ.pop(name) for name in VARIABLES if name in environ})

    def tell(self, **facts: str | int) -> None:
        """Tell it, as in ``tell(READY=1, STATUS="2 workers")``. It never blocks; who does not listen misses it."""
        if not self._address:
            return
        # An abstract address is written with @ for the zero that it begins with.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "".join(f"{name}={str(fact).replace(chr(10), ' ')}\n" for name, fact in facts.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
            ours.setblocking(False)
            try:
                ours.sendto(text.encode(), address)
            except OSError as error:
                log.warning("the service manager cannot be told", told=sorted(facts), error=error.strerror)

    def ready(self, status: str) -> None:
        """It serves; MAINPID too, for a server that has taken over from another process."""
        self.tell(READY=1, MAINPID=os.getpid(), STATUS=status)

    def reloading(self, status: str) -> None:
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000, STATUS=status)

    def stopping(self, status: str) -> None:
        self.tell(STOPPING=1, STATUS=status)

    @property
    def watchdog_seconds(self) -> float | None:
        """After how long a silence it takes this process for dead; None: it does not watch."""
        pid = self.environment.get("WATCHDOG_PID", "")
        if pid and pid != str(os.getpid()):
            return None
        text = self.environment.get("WATCHDOG_USEC", "")
        return int(text) / 1e6 if text.isdecimal() and int(text) > 0 else None

    async def run_watchdog(self, is_healthy: Callable[[], bool]) -> None:
        """Say twice in each such time that this process lives, as long as it is healthy; until cancelled."""
        if self.watchdog_seconds is None or not self._address:
            return
        while True:
            if is_healthy():
                self.tell(WATCHDOG=1)
            else:
                log.warning("not healthy: the service manager's watchdog is not answered")
            await trio.sleep(self.watchdog_seconds / 2)

    def passed_listener(self) -> socket.socket | None:
        """The listening socket that was passed to this process; None: there was none.

        Raises:
            StartupError: what was passed is not one listening TCP socket.
        """
        if self.environment.get("LISTEN_PID", "") != str(os.getpid()):
            return None
        count = self.environment.get("LISTEN_FDS", "")
        if count in ("", "0"):
            return None
        if count != "1":
            raise StartupError(f"the service manager passed {count} sockets: pass one, that of the port")
        try:
            passed = socket.socket(fileno=FIRST_DESCRIPTOR)
        except OSError as error:
            raise StartupError(f"what the service manager passed is no socket: {error.strerror}") from error
        os.set_inheritable(FIRST_DESCRIPTOR, False)
        if (
            passed.family not in (socket.AF_INET, socket.AF_INET6)
            or passed.type != socket.SOCK_STREAM
            or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            raise StartupError("what the service manager passed is no listening TCP socket (ListenStream=, Accept=no)")
        return passed
