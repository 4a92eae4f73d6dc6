"""The spool's file: one order for all workers, on the disk when it says so, and never less than it has taken."""

from __future__ import annotations

import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest
import trio

from queen.errors import SpoolFull, SpoolUnavailable, StartupError
from queen.storage.pushes import PushRequest
from queen.storage.segments import Keyring
from queen.storage.spool import Spool, open_spool

MAX_BYTES = 1_000_000
NO_KEY = Keyring(None)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    queue: str = "q"
    partition: str = "Default"
    payload: bytes = b"1"
    transaction_id: str | None = None
    trace_id: str | None = None


def request(*messages: Message, sub: str | None = None) -> PushRequest:
    return PushRequest(messages or [Message()], sub)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
async def spool(directory: Path) -> AsyncIterator[Spool]:
    async with open_spool(directory, MAX_BYTES, NO_KEY) as spool:
        yield spool


@pytest.fixture
async def other(directory: Path, spool: Spool) -> AsyncIterator[Spool]:
    """The same, opened by another worker."""
    async with open_spool(directory, MAX_BYTES, NO_KEY) as other:
        yield other


async def everything(spool: Spool) -> list[tuple[str, str, bytes, str | None]]:
    portion = await spool.read(1_000_000, MAX_BYTES)
    requests = [entry.request for entry in portion.entries if entry.request is not None]
    return [(m.queue, m.partition, m.payload, m.transaction_id) for r in requests for m in r.messages]


async def empty(spool: Spool) -> None:
    async with spool.held():
        portion = await spool.read(1_000_000, MAX_BYTES)
        await spool.remove(portion.entries)


async def test_what_is_kept_comes_out_in_the_order_in_which_it_came(spool: Spool, other: Spool) -> None:
    for number in range(10):
        worker = (spool, other)[number % 2]
        (ids,) = await worker.keep([request(Message(payload=b"%d" % number, transaction_id=f"id-{number}"))])
        assert ids == [f"id-{number}"]

    assert await everything(other) == [("q", "Default", b"%d" % n, f"id-{n}") for n in range(10)]


async def test_all_of_a_message_is_kept(spool: Spool) -> None:
    message = Message(partition="é\u2028", payload=b'{"a":"\xc3\xa9"}', trace_id="6b1f4e0a-3c57-4f0e-9a43-0f7a1c2d3e4f")
    (ids,) = await spool.keep([request(message, Message(queue="r"), message, sub="alice")])

    (first, second) = (await spool.read(10, MAX_BYTES)).entries
    assert first.request is not None
    assert second.request is not None
    assert first.request.producer_sub == second.request.producer_sub == "alice"
    assert isinstance(ids, list)
    assert len(set(ids)) == 3
    assert [m.transaction_id for m in first.request.messages] == [ids[0], ids[2]]
    assert [(m.partition, m.payload, m.trace_id) for m in first.request.messages] == [
        (message.partition, message.payload, message.trace_id)
    ] * 2
    assert (second.queue, second.request.messages[0].transaction_id) == ("r", ids[1])


async def test_every_worker_sees_at_once_whether_anything_waits(spool: Spool, other: Spool) -> None:
    assert not other.backlog
    await spool.keep([request()])
    assert other.backlog
    assert other.figures.pending_messages == 1

    await empty(other)

    assert not spool.backlog
    assert spool.figures.pending_messages == spool.figures.pending_bytes == spool.figures.oldest_us == 0


async def test_entries_of_one_push_are_not_parted(spool: Spool) -> None:
    await spool.keep([request(Message(queue="a")), request(Message(queue="b"), Message(queue="c"), Message(queue="d"))])
    await spool.keep([request(Message(queue="e"))])

    assert [entry.queue for entry in (await spool.read(1, MAX_BYTES)).entries] == ["a"]
    portion = await spool.read(2, MAX_BYTES)
    assert ([entry.queue for entry in portion.entries], portion.whole) == (["a", "b", "c", "d"], False)
    assert (await spool.read(5, MAX_BYTES)).whole
    assert len((await spool.read(10, 1)).entries) == 1


async def test_one_worker_drains_and_the_next_when_it_is_gone(directory: Path) -> None:
    async with open_spool(directory, MAX_BYTES, NO_KEY) as second:
        async with open_spool(directory, MAX_BYTES, NO_KEY) as first:
            assert first.lead()
            assert not second.lead()
        assert second.lead()


async def test_nobody_appends_while_the_rest_is_drained_and_who_waited_is_told_that_it_is_over(
    spool: Spool, other: Spool
) -> None:
    await spool.keep([request()])
    found: list[object] = []

    async def append() -> None:
        found.extend(await other.keep([request()], if_backlog=True))

    async with trio.open_nursery() as nursery, spool.held():
        nursery.start_soon(append)
        portion = await spool.read(10, MAX_BYTES)
        assert portion.whole
        await spool.remove(portion.entries)

    assert found == [None]
    assert not spool.backlog


async def test_a_full_spool_takes_what_fits_and_refuses_the_rest(directory: Path) -> None:
    async with open_spool(directory, 2_000, NO_KEY) as spool:
        results = await spool.keep([request(), request(Message(payload=b"x" * 2_000)), request()])

        assert [isinstance(result, SpoolFull) for result in results] == [False, True, False]
        assert spool.figures.pending_messages == 2
        assert spool.has_room
        await spool.keep([request() for _ in range(10)])
        assert not spool.has_room


async def test_what_was_set_aside_counts_until_somebody_removes_it(directory: Path) -> None:
    async with open_spool(directory, 2_000, NO_KEY) as spool:
        await spool.keep([request(Message(payload=b"x" * 1_500))])
        portion = await spool.read(10, MAX_BYTES)
        await spool.remove(portion.entries, [(portion.entries[0], "its queue wants a key")])

        assert not spool.backlog
        assert spool.figures.quarantined_messages == 1
        (refused,) = await spool.keep([request(Message(payload=b"x" * 500))])
        assert isinstance(refused, SpoolFull)
        assert not spool.backlog
        with closing(sqlite3.connect(directory / "spool.sqlite3")) as sql:
            assert sql.execute("SELECT queue, messages, reason FROM quarantine").fetchall() == [
                ("q", 1, "its queue wants a key")
            ]


async def test_a_full_disk_refuses_and_loses_nothing(spool: Spool, other: Spool) -> None:
    await spool.keep([request(Message(payload=b"first"))])
    (pages,) = spool._writer.sql.execute("PRAGMA page_count").fetchone()
    spool._writer.sql.execute(f"PRAGMA max_page_count = {pages + 4}")

    with pytest.raises(SpoolUnavailable):
        await spool.keep([request(Message(payload=b"x" * 100_000))])
    await spool.keep([request(Message(payload=b"last"))])

    assert [payload for _, _, payload, _ in await everything(other)] == [b"first", b"last"]
    assert spool.figures.pending_messages == 2
    await empty(other)
    with pytest.raises(SpoolUnavailable):
        await spool.keep([request(Message(payload=b"x" * 100_000))])
    assert not other.backlog


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield where
    subprocess.run(["umount", str(where)], check=True)


async def fill(spool: Spool, size: int) -> int:
    """Keep messages until the disk takes no more. Returns how many it took."""
    taken = 0
    try:
        while True:
            await spool.keep([request(Message(payload=b'"%s"' % (b"x" * size)))])
            taken += 1
    except SpoolUnavailable:
        return taken


async def test_a_disk_that_the_spool_has_filled_is_drained_and_then_takes_more(small_disk: Path) -> None:
    directory = small_disk / "spool"
    async with open_spool(directory, 1 << 30, NO_KEY) as spool, open_spool(directory, 1 << 30, NO_KEY) as other:
        for _ in range(3):
            taken = await fill(spool, 15_000) + await fill(other, 100)  # the reserve is not for what comes
            portion = await other.read(1_000, MAX_BYTES)
            assert len(portion.entries) == taken > 10
            assert await fill(spool, 10) == 0

            await other.remove(portion.entries)

            assert not spool.backlog


FILL_AND_DIE = """
import os, sys, trio
from pathlib import Path
from tests.unit.test_spool import NO_KEY, fill, open_spool

async def main():
    async with open_spool(Path(sys.argv[1]), 1 << 30, NO_KEY) as spool:
        print(await fill(spool, 15_000) + await fill(spool, 100), flush=True)
        os.kill(os.getpid(), 9)

trio.run(main)
"""


async def test_after_a_crash_a_spool_on_a_full_disk_is_opened_and_drained(small_disk: Path) -> None:
    directory = small_disk / "spool"
    died = await trio.run_process(
        [sys.executable, "-c", FILL_AND_DIE, str(directory)], capture_stdout=True, check=False
    )
    taken = int(died.stdout.split()[-1])
    (directory / "spool.sqlite3-shm").unlink()  # as if the machine had died too
    (small_disk / "other").write_bytes(bytes(32 * 1024))  # who takes the last room

    async with open_spool(directory, 1 << 30, NO_KEY) as spool:
        portion = await spool.read(1_000, MAX_BYTES)
        assert len(portion.entries) == taken > 10
        await spool.remove(portion.entries)
        assert await fill(spool, 15_000) > 10


async def test_while_the_reserve_is_spent_nothing_is_appended(small_disk: Path) -> None:
    directory = small_disk / "spool"
    async with open_spool(directory, 1 << 30, NO_KEY) as spool, open_spool(directory, 1 << 30, NO_KEY) as other:
        await fill(spool, 15_000)
        portion = await other.read(1_000, MAX_BYTES)

        await other.remove(portion.entries[:3])

        assert await fill(spool, 10) == 0
        assert await everything(other) == await everything(spool)
        await other.remove(portion.entries[3:])
        assert await fill(spool, 15_000) > 10


@pytest.mark.parametrize("flag", [0, 1])
async def test_after_a_power_loss_the_flag_says_what_is_in_the_file(directory: Path, flag: int) -> None:
    """The page of shared memory may be older or newer than the file."""
    async with open_spool(directory, MAX_BYTES, NO_KEY) as spool:
        await spool.keep([request()])
        if flag:
            await empty(spool)
    state = directory / "state"
    state.write_bytes(struct.pack("<Q", flag) + state.read_bytes()[8:])

    async with open_spool(directory, MAX_BYTES, NO_KEY) as spool:
        assert spool.backlog is not bool(flag)


async def test_a_spool_gives_its_space_back_when_it_is_empty(spool: Spool) -> None:
    for _ in range(3):
        for _ in range(9):
            await spool.keep([request(Message(payload=b"x" * 100_000))])
        await spool.remove((await spool.read(5, MAX_BYTES)).entries)
        assert spool._writer.size > 1024 * 1024
        await empty(spool)
        assert spool._writer.size < 100_000


async def test_what_is_sealed_can_be_read_with_its_key_only(directory: Path) -> None:
    async with open_spool(directory, MAX_BYTES, Keyring(b"k" * 32)) as spool:
        await spool.keep([request(Message(payload=b"a secret"))])
        assert (await everything(spool))[0][2] == b"a secret"

    assert b"a secret" not in (directory / "spool.sqlite3").read_bytes()
    for keyring in (NO_KEY, Keyring(b"l" * 32)):
        async with open_spool(directory, MAX_BYTES, keyring) as spool:
            (entry,) = (await spool.read(10, MAX_BYTES)).entries
            assert entry.request is None
            assert entry.trouble is not None
            assert "key" in entry.trouble


async def test_a_spool_of_a_newer_version_is_left_alone(directory: Path) -> None:
    async with open_spool(directory, MAX_BYTES, NO_KEY):
        pass
    with closing(sqlite3.connect(directory / "spool.sqlite3")) as sql:
        sql.execute("PRAGMA user_version = 2")

    with pytest.raises(StartupError, match="newer version"):
        async with open_spool(directory, MAX_BYTES, NO_KEY):
            pass

    assert opened_below(directory) == []


def opened_below(directory: Path) -> list[Path]:
    """What this process has open there."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that the directory was read with
            targets.append(descriptor.readlink())
    return [target for target in targets if target.is_relative_to(directory)]


async def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StartupError, match="FILE_BUFFER_DIR"):
        async with open_spool(tmp_path / "file" / "spool", MAX_BYTES, NO_KEY):
            pass


async def test_what_was_set_aside_is_stored_after_what_waits(spool: Spool) -> None:
    await spool.keep([request(Message(payload=b"1")), request(Message(payload=b"2"), Message(queue="other"))])
    await spool.set_aside_queue("q", "deleted")
    aside = await spool.set_asides(0, 10)
    assert [(entry.queue, entry.messages, entry.reason) for entry in aside] == [("q", 1, "deleted")] * 2

    assert await spool.try_again([aside[0].number, 999]) == 1

    assert [(queue, payload) for queue, _, payload, _ in await everything(spool)] == [("other", b"1"), ("q", b"1")]
    assert await spool.set_asides(0, 10) == aside[1:]
    assert await spool.set_asides(aside[1].number, 10) == []
    assert (spool.figures.pending_messages, spool.figures.quarantined_messages) == (2, 1)


async def test_trying_again_raises_the_flag_for_all_workers(spool: Spool, other: Spool) -> None:
    await spool.keep([request()])
    await spool.set_aside_queue("q", "deleted")
    assert not other.backlog

    await other.try_again([entry.number for entry in await other.set_asides(0, 10)])

    assert spool.backlog
    assert len(await everything(spool)) == 1


async def test_what_is_discarded_is_gone_and_leaves_its_room(spool: Spool) -> None:
    await spool.keep([request(Message(payload=b"x" * 1000))])
    await spool.set_aside_queue("q", "deleted")

    assert await spool.discard([entry.number for entry in await spool.set_asides(0, 10)]) == 1
    assert await spool.discard([1]) == 0

    assert not spool.backlog
    assert (spool.figures.quarantined_messages, spool.figures.quarantined_bytes) == (0, 0)
