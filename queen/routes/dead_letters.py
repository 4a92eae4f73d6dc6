"""/api/v1/dlq: the messages that were set aside after their last delivery; seen, delivered again, removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from queen.errors import NotFound
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.dead_letters import (
    DeadLetterQuery,
    Selection,
    read_redrive,
    read_removal,
    write_dead_letters,
    write_selected,
)
from queen.routes.wire.query import read_query

Done = Literal["redriven", "removed"]


async def list_dead_letters(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, DeadLetterQuery)
    call.facts["queue"] = asked.queue
    total, letters = await context.engine.dead_letters(
        queue=asked.queue,
        partition=asked.partition,
        group=asked.group or None,
        failed_from=asked.failed_from,
        failed_to=asked.failed_to,
        limit=asked.limit,
        offset=asked.offset,
    )
    call.facts["messages"] = len(letters)
    return Answer(200, write_dead_letters(asked, total, letters))


async def redrive(context: Context, call: Call) -> Answer:
    """Deliver again what a filter chooses, or say what that would be."""
    selection = read_redrive(call.body)
    if selection.dry_run:
        return await _look(context, call, selection, "redriven")
    found = await context.engine.admin.redrive(selection.queue, selection.chosen, selection.limit)
    return _done(call, selection, "redriven", found)


async def remove_dead_letters(context: Context, call: Call) -> Answer:
    """Remove what a filter chooses, or say what that would be."""
    selection = read_removal(call.query)
    if selection.dry_run:
        return await _look(context, call, selection, "removed")
    found = await context.engine.admin.remove_dead_letters(selection.queue, selection.chosen, selection.limit)
    return _done(call, selection, "removed", found)


async def _look(context: Context, call: Call, selection: Selection, what: Done) -> Answer:
    found = await context.engine.admin.matching_dead_letters(selection.queue, selection.chosen, selection.limit)
    return _done(call, selection, what, found)


def _done(call: Call, selection: Selection, what: Done, message_ids: Sequence[UUID] | None) -> Answer:
    call.facts["queue"], call.facts["dry_run"] = selection.queue, selection.dry_run
    if message_ids is None:
        raise NotFound("Queue not found")
    call.facts["messages"] = len(message_ids)
    return Answer(200, write_selected(selection, what, message_ids))
