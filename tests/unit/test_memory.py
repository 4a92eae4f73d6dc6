"""What a worker says of its memory must not depend on there being a descriptor left: its heartbeat does."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest

from queen.engine.monitor import memory_bytes
from queen.worker.run import rss_bytes


@pytest.fixture
def _no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("_no_descriptor_left")
@pytest.mark.parametrize("ask", [rss_bytes, lambda: memory_bytes()["rss_bytes"]], ids=["heartbeat", "monitor"])
def test_memory_is_known_without_a_descriptor_to_ask_with(ask: Callable[[], int]) -> None:
    with pytest.raises(OSError, match="Too many open files"):
        open("/proc/self/statm")  # noqa: SIM115  # it must not open

    assert ask() > 1 << 20
