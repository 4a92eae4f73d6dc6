"""What a run of load did and was told, in the order of its own clock. Nothing is judged here: see checkers.py."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """What an attempt was told, and so what is known of its effect."""

    APPLIED = "applied"
    REFUSED = "refused"  # answered that nothing was done
    UNKNOWN = "unknown"  # no answer, or one that does not say


class Attempt(msgspec.Struct, frozen=True):
    """One request on the wire. ``told`` is the code of an error, or what happened to the connection."""

    sent_at: float
    ended_at: float
    outcome: Outcome
    told: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What a push was told of one message."""

    status: str  # queued, duplicate, buffered
    id: str  # empty: it has none yet, being in the spool


class Push(msgspec.Struct):
    """A push, repeated until it was answered. ``verdicts`` is None if it never was."""

    items: list[tuple[int, int]]  # (partition, number): numbers of a partition are dense, from 0
    attempts: list[Attempt] = []
    verdicts: list[Verdict] | None = None
    again: bool = False  # of messages whose push was answered before, to see that it stores nothing


class Delivery(msgspec.Struct):
    """Messages of one partition in the answer to one pop."""

    group: str
    partition: int
    lease: str
    sent_at: float  # of the pop: the lease begins later than this
    received_at: float
    numbers: list[int]
    ids: list[str]
    intact: bool = True  # payloads are those that were pushed


class Kind(StrEnum):
    ACK = "ack"
    NACK = "nack"
    TRANSACTION = "transaction"


class Settlement(msgspec.Struct):
    """What a consumer said of a delivery, repeated until it was answered."""

    delivery: int  # its place in the history
    kind: Kind
    completed: list[int]
    failed: int | None = None
    sink: str | None = None  # transaction id of the message that the transaction pushes
    attempts: list[Attempt] = []
    dead: bool = False  # the answer says that the failed one is a dead letter now

    @property
    def outcome(self) -> Outcome:
        """Of all attempts together: one that was refused after one without an answer says nothing of the first."""
        outcomes = {attempt.outcome for attempt in self.attempts}
        for outcome in (Outcome.APPLIED, Outcome.UNKNOWN):
            if outcome in outcomes:
                return outcome
        return Outcome.REFUSED if outcomes else Outcome.UNKNOWN


class DeadLetter(msgspec.Struct, frozen=True):
    group: str
    partition: int
    number: int
    intact: bool


class Resources(msgspec.Struct, frozen=True):
    """What a server holds, over all its processes but PostgreSQL's."""

    processes: int
    supervisor_descriptors: int
    worker_descriptors: int
    database_connections: int
    rss_bytes: int


class Ending(msgspec.Struct):
    """What was found when the load had ended."""

    sink: list[str] = []  # transaction ids, each as often as it is stored
    dead: list[DeadLetter] = []
    drain_seconds: float | None = None  # from when the load ended and the fault was over; None: never drained
    drain_limit_seconds: float = 0.0
    before: Resources | None = None
    after: Resources | None = None
    status_lies: list[str] = []


class History(msgspec.Struct):
    """Everything of one run."""

    lease_seconds: float
    groups: list[str]
    partitions: int
    pushes: list[Push] = []
    deliveries: list[Delivery] = []
    settlements: list[Settlement] = []
    ending: Ending = msgspec.field(default_factory=Ending)
