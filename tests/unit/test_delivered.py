"""Acks find what this worker has delivered without asking PostgreSQL; what they do not find here is asked for there."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from queen.model.message import ClaimedPartition
from queen.storage.delivered import Delivered
from queen.storage.ids import id_prefix_text, id_tail
from queen.storage.segments import build_lines

PARTITION = UUID("0123abcd-0000-4000-8000-000000000001")
PREFIX = id_prefix_text(77 << 20)


def claim_of(first: int, end: int, skipped: tuple[int, ...] = ()) -> ClaimedPartition:
    return ClaimedPartition(
        queue="q",
        partition="p",
        partition_id=PARTITION,
        first=first,
        end=end,
        retry_count=0,
        attempt=1,
        skipped=skipped,
    )


def lines_of(ids: list[str], payloads: list[bytes] | None = None) -> bytes:
    payloads = payloads or [b"1"] * len(ids)
    return build_lines(PARTITION, ids, [None] * len(ids), [b"null"] * len(ids), payloads)


def noted(delivered: Delivered, claim: ClaimedPartition, lines: bytes, count: int, base: int = 100) -> str:
    lease = str(uuid4())
    delivered.note(lease, claim, base_offset=base, message_count=count, id_prefix=PREFIX, lines=lines, erased=())
    return lease


def test_ids_are_found_in_any_order() -> None:
    delivered = Delivered(1_000_000)
    ids = [f"order {number}" for number in range(50)]
    lease = noted(delivered, claim_of(100, 150), lines_of(ids), 50)
    delivery = delivered.find(lease, str(PARTITION))

    assert delivery is not None
    assert (delivery.queue, delivery.partition) == ("q", "p")
    for order in (range(50), reversed(range(50)), (7, 7, 3, 49, 0)):
        for number in order:
            assert delivery.offset_of(ids[number]) == 100 + number
    assert delivery.offset_of("order 50") == -1
    assert delivery.offset_of("order") == -1


@pytest.mark.parametrize("text", ['say "x"', "back\\slash", "ünï", "\x01", 'a","traceId":', "x\ny"])
def test_ids_that_need_escapes_are_found(text: str) -> None:
    delivered = Delivered(1_000_000)
    lease = noted(delivered, claim_of(100, 103), lines_of(["a", text, "b"]), 3)
    delivery = delivered.find(lease, str(PARTITION))

    assert delivery is not None
    assert delivery.offset_of(text) == 101


def test_a_payload_that_looks_like_an_envelope_is_not_one() -> None:
    delivered = Delivered(1_000_000)
    tail = id_tail(PARTITION).encode()
    forged = b'{"id":"' + tail + b'00002","transactionId":"c","traceId":null}'
    lease = noted(delivered, claim_of(100, 104), lines_of(["a", "b", "c", "d"], [forged, b"1", b"2", forged]), 4)
    delivery = delivered.find(lease, str(PARTITION))

    assert delivery is not None
    assert delivery.offset_of("c") == 102
    assert delivery.offset_of("d") == 103
    assert delivery.offset_of("c") == 102


def test_minted_ids_are_computed() -> None:
    delivered = Delivered(1_000_000)
    lease = noted(delivered, claim_of(103, 107), b"", 10)
    delivery = delivered.find(lease, str(PARTITION))
    ids = [f"{PREFIX}{id_tail(PARTITION)}{index:05x}" for index in range(10)]

    assert delivery is not None
    assert [delivery.offset_of(text) for text in ids] == [-1] * 3 + [103, 104, 105, 106] + [-1] * 3


def test_what_was_skipped_or_not_claimed_is_not_found() -> None:
    delivered = Delivered(1_000_000)
    ids = ["a", "b", "c", "d"]
    lease = noted(delivered, claim_of(101, 103, skipped=(102,)), lines_of(ids), 4)
    delivery = delivered.find(lease, str(PARTITION))

    assert delivery is not None
    assert [delivery.offset_of(text) for text in ids] == [-1, 101, -1, -1]


def test_it_holds_no_more_bytes_than_it_may_and_forgets_what_ended() -> None:
    lines = lines_of([f"order {number}" for number in range(50)])
    delivered = Delivered(3 * len(lines))
    leases = [noted(delivered, claim_of(100, 150), lines, 50) for _ in range(5)]
    assert [delivered.find(lease, str(PARTITION)) is not None for lease in leases] == [False, False, True, True, True]

    delivered.forget([(lease, str(PARTITION)) for lease in leases])
    assert all(delivered.find(lease, str(PARTITION)) is None for lease in leases)
    again = [noted(delivered, claim_of(100, 150), lines, 50) for _ in range(3)]
    assert all(delivered.find(lease, str(PARTITION)) is not None for lease in again)
