"""The workers of a server fetch a key set that tokens ask for once, not once each: by a file in its spool directory.

Who comes first holds the file's lock while it fetches, and leaves the set in it. The others wait, and take that one.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog
import trio

from queen.auth.keys import FORCED_PAUSE_SECONDS, Fetch, FetchFailed

FILE_NAME: Final = "keys.lock"

_LOOK_SECONDS: Final = 0.02
_WAIT_SECONDS: Final = 30.0
"""For a worker that fetches, which has a deadline of its own."""

log = structlog.get_logger("queen.auth")


class Fetched(msgspec.Struct, frozen=True):
    """What the last fetch gave, of whichever worker."""

    at: float  # of the clock that all processes of a machine share
    boot: str  # which start of the machine that clock counts from
    body: str | None  # base64
    failure: str = ""


class SharedFetch:
    """A fetch that workers of one server share: the network is asked once in FORCED_PAUSE_SECONDS.

    Args:
        fetch: asks the network.
        directory: of the server, there already or not.
        clock: seconds, the same in all processes.
    """

    def __init__(self, fetch: Fetch, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._path = directory / FILE_NAME
        self._clock = clock

    async def __call__(self) -> bytes:
        """The set, at most FORCED_PAUSE_SECONDS old.

        Raises:
            FetchFailed: it could not be had, lately.
        """
        with ExitStack() as held:
            try:
                file = _open(self._path)
                held.callback(os.close, file)
                await _lock(file)
            except (OSError, trio.TooSlowError) as error:
                log.warning("keys are fetched by each worker for itself", reason=type(error).__name__)
                return await self._fetch()
            known = _read(file)
            now = self._clock()
            if known is not None and known.boot == _boot() and now - FORCED_PAUSE_SECONDS < known.at <= now:
                if known.body is None:
                    raise FetchFailed(known.failure)
                return b64decode(known.body)
            try:
                body = await self._fetch()
            except FetchFailed as failed:
                _write(file, Fetched(now, _boot(), None, str(failed)))
                raise
            _write(file, Fetched(now, _boot(), b64encode(body).decode()))
            return body


def _open(path: Path) -> int:
    """Of this user only: who could write it could sign tokens."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    status = os.fstat(file)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise PermissionError(f"{path} is open to others")
    return file


async def _lock(file: int) -> None:
    """Until the file is closed."""
    with trio.fail_after(_WAIT_SECONDS):
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            await trio.sleep(_LOOK_SECONDS)


def _read(file: int) -> Fetched | None:
    """A few KiB that are in the page cache. None: nothing, or nothing whole."""
    with suppress(msgspec.MsgspecError, ValueError):
        return msgspec.json.decode(os.pread(file, os.fstat(file).st_size, 0), type=Fetched)
    return None


def _write(file: int, fetched: Fetched) -> None:
    text = msgspec.json.encode(fetched)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, text, 0)
    except OSError as error:
        log.warning("keys are not kept for the other workers", reason=type(error).__name__)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""
