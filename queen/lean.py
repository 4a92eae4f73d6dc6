"""Imported first by the processes of ``queen-trio``: structlog is loaded without what our logs make no use of.

Where rich and greenlet are installed, structlog imports them, for tracebacks that we do not print so and for thread
locals that we do not keep: 6 MB in each process, a fifth of what a supervisor holds, and 0.1 s of its start. An
application that mounts ours is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """In this block, modules of these names that are not loaded yet are as if they were not installed."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is "there is none" to the import system
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with without("rich", "greenlet"):
    import structlog  # noqa: F401
