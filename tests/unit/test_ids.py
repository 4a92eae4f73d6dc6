"""Names that storage computes: stable, ordered, and told apart by form exactly as PostgreSQL is told."""

from __future__ import annotations

import time
from itertools import pairwise
from uuid import UUID, uuid4, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queen.storage.ids import (
    CANONICAL_UUID7,
    INDEX_TEXT,
    MAX_SEGMENT_MESSAGES,
    NEAR_SECONDS,
    bucket_of,
    id_prefix_text,
    id_tail,
    is_near,
    minted_index,
    packed_uuids,
    partition_id_of,
    ranges_of,
    split_ids,
    transaction_key,
    uuid7_bound,
    uuid7_texts,
)

NOW_MS = 1_790_000_000_000


def uuid7_at(milliseconds: int) -> str:
    whole = uuid4().int & ~(0xFFFF_FFFF_FFFF << 80) & ~(0xF << 76) | 7 << 76
    return str(UUID(int=whole | milliseconds << 80))


anything = (
    st.text(max_size=80)
    | st.uuids().map(str)
    | st.integers(NOW_MS - 100_000, NOW_MS + 100_000).map(uuid7_at)
    | st.uuids().map(lambda value: str(value).upper())
)


def test_partition_ids_are_uuid5_of_the_queue_and_so_the_same_everywhere() -> None:
    queue = UUID("018f0000-0000-7000-8000-000000000001")

    assert partition_id_of(queue, "eu") == uuid5(queue, "eu")
    assert partition_id_of(queue, "eu") != partition_id_of(queue, "EU")
    assert partition_id_of(queue, "eu") != partition_id_of(uuid4(), "eu")


def test_partitions_are_spread_evenly_over_buckets() -> None:
    queue = uuid4()
    counts = [0] * 64
    for at in range(64_000):
        counts[bucket_of(partition_id_of(queue, str(at)), 64)] += 1

    assert 800 < min(counts) <= max(counts) < 1200
    assert bucket_of(uuid4(), 1) == 0


def test_minted_uuid7s_grow_and_are_of_now() -> None:
    texts = uuid7_texts(10_000)

    assert texts == sorted(set(texts))
    assert len(texts) == 10_000
    assert all(CANONICAL_UUID7.fullmatch(text) and UUID(text).version == 7 for text in texts)
    assert all(is_near(text, time.time_ns() // 1_000_000) for text in texts)


def test_message_ids_are_uuid7_in_the_order_of_prefix_and_index() -> None:
    partition = uuid4()
    prefixes = [NOW_MS << 20 | sequence for sequence in (0, 1, 255, 256, 0xFFFFF)] + [(NOW_MS + 1) << 20]
    ids = [
        id_prefix_text(prefix) + id_tail(partition) + index
        for prefix in prefixes
        for index in (INDEX_TEXT[0], INDEX_TEXT[-1])
    ]

    assert ids == sorted(set(ids))
    assert all(CANONICAL_UUID7.fullmatch(text) for text in ids)
    assert all(UUID(text).int >> 80 in (NOW_MS, NOW_MS + 1) for text in ids)


def test_the_place_of_a_minted_id_is_read_off_it() -> None:
    partition = uuid4()
    prefix, tail = id_prefix_text(NOW_MS << 20 | 77), id_tail(partition)

    for place in (0, 1, 4095):
        assert minted_index(prefix + tail + INDEX_TEXT[place], prefix, tail, 4096) == place
    assert minted_index(prefix + tail + INDEX_TEXT[9], prefix, tail, 9) == -1
    assert minted_index(str(uuid4()), prefix, tail, 4096) == -1
    assert len(INDEX_TEXT) == MAX_SEGMENT_MESSAGES


@given(st.lists(anything, max_size=20))
def test_the_fast_way_to_pack_uuids_agrees_with_the_plain_one(ids: list[str]) -> None:
    found = packed_uuids(ids)

    def is_canonical(text: str) -> bool:
        try:
            value = UUID(text)
        except ValueError:
            return False
        return str(value) == text and text[19] in "89ab"

    if ids and all(is_canonical(text) for text in ids):
        assert found == (b"".join(UUID(text).bytes for text in ids), "".join(text[14] for text in ids))
    elif ids:
        assert found is None


@given(st.lists(anything, min_size=1, max_size=20))
def test_every_id_is_checked_either_by_range_or_by_key(ids: list[str]) -> None:
    split = split_ids(ids, NOW_MS)

    near = [text for text in ids if CANONICAL_UUID7.fullmatch(text) and is_near(text, NOW_MS)]
    assert split.near == near
    assert split.keyed == [(at, transaction_key(text)) for at, text in enumerate(ids) if text not in near]
    assert split.far == [text for text in ids if CANONICAL_UUID7.fullmatch(text) and text not in near]
    if split.packed is None:
        assert near == []
    else:
        pieces = [split.packed[at : at + 16] for at in range(0, len(split.packed), 16)]
        assert pieces == [UUID(text).bytes if text in near else bytes(16) for text in ids]


@given(st.text(max_size=200), st.text(max_size=200))
def test_keys_differ_where_ids_differ_and_stay_short(one: str, other: str) -> None:
    assert (transaction_key(one) == transaction_key(other)) == (one == other)
    assert len(transaction_key(one)) <= 64


def test_a_uuid_and_other_texts_have_keys_of_different_kinds() -> None:
    text = str(uuid4())

    assert transaction_key(text) == b"u" + UUID(text).bytes
    assert transaction_key(text.upper())[:1] == b"t"
    assert transaction_key("x" * 63) == b"t" + b"x" * 63
    assert transaction_key("x" * 64)[:1] == b"h"
    assert transaction_key("h" * 33) != transaction_key("x" * 64)


def test_near_is_half_a_minute_to_either_side() -> None:
    edge = NEAR_SECONDS * 1000

    assert is_near(uuid7_at(NOW_MS - edge), NOW_MS)
    assert is_near(uuid7_at(NOW_MS + edge), NOW_MS)
    assert not is_near(uuid7_at(NOW_MS - edge - 1), NOW_MS)
    assert not is_near(uuid7_at(NOW_MS + edge + 1), NOW_MS)


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=30))
def test_ranges_cover_their_ids_and_the_segments_that_may_hold_them_and_are_few_and_narrow(offsets: list[int]) -> None:
    ids = [uuid7_at(NOW_MS + offset) for offset in offsets]

    ranges = ranges_of(ids)

    assert all(sum(found.least <= UUID(text) <= found.greatest for found in ranges) == 1 for text in ids)
    assert len(ranges) <= len(set(ids))
    for text in ids:
        (found,) = [each for each in ranges if each.least <= UUID(text) <= each.greatest]
        # the latest id that a segment pushed together with this one may hold
        neighbour = uuid7_bound((UUID(text).int >> 80) + 2 * NEAR_SECONDS * 1000, high=True)
        assert neighbour <= found.bound
    milliseconds = sorted(offsets)
    gaps = sum(later - earlier > 1000 for earlier, later in pairwise(milliseconds))
    assert len(ranges) == gaps + 1


@pytest.mark.parametrize("milliseconds", [0, 1, NOW_MS, (1 << 48) - 1])
def test_bounds_of_a_millisecond_are_uuid7_themselves(milliseconds: int) -> None:
    low, high = uuid7_bound(milliseconds, high=False), uuid7_bound(milliseconds, high=True)

    assert low <= UUID(uuid7_at(milliseconds)) <= high
    assert low.version == high.version == 7
    assert ranges_of([str(high)])[0].bound >= high
