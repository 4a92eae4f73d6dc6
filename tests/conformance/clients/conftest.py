"""What every client test has: a broker of its own making, a deadline, and an event loop for its coroutine.

No plugin does this, so that a client's virtual environment holds the client, pytest and nothing else.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re

import pytest

from .support import Broker

USUAL_SECONDS = 60.0  # for a test whose waits are a few seconds, beside two other suites on two cores


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Broker:
    """The server under test as this test sees it: a client, and queues that nobody else uses."""
    return Broker(os.environ["QUEEN_URL"], re.sub(r"\W+", "-", request.node.name))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test: open its broker, keep its deadline, delete its queues."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    marker = pyfuncitem.get_closest_marker("seconds")
    seconds = float(marker.args[0]) if marker else USUAL_SECONDS
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    broker = pyfuncitem.funcargs["broker"]
    assert isinstance(broker, Broker)

    async def run() -> None:
        async with asyncio.timeout(seconds), broker:
            await pyfuncitem.obj(**arguments)

    asyncio.run(run())
    return True
