"""A goal for each layer, and the way through them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from convexprune.nettrim.goals import Answer, Goal
from convexprune.nettrim.run import Run


class Target(Protocol):
    """What is asked of the network."""

    def pursue(self, run: Run) -> dict[str, Goal]:
        """Solve and write; the goals of the layers that were written."""


@dataclass(frozen=True)
class Each:
    """A goal of its own for each layer."""

    goals: Mapping[str, Goal]

    def pursue(self, run: Run) -> dict[str, Goal]:
        """In cascade one layer after the other, else in any order."""
        for name, answers in pursued(run, self.goals):
            run.write_(name, answers)
        return {name: goal for name, goal in self.goals.items() if name in run.written}


def pursued(run: Run, goals: Mapping[str, Goal]) -> Iterator[tuple[str, tuple[Answer, ...]]]:
    """Answers as they come, in the order of calls in cascade, where each must be written before the next."""
    if not run.how.cascade:
        yield from run.answers(goals)
        return
    for number, (name, goal) in enumerate(goals.items()):
        run.tell(name, number, len(goals))
        answers = run.answer(name, goal)
        if answers is None:
            return
        yield name, answers
