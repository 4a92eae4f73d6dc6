"""One fetch for all workers of a server: what they share, and what they do when they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from queen.auth.keys import FORCED_PAUSE_SECONDS, FetchFailed
from queen.auth.shared import FILE_NAME, SharedFetch


class Endpoint:
    """Counts how often it is asked, and answers with that; a failure while ``broken``."""

    def __init__(self) -> None:
        self.asked = 0
        self.broken = False

    async def fetch(self) -> bytes:
        self.asked += 1
        await trio.sleep(0.1)
        if self.broken:
            raise FetchFailed("it is away")
        return b"%d" % self.asked


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


def worker(endpoint: Endpoint, directory: Path) -> SharedFetch:
    return SharedFetch(endpoint.fetch, directory, trio.current_time)


async def test_workers_that_ask_at_once_ask_the_endpoint_once(
    endpoint: Endpoint, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    got: list[bytes] = []

    async def ask() -> None:
        got.append(await worker(endpoint, tmp_path / "spool")())

    async with trio.open_nursery() as workers:
        for _ in range(4):
            workers.start_soon(ask)

    assert (got, endpoint.asked) == ([b"1"] * 4, 1)


async def test_the_next_fetch_is_five_seconds_later(
    endpoint: Endpoint, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = worker(endpoint, tmp_path), worker(endpoint, tmp_path)
    assert await first() == b"1"
    await trio.sleep(FORCED_PAUSE_SECONDS - 0.2)
    assert await second() == b"1"
    await trio.sleep(0.2)

    assert await second() == b"2"
    assert await first() == b"2"


async def test_a_failure_is_shared_too(
    endpoint: Endpoint, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    endpoint.broken = True
    for _ in range(2):
        with pytest.raises(FetchFailed, match="it is away"):
            await worker(endpoint, tmp_path)()

    assert endpoint.asked == 1


async def test_a_worker_that_is_cancelled_lets_the_next_one_fetch(
    endpoint: Endpoint, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(0.05):
        await worker(endpoint, tmp_path)()

    assert await worker(endpoint, tmp_path)() == b"2"


@pytest.mark.parametrize("left", [b"", b"{", b'{"at":0,"boot":"another","body":"eA=="}'])
async def test_what_is_no_answer_of_this_machine_is_fetched_again(
    endpoint: Endpoint, tmp_path: Path, left: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(left)
    file.chmod(0o600)

    assert await worker(endpoint, tmp_path)() == b"1"


async def test_a_file_that_others_can_write_is_not_believed(
    endpoint: Endpoint, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    assert await worker(endpoint, tmp_path)() == b"1"
    (tmp_path / FILE_NAME).chmod(0o666)

    assert await worker(endpoint, tmp_path)() == b"2"


async def test_without_a_directory_each_worker_fetches_for_itself(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shared = SharedFetch(endpoint.fetch, tmp_path / "file")

    assert [await shared(), await shared()] == [b"1", b"2"]
