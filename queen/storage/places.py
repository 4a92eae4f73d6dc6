"""Where a message lies, found by how clients name it."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from queen.model.message import Ack
from queen.storage.acks import AckFlush
from queen.storage.connect import Connection


class Place(NamedTuple):
    """Where a message lies."""

    queue: str
    partition: str
    partition_id: UUID
    offset: int


async def locate(connection: Connection, buckets: int, partition_id: str, transaction_id: str) -> Place | None:
    """asyncio flavor. The place of a message, by its partition and transaction id as an ack has them; None where there
    is none."""
    flush = AckFlush([[Ack(transaction_id=transaction_id, partition_id=partition_id)]], buckets)
    await flush.locate(connection)
    partition = flush.partitions[partition_id]
    if partition is None or transaction_id not in partition.offsets:
        return None
    return Place(partition.queue, partition.name, partition.partition_id, partition.offsets[transaction_id])
