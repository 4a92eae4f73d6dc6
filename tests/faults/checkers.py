"""The judges: each reads a history and says in sentences what must not be. Pure; each is shown to fail in a test."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

from .history import Attempt, Delivery, History, Kind, Outcome, Push, Settlement

CLOCK_SLACK_SECONDS = 0.25  # a lease is PostgreSQL's, the stop watch ours; both run on this machine
NOT_APPLIED_CODES = frozenset({"storage_unavailable", "overloaded", "draining", "refused to connect"})
"""What says that nothing was done. Anything else that is no success says nothing."""

RSS_SLACK_BYTES = 24 << 20  # worker processes differ by so much when they are young
DESCRIPTOR_SLACK = 3
CONNECTION_SLACK = 5  # a worker opens those of its pool as it comes to need them

Lane = tuple[str, int]  # group, partition
Place = tuple[str, int, int]  # group, partition, number
Sentences = Iterator[str]


def lanes(history: History) -> dict[Lane, list[Delivery]]:
    """Deliveries of each group from each partition, as they came."""
    found: dict[Lane, list[Delivery]] = defaultdict(list)
    for delivery in sorted(history.deliveries, key=lambda delivery: delivery.received_at):
        found[delivery.group, delivery.partition].append(delivery)
    return found


def settled(history: History) -> dict[Lane, list[tuple[Settlement, Delivery]]]:
    """Settlements of each group in each partition, with what they settle."""
    found: dict[Lane, list[tuple[Settlement, Delivery]]] = defaultdict(list)
    for settlement in history.settlements:
        delivery = history.deliveries[settlement.delivery]
        found[delivery.group, delivery.partition].append((settlement, delivery))
    return found


def pushed(history: History) -> dict[tuple[int, int], str]:
    """Id of each message whose push was answered."""
    found: dict[tuple[int, int], str] = {}
    for push in history.pushes:
        if push.verdicts is not None and not push.again:
            found.update({item: verdict.id for item, verdict in zip(push.items, push.verdicts, strict=True)})
    return found


def applied(attempts: list[Attempt]) -> Attempt | None:
    return next((attempt for attempt in attempts if attempt.outcome is Outcome.APPLIED), None)


def check_pushes_are_kept(history: History) -> Sentences:
    """I1: a push that was answered is delivered to every group, as it was."""
    have: dict[Lane, set[int]] = defaultdict(set)
    for delivery in history.deliveries:
        have[delivery.group, delivery.partition].update(delivery.numbers)
        if not delivery.intact:
            yield f"partition {delivery.partition}: a payload came to {delivery.group} other than it was pushed"
    kept = pushed(history)
    for group in history.groups:
        lost = [(p, n) for p, n in kept if n not in have[group, p]]
        if lost:
            yield f"{len(lost)} messages whose push was answered never came to {group}, the first {min(lost)}"


def check_acks_are_kept(history: History) -> Sentences:
    """I2: nothing is delivered after an ack of it was answered, nor acked under two leases."""
    acks = settled(history)
    for lane, deliveries in lanes(history).items():
        acked_at: dict[int, float] = {}
        lease_of: dict[int, str] = {}
        for settlement, delivery in acks[lane]:
            if (answer := applied(settlement.attempts)) is None:
                continue
            done = settlement.completed + (
                [settlement.failed] if settlement.dead and settlement.failed is not None else []
            )
            for number in done:
                acked_at[number] = min(answer.ended_at, acked_at.get(number, answer.ended_at))
                if lease_of.setdefault(number, delivery.lease) != delivery.lease:
                    yield f"{lane}: {number} was acked under two leases"
        for delivery in deliveries:
            again = [n for n in delivery.numbers if n in acked_at and acked_at[n] < delivery.sent_at]
            if again:
                yield f"{lane}: {again[0]} and {len(again) - 1} more delivered after their ack was answered"


def check_order(history: History) -> Sentences:
    """I3: a group gets a partition in order: no gap within an answer, nothing skipped between answers."""
    sent_settlements = settled(history)
    for lane, deliveries in lanes(history).items():
        marks = sorted(
            (settlement.attempts[0].sent_at, frontier(settlement))
            for settlement, _ in sent_settlements[lane]
            if settlement.attempts
        )
        reached, at = 0, 0
        for delivery in deliveries:
            numbers = delivery.numbers
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                yield f"{lane}: a delivery is not dense: {numbers[:20]}"
            if delivery.ids != sorted(delivery.ids):
                yield f"{lane}: ids are not in the order of their messages, from {numbers[0]} on"
            while at < len(marks) and marks[at][0] <= delivery.received_at:
                reached = max(reached, marks[at][1])
                at += 1
            if numbers[0] > reached:
                yield f"{lane}: {numbers[0]} delivered, {reached} skipped"


def frontier(settlement: Settlement) -> int:
    """Behind what a settlement may have moved the position of its group, whatever became of it."""
    last = max(settlement.completed, default=-1)
    return (last if settlement.failed is None else max(last, settlement.failed)) + 1


def check_leases(history: History) -> Sentences:
    """I4: one lease at a time; an ack in time is taken, and one under an ended lease is not."""
    first_word: dict[int, float] = {}  # when a consumer first said something of a delivery
    for settlement in history.settlements:
        if settlement.attempts:
            sent_at = settlement.attempts[0].sent_at
            first_word[settlement.delivery] = min(sent_at, first_word.get(settlement.delivery, sent_at))
    places = {id(delivery): place for place, delivery in enumerate(history.deliveries)}
    lease_seconds = history.lease_seconds - CLOCK_SLACK_SECONDS
    by_lane = lanes(history)
    for lane, deliveries in by_lane.items():
        for one, other in pairwise(deliveries):
            freed_at = min(first_word.get(places[id(one)], float("inf")), one.sent_at + lease_seconds)
            if other.received_at < freed_at:
                yield f"{lane}: {other.numbers[0]} delivered while {one.numbers[0]} was under a lease"
    for settlement in history.settlements:
        delivery = history.deliveries[settlement.delivery]
        lane = (delivery.group, delivery.partition)
        first = settlement.attempts[0] if settlement.attempts else None
        if first is None:
            continue
        if first.outcome is Outcome.REFUSED and first.told not in NOT_APPLIED_CODES:
            if first.ended_at < delivery.sent_at + lease_seconds:
                yield f"{lane}: settling {delivery.numbers[0]} was refused within its lease: {first.told}"
        elif first.outcome is Outcome.APPLIED:
            later = [
                other
                for other in by_lane[lane]
                if delivery.received_at < other.received_at < first.sent_at and other.lease != delivery.lease
            ]
            if later:
                yield f"{lane}: settled {delivery.numbers[0]} under a lease that had ended: {later[0].numbers[0]} came"


def check_transactions(history: History) -> Sentences:
    """I5: a transaction's ack and its push are both there, or neither."""
    stored = Counter(history.ending.sink)
    deliveries = lanes(history)
    known = set()
    for settlement in history.settlements:
        if settlement.kind is not Kind.TRANSACTION or settlement.sink is None:
            continue
        known.add(settlement.sink)
        count, outcome = stored[settlement.sink], settlement.outcome
        if outcome is Outcome.APPLIED and count != 1:
            yield f"a transaction that was answered has its message {count} times"
        elif outcome is Outcome.REFUSED and count:
            yield "a transaction that was refused has left its message"
        elif outcome is Outcome.UNKNOWN and count > 1:
            yield f"a transaction of unknown outcome has its message {count} times"
        elif outcome is Outcome.UNKNOWN and count and settlement.attempts:
            delivery = history.deliveries[settlement.delivery]
            over_at = max(attempt.ended_at for attempt in settlement.attempts) + history.lease_seconds
            for other in deliveries[delivery.group, delivery.partition]:
                if other.sent_at > over_at and set(other.numbers) & set(settlement.completed):
                    yield "a transaction of unknown outcome has its push and not its ack"
                    break
    for name in stored.keys() - known:
        yield f"the sink has a message that no transaction pushed: {name}"


def check_ids(history: History) -> Sentences:
    """I6: a message pushed again is one message, and the answer has its first id."""
    first = pushed(history)
    for push in history.pushes:
        if push.again and push.verdicts is not None:
            for item, verdict in zip(push.items, push.verdicts, strict=True):
                if verdict.status == "buffered":
                    continue  # whether it is one message, its deliveries tell
                if verdict.status != "duplicate":
                    yield f"{item} pushed again was {verdict.status}"
                elif first[item] and verdict.id != first[item]:
                    yield f"{item} pushed again has another id"
    seen: dict[tuple[int, int], str] = {item: identity for item, identity in first.items() if identity}
    for delivery in history.deliveries:
        for number, identity in zip(delivery.numbers, delivery.ids, strict=True):
            if seen.setdefault((delivery.partition, number), identity) != identity:
                yield f"partition {delivery.partition}: {number} is stored more than once"
                return


def check_dead_letters(history: History) -> Sentences:
    """I7: what failed is completed in the end, or a dead letter: once, with its payload."""
    completed: set[Place] = set()
    surely: set[Place] = set()
    failed: set[Place] = set()
    told: set[Place] = set()
    for settlement in history.settlements:
        delivery = history.deliveries[settlement.delivery]
        lane = (delivery.group, delivery.partition)
        if settlement.outcome is not Outcome.REFUSED:
            places = {(*lane, number) for number in settlement.completed}
            completed |= places
            if settlement.outcome is Outcome.APPLIED:
                surely |= places
        if settlement.failed is not None:
            failed.add((*lane, settlement.failed))
            if settlement.dead:
                told.add((*lane, settlement.failed))
    dead = Counter((letter.group, letter.partition, letter.number) for letter in history.ending.dead)
    yield from (f"{place} is a dead letter {count} times" for place, count in dead.items() if count > 1)
    yield from (f"{place} is a dead letter that nobody failed" for place in sorted(dead.keys() - failed))
    yield from (f"{place} was said to be a dead letter and is none" for place in sorted(told - dead.keys()))
    yield from (f"{place} failed and is gone" for place in sorted(failed - completed - dead.keys()))
    yield from (f"{place} is a dead letter and was completed" for place in sorted(dead.keys() & surely))
    for letter in history.ending.dead:
        if not letter.intact:
            yield f"the dead letter {letter.group, letter.partition, letter.number} has lost its payload"


def check_drained(history: History) -> Sentences:
    """I8: with the fault over and no new load, everything is consumed within the limit."""
    seconds, limit = history.ending.drain_seconds, history.ending.drain_limit_seconds
    if seconds is None:
        yield "the queue was not drained"
    elif seconds > limit:
        yield f"the queue was drained after {seconds:.1f} s, more than {limit:.1f} s"


def check_resources(history: History) -> Sentences:
    """I9: what the server holds is what it held before."""
    before, after = history.ending.before, history.ending.after
    if before is None or after is None:
        yield "nobody looked at what the server holds"
        return
    if before.processes != after.processes:
        yield f"processes: {before.processes} before, {after.processes} after"
    for name, slack in (
        ("supervisor_descriptors", DESCRIPTOR_SLACK),
        ("worker_descriptors", DESCRIPTOR_SLACK),
        ("database_connections", CONNECTION_SLACK),
        ("rss_bytes", RSS_SLACK_BYTES),
    ):
        was, now = getattr(before, name), getattr(after, name)
        if now > was * 1.05 + slack:
            yield f"{name.replace('_', ' ')}: {was} before, {now} after"


def check_answers(history: History) -> Sentences:
    """I10: what was said not to be applied was not; what a first attempt could not know it did not claim."""
    for push in history.pushes:
        if push.verdicts is None or push.again:
            continue
        *earlier, last = push.attempts
        if last.outcome is not Outcome.APPLIED:
            yield f"the push of {push.items[0]} has verdicts and no success"
        statuses = {verdict.status for verdict in push.verdicts}
        if "duplicate" in statuses and all(attempt.outcome is Outcome.REFUSED for attempt in earlier):
            codes = [attempt.told for attempt in earlier] or ["never sent before"]
            yield f"the push of {push.items[0]} was stored although it was {codes[-1]}"
        if statuses - {"queued", "duplicate", "buffered"}:
            yield f"the push of {push.items[0]} was answered {sorted(statuses)}"
        if len(statuses) > 1:
            yield f"the push of {push.items[0]} was stored in part"
    for attempt in attempts(history):
        if attempt.told.startswith("4") or attempt.told == "internal":
            yield f"an attempt was answered {attempt.told}"


def attempts(history: History) -> Iterator[Attempt]:
    made: list[Push | Settlement] = [*history.pushes, *history.settlements]
    for request in made:
        yield from request.attempts


def check_status(history: History) -> Sentences:
    """I11: what the supervisor says of its children is what /proc says."""
    yield from history.ending.status_lies


CHECKERS: dict[str, Callable[[History], Sentences]] = {
    "I1": check_pushes_are_kept,
    "I2": check_acks_are_kept,
    "I3": check_order,
    "I4": check_leases,
    "I5": check_transactions,
    "I6": check_ids,
    "I7": check_dead_letters,
    "I8": check_drained,
    "I9": check_resources,
    "I10": check_answers,
    "I11": check_status,
}


def judge(history: History) -> list[str]:
    """What every checker has to say."""
    return [f"{name}: {sentence}" for name, check in CHECKERS.items() for sentence in check(history)]
