"""What is where and how far: counts of queues and groups, as pages and metrics show them. No I/O, no JSON."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec

from queen.model.queue import Queue


class Six(msgspec.Struct, frozen=True, kw_only=True):
    """The six numbers of a queue or a partition. ``pending + processing + completed == total``.

    ``completed`` is what the slowest group has consumed, ``processing`` what it has under live leases; ``dead_letter``
    counts the dead letters of all groups. A failed delivery that will be repeated is pending.
    """

    total: int = 0
    pending: int = 0
    processing: int = 0
    completed: int = 0
    failed: int = 0
    dead_letter: int = 0

    def plus(self, other: Six) -> Six:
        return Six(
            total=self.total + other.total,
            pending=self.pending + other.pending,
            processing=self.processing + other.processing,
            completed=self.completed + other.completed,
            failed=self.failed + other.failed,
            dead_letter=self.dead_letter + other.dead_letter,
        )


def six_of(*, total: int, ahead: int, processing: int, dead_letters: int) -> Six:
    """``ahead``: messages that the slowest group has not consumed. Keeps every number within the total: what a page
    reads in several steps need not fit together exactly."""
    ahead = max(0, min(ahead, total))
    processing = max(0, min(processing, ahead))
    return Six(
        total=max(0, total),
        pending=ahead - processing,
        processing=processing,
        completed=max(0, total) - ahead,
        dead_letter=dead_letters,
    )


class GroupCount(msgspec.Struct, kw_only=True):
    """A group on a queue, summed over partitions. ``consumed``: the committed offsets; ``skips``: what of the rest
    it will not be given."""

    consumed: int = 0
    skips: int = 0
    dead_letters: int = 0


class QueueCount(msgspec.Struct, kw_only=True):
    """A queue, summed over partitions: ``stored`` next offsets, ``removed`` first offsets, ``erased`` in between."""

    stored: int = 0
    removed: int = 0
    erased: int = 0
    partitions: int = 0
    stored_at: datetime | None = None  # to a few seconds
    groups: dict[str, GroupCount] = {}  # those that are registered, and those with dead letters

    @property
    def total(self) -> int:
        """Messages stored now."""
        return self.stored - self.removed - self.erased

    @property
    def dead_letters(self) -> int:
        return sum(group.dead_letters for group in self.groups.values())

    def ahead(self, group: str) -> int:
        """Messages that the group has not consumed."""
        count = self.groups.get(group) or GroupCount()
        return max(0, self.stored - max(count.consumed, self.removed) - count.skips)


class GroupLag(msgspec.Struct, frozen=True, kw_only=True):
    """How far behind a group is, as sampled from its partitions."""

    partitions: int = 0  # that lag; a lower bound where ``whole`` is false
    oldest_at: datetime | None = None  # creation of its oldest message not consumed
    processing: int = 0
    leases: int = 0
    whole: bool = True


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A queue with what is in it."""

    queue: Queue
    created_at: datetime
    count: QueueCount
    groups: tuple[str, ...]  # registered
    six: Six


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A group on one queue."""

    name: str
    queue: str
    mode: str
    start_at: datetime | None
    created_at: datetime
    ahead: int
    lag: GroupLag
    members: int
    lag_seconds: float


class GroupPosition(msgspec.Struct, frozen=True, kw_only=True):
    """Where a group stands in one partition."""

    group: str
    queue: str
    partition: str
    partition_id: UUID
    lease_id: UUID | None  # of a live lease
    committed: int
    ahead: int
    oldest_at: datetime | None  # creation of the first message not consumed
    lag_seconds: float
    consumed_at: datetime | None


class PartitionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A partition with what is in it."""

    partition_id: UUID
    name: str
    created_at: datetime
    six: Six
    consumed: int  # offset up to which the slowest group is
    oldest_at: datetime | None
    newest_at: datetime | None
    active_at: datetime | None  # the last push or ack


class LabelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The queues with one namespace and one task."""

    namespace: str
    task: str
    queues: int
    partitions: int
    six: Six  # without what is under leases: that is pending here


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, in a few numbers. Lags are of the groups, each with its queue: seconds and messages."""

    labels: tuple[LabelStatus, ...]
    six: Six
    lag_seconds: tuple[float, ...]
    lag_messages: tuple[int, ...]
    now: datetime


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """What is pending on a queue, for a group or for the slowest one, and in which partitions."""

    pending: int
    partitions_pending: int
    partitions: tuple[tuple[str, int], ...]  # at most a page of them
