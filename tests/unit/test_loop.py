"""The asyncio loop of storage: what ends it and what does not."""

from __future__ import annotations

import asyncio
import gc

import pytest
import trio
import trio.testing
import trio_asyncio

from queen.storage.loop import open_asyncio


def boom() -> None:
    raise RuntimeError("broken")


async def test_an_error_that_nobody_waited_for_is_said_and_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    async def leave() -> None:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(ConnectionError("hung up"))

    async with open_asyncio():
        await trio_asyncio.aio_as_trio(leave)()
        gc.collect()
        await trio.testing.wait_all_tasks_blocked()
        await trio_asyncio.aio_as_trio(asyncio.sleep)(0)  # the loop still works

    assert "nobody waited for" in capfd.readouterr().out


async def test_a_broken_callback_ends_the_loop() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="broken"), flatten_subgroups=True):
        async with open_asyncio():
            asyncio.get_running_loop().call_soon(boom)
            await trio.sleep_forever()
