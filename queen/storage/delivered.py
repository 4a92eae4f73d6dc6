"""What this worker has delivered under leases that are not acknowledged yet: acks find their messages here.

Only a memory: what is not here is looked up in PostgreSQL (``queen.locate``), and whether the lease still holds is
decided there in any case. Bounded by bytes and by number; the oldest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from queen.model.message import ClaimedPartition
from queen.storage.ids import id_tail, minted_index
from queen.storage.segments import json_text

MAX_DELIVERIES: Final = 20_000
"""Deliveries remembered: about 10 MB of their own, besides the lines that they hold."""

_ID: Final = b'","transactionId":"'
_TRACE: Final = b'","traceId":'
_INDEX: Final = 12  # characters of a line before _ID: tail of the partition and place in the segment, see segments.py


class _Piece(NamedTuple):
    """A segment of which messages were delivered. ``lines``: those lines; empty where ids were minted."""

    base_offset: int
    message_count: int
    id_prefix: str
    lines: bytes


class Delivery:
    """What one lease holds of one partition."""

    __slots__ = ("_at", "_claim", "_pieces", "_skipped", "_tail", "bytes")

    def __init__(self, claim: ClaimedPartition) -> None:
        self._claim = claim
        self._skipped = set(claim.skipped)
        self._tail = id_tail(claim.partition_id)
        self._pieces: list[_Piece] = []
        self._at = 0  # where the last id was found: the next is mostly behind it
        self.bytes = 0

    @property
    def queue(self) -> str:
        return self._claim.queue

    @property
    def partition(self) -> str:
        return self._claim.partition

    def add(self, base_offset: int, message_count: int, id_prefix: str, lines: bytes, erased: Sequence[int]) -> None:
        """More of it was delivered."""
        self._skipped.update(base_offset + place for place in erased)
        self._pieces.append(_Piece(base_offset, message_count, id_prefix, lines))
        self.bytes += len(lines)

    def offset_of(self, transaction_id: str) -> int:
        """Where the message lies, or -1: not among what was delivered."""
        for piece in self._pieces:
            if piece.lines:
                index = self._index_in(piece.lines, transaction_id)
            else:
                index = minted_index(transaction_id, piece.id_prefix, self._tail, piece.message_count)
            offset = piece.base_offset + index
            if index >= 0 and self._claim.first <= offset < self._claim.end and offset not in self._skipped:
                return offset
        return -1

    def _index_in(self, lines: bytes, transaction_id: str) -> int:
        """Place in its segment of the message with this id, or -1."""
        tail = self._tail.encode()
        text = _ID + json_text(transaction_id)[1:-1] + _TRACE
        for begin, end in ((self._at, len(lines)), (0, self._at + len(text))):
            at = lines.find(text, begin, end)
            while at >= 0:
                start = at - _INDEX
                # a payload may look like this too, but a line it cannot begin: newlines end envelopes
                if start >= 0 and (start == 0 or lines[start - 1] == 10) and lines.startswith(tail, start):
                    self._at = at
                    return int(lines[start + len(tail) : at], 16)
                at = lines.find(text, at + 1, end)
        return -1


class Delivered:
    """All deliveries that are remembered, by lease and partition as clients write them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._deliveries: OrderedDict[tuple[str, str], Delivery] = OrderedDict()
        self._bytes = 0

    def note(
        self,
        lease_id: str,
        claim: ClaimedPartition,
        *,
        base_offset: int,
        message_count: int,
        id_prefix: str,
        lines: bytes,
        erased: Sequence[int],
    ) -> None:
        """Messages of a segment are on their way to the holder of a lease. ``lines`` is empty where ids were minted;
        ``erased`` are places in the segment."""
        key = (lease_id, str(claim.partition_id))
        delivery = self._deliveries.get(key)
        if delivery is None:
            delivery = self._deliveries[key] = Delivery(claim)
        delivery.add(base_offset, message_count, id_prefix, lines, erased)
        self._bytes += len(lines)
        while self._bytes > self._max_bytes or len(self._deliveries) > MAX_DELIVERIES:
            _, oldest = self._deliveries.popitem(last=False)
            self._bytes -= oldest.bytes

    def find(self, lease_id: str, partition_id: str) -> Delivery | None:
        """What was delivered under a lease from a partition, if it is remembered."""
        return self._deliveries.get((lease_id, partition_id))

    def forget(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Leases that ended, with their partitions."""
        for pair in pairs:
            delivery = self._deliveries.pop(pair, None)
            if delivery is not None:
                self._bytes -= delivery.bytes
