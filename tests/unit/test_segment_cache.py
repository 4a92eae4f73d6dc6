"""The cache of segments holds no more than it is told to, however small they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

from queen.storage.claims import _ENTRY_BYTES, Segment, _Cache


def claim(partition: int) -> Any:
    return SimpleNamespace(partition_id=UUID(int=partition), born_at=None)


def segment(lines: bytes) -> Segment:
    return Segment(base_offset=0, message_count=1, created_at=None, id_prefix="", minted=True, lines=lines, erased=())


def test_small_segments_are_counted_with_what_they_take_besides_their_lines() -> None:
    cache = _Cache(10 * (100 + _ENTRY_BYTES))

    for partition in range(50):
        cache.put(claim(partition), segment(bytes(100)))

    kept = [partition for partition in range(50) if cache.get(claim(partition), 0) is not None]
    assert kept == list(range(40, 50))


def test_a_segment_in_the_place_of_another_is_counted_once() -> None:
    cache = _Cache(2 * (100 + _ENTRY_BYTES))
    cache.put(claim(1), segment(bytes(100)))

    for _ in range(20):
        cache.put(claim(2), segment(bytes(100)))

    assert cache.get(claim(1), 0) is not None
