"""Who turns a switch of the cluster is answered when every live worker does as it says; and so is who wants to know
what all of them did.

A worker asks the others by a hint, each of them does what is asked and tells so by another. One that does not answer in
time will do it by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Final

import trio

SWITCHES: Final = "switches"
"""To look at the switches."""

REPORT: Final = "report"
"""To write what they did."""


class Followers:
    """What this worker asks of the others, and what they ask of it.

    Args:
        name: of this worker, no dot in it.
        what: is asked, no dot in it either.
    """

    def __init__(self, name: str, what: str) -> None:
        self._name = name
        self._ask, self._done = f"ask-{what}.", f"done-{what}."
        self._asked: set[str] = set()
        self._answers: dict[str, set[str]] = {}
        self._answered = trio.Event()

    def heard(self, hints: Iterable[str]) -> bool:
        """Whether somebody asks."""
        asked = False
        for hint in hints:
            if hint.startswith(self._ask):
                self._asked.add(hint.removeprefix(self._ask))
                asked = True
            elif hint.startswith(self._done):
                _, question, name = hint.split(".", 2)
                if question in self._answers:
                    self._answers[question].add(name)
                    self._answered.set()
        return asked

    def take_questions(self) -> set[str]:
        """Who asks by now: they are answered by what begins after this."""
        asked, self._asked = self._asked, set()
        return asked

    def put_back(self, questions: set[str]) -> None:
        """It came to nothing."""
        self._asked |= questions

    def replies(self, questions: Iterable[str]) -> list[str]:
        """Hints that tell them."""
        return [f"{self._done}{question}.{self._name}" for question in sorted(questions)]

    @contextmanager
    def question(self) -> Iterator[tuple[str, str]]:
        """A new question, and the hint that asks it. Answers to it are kept until this is left."""
        question = token_hex(6)
        self._answers[question] = set()
        try:
            yield question, self._ask + question
        finally:
            del self._answers[question]

    async def wait(self, question: str, names: set[str], seconds: float) -> None:
        """Until all of those, but for this worker, have answered, or the time is over."""
        with trio.move_on_after(seconds):
            while not names - {self._name} <= self._answers[question]:
                self._answered = trio.Event()
                await self._answered.wait()
