"""The body of a segment: what is built comes apart again, sealed or not, and a damaged one says so."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from queen.errors import EncryptionUnavailable
from queen.storage.ids import INDEX_TEXT, MAX_SEGMENT_MESSAGES, id_prefix_text, id_tail
from queen.storage.segments import (
    ENVELOPE_BYTES,
    MAX_SEGMENT_BYTES,
    PLAIN,
    ZSTD,
    CorruptSegment,
    Keyring,
    build_lines,
    json_text,
    runs_of,
    seal,
    unseal,
)

PARTITION = UUID("0f3c2a10-8f3b-5000-8000-00000000abcd")
PREFIX = id_prefix_text(1_790_000_000_000 << 20 | 5)
KEY, OTHER_KEY = bytes(range(32)), bytes(32)


def take_apart(lines: bytes) -> list[dict[str, Any]]:
    """As the wire does: the prefix before every line and for every NUL."""
    prefix = PREFIX.encode()
    return [
        msgspec.json.decode(b'{"id":"' + prefix + line.replace(b"\0", prefix) + b"}") for line in lines.split(b"\n")
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
messages = st.lists(
    st.tuples(json_values, st.text(max_size=40), st.none() | st.uuids().map(str), st.none() | st.text(max_size=10)),
    min_size=1,
    max_size=12,
)


@given(messages, st.booleans(), st.booleans())
def test_what_is_built_and_sealed_comes_apart_as_it_was(
    given_messages: list[tuple[Any, str, str | None, str | None]], minted: bool, encrypted: bool
) -> None:
    keyring = Keyring(KEY)
    payloads = [json.dumps(value, ensure_ascii=False).encode() for value, *_ in given_messages]
    ids = [text for _, text, *_ in given_messages]
    lines = build_lines(
        PARTITION,
        None if minted else ids,
        [trace for *_, trace, _ in given_messages],
        [b"null" if sub is None else json_text(sub) for *_, sub in given_messages],
        payloads,
    )

    body = seal(lines, PARTITION, keyring if encrypted else None)
    found = take_apart(unseal(body, PARTITION, keyring, "q"))

    assert body.raw_bytes == len(lines)
    assert (body.key_id is not None) == encrypted
    assert len(found) == len(given_messages)
    for place, (envelope, (value, text, trace, sub)) in enumerate(zip(found, given_messages, strict=True)):
        message_id = PREFIX + id_tail(PARTITION) + INDEX_TEXT[place]
        assert envelope == {
            "id": message_id,
            "transactionId": message_id if minted else text,
            "traceId": trace,
            "producerSub": sub,
            "data": value,
        }


def test_a_body_is_compressed_where_it_pays() -> None:
    assert seal(b"x" * 100, PARTITION, None).codec == PLAIN
    assert seal(b"x" * 10_000, PARTITION, None).codec == ZSTD
    assert len(seal(b"x" * 10_000, PARTITION, None).data) < 200
    noise = Keyring(KEY).encrypt(bytes(10_000), b"")
    assert seal(noise, PARTITION, None).codec == PLAIN


def test_an_encrypted_body_shows_nothing_and_is_never_the_same_twice() -> None:
    keyring = Keyring(KEY)
    one, two = (seal(b"secret " * 50, PARTITION, keyring) for _ in range(2))

    assert one.data != two.data
    assert b"secret" not in one.data
    assert one.key_id == two.key_id == Keyring(KEY).current != Keyring(OTHER_KEY).current
    assert unseal(one, PARTITION, Keyring(KEY), "q") == unseal(two, PARTITION, Keyring(KEY), "q") == b"secret " * 50


@pytest.mark.parametrize("keyring", [Keyring(None), Keyring(OTHER_KEY)], ids=["no key", "another key"])
def test_a_body_sealed_with_a_key_that_is_not_held_names_it(keyring: Keyring) -> None:
    body = seal(b"secret", PARTITION, Keyring(KEY))

    with pytest.raises(EncryptionUnavailable, match=str(body.key_id)):
        unseal(body, PARTITION, keyring, "q")


@pytest.mark.parametrize("place", [0, 15, 16, -1])
def test_any_change_of_an_encrypted_body_is_noticed(place: int) -> None:
    keyring = Keyring(KEY)
    body = seal(b"secret " * 100, PARTITION, keyring)
    changed = bytearray(body.data)
    changed[place] ^= 1

    with pytest.raises(CorruptSegment):
        unseal(body._replace(data=bytes(changed)), PARTITION, keyring, "q")
    with pytest.raises(CorruptSegment):
        unseal(body, uuid4(), keyring, "q")


def test_a_compressed_body_that_was_cut_or_changed_is_noticed() -> None:
    body = seal(b"some text that repeats, " * 1000, PARTITION, None)
    assert body.codec == ZSTD

    for data in (body.data[:-1], body.data[: len(body.data) // 2], b"", bytes(len(body.data))):
        with pytest.raises(CorruptSegment):
            unseal(body._replace(data=data), PARTITION, Keyring(None), "q")
    changed = bytearray(body.data)
    changed[-1] ^= 1  # its checksum
    with pytest.raises(CorruptSegment):
        unseal(body._replace(data=bytes(changed)), PARTITION, Keyring(None), "q")


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=40))
def test_messages_are_cut_into_segments_within_both_limits_and_in_order(sizes: list[int]) -> None:
    runs = runs_of(sizes)

    assert [start for start, _ in runs] == [0, *(end for _, end in runs[:-1])]
    assert runs[-1][1] == len(sizes)
    for start, end in runs:
        assert 0 < end - start <= MAX_SEGMENT_MESSAGES
        assert end - start == 1 or sum(sizes[start:end]) + ENVELOPE_BYTES * (end - start) <= MAX_SEGMENT_BYTES


def test_no_segment_has_more_messages_than_an_id_can_count() -> None:
    runs = runs_of([2] * (3 * MAX_SEGMENT_MESSAGES + 1))

    assert [end - start for start, end in runs] == [MAX_SEGMENT_MESSAGES] * 3 + [1]


def test_one_message_larger_than_a_segment_has_one_of_its_own() -> None:
    assert runs_of([10, 5 * MAX_SEGMENT_BYTES, 10]) == [(0, 1), (1, 2), (2, 3)]
