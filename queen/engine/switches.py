"""Who turns a switch of the cluster is answered when every live worker does as it says.

The one that turned it asks the others by a hint, each of them looks at the switches and tells so by another. One that
does not answer in time will have looked by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Final

import trio

_ASK: Final = "ask."
_DONE: Final = "done."


class Followers:
    """What this worker asks of the others, and what they ask of it."""

    def __init__(self, name: str) -> None:
        """``name``: of this worker, no dot in it."""
        self._name = name
        self._asked: set[str] = set()
        self._answers: dict[str, set[str]] = {}
        self._answered = trio.Event()

    def heard(self, hints: Iterable[str]) -> bool:
        """Whether somebody asks to look at the switches."""
        asked = False
        for hint in hints:
            if hint.startswith(_ASK):
                self._asked.add(hint.removeprefix(_ASK))
                asked = True
            elif hint.startswith(_DONE):
                _, question, name = hint.split(".", 2)
                if question in self._answers:
                    self._answers[question].add(name)
                    self._answered.set()
        return asked

    def take_questions(self) -> set[str]:
        """Who asks by now: they are answered by the look that begins after this."""
        asked, self._asked = self._asked, set()
        return asked

    def put_back(self, questions: set[str]) -> None:
        """The look came to nothing."""
        self._asked |= questions

    def replies(self, questions: Iterable[str]) -> list[str]:
        """Hints that tell them."""
        return [f"{_DONE}{question}.{self._name}" for question in sorted(questions)]

    @contextmanager
    def question(self) -> Iterator[tuple[str, str]]:
        """A new question, and the hint that asks it. Answers to it are kept until this is left."""
        question = token_hex(6)
        self._answers[question] = set()
        try:
            yield question, _ASK + question
        finally:
            del self._answers[question]

    async def wait(self, question: str, names: set[str], seconds: float) -> None:
        """Until all of those, but for this worker, have answered, or the time is over."""
        with trio.move_on_after(seconds):
            while not names - {self._name} <= self._answers[question]:
                self._answered = trio.Event()
                await self._answered.wait()
