"""A file that holds the process id of the running server, for whoever manages processes by such files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from queen.errors import StartupError


@contextlib.contextmanager
def pidfile(path: Path | None) -> Iterator[None]:
    """Hold that file (None: do nothing), and remove it at the end.

    What holds it is a lock, which the kernel takes back however a process ends: a file left behind keeps nobody out,
    whoever has its process id by now.

    Raises:
        StartupError: a live process holds it, or it cannot be written.
    """
    if path is None:
        yield
        return
    path = path.absolute()
    try:
        descriptor = _open_locked(path)
    except BlockingIOError:
        holder = path.read_text(errors="replace").strip()
        raise StartupError(
            f"process {holder or 'unknown'} holds the pidfile {path}: stop it, or give another with --pidfile"
        ) from None
    except OSError as error:
        raise StartupError(f"the pidfile {path} cannot be written: {error.strerror}") from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the two calls: that one is nobody's any more
