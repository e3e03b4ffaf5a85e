"""A layer to be solved, with all that it takes: data that can be sent to another process or machine."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from convexprune.nettrim.goals import Answer, Goal
from convexprune.nettrim.posed import How, Posed
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Task:
    """One layer's groups, and what is asked of them.

    Attributes:
        name: Of the layer.
        goal: What is asked.
        posed: A group each.
        how: As for all layers.
        threads: torch's threads for it: sums are rounded in their order, so answers depend on the number.
        seconds: For all groups together, from when it is run; None: no limit.
    """

    name: str
    goal: Goal
    posed: tuple[Posed, ...]
    how: How
    threads: int
    seconds: float | None = None

    def run(self) -> tuple[Answer, ...]:
        """The answers, wherever this is called."""
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            end = None if self.seconds is None else time.monotonic() + self.seconds
            return tuple(self.goal.meet(group, self._until(end)) for group in self.posed)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def _until(self, end: float | None) -> How:
        """How, with the time that is left."""
        left = None if end is None else max(1e-3, end - time.monotonic())
        return replace(self.how, options={**self.how.options, "time_limit": left})


Executor = Callable[[Iterable[Callable[[], Task]]], Iterator[tuple[int, tuple[Answer, ...]]]]
"""Takes makers of tasks and gives (number of the task, answers) as they come."""


def serially(makers: Iterable[Callable[[], Task]]) -> Iterator[tuple[int, tuple[Answer, ...]]]:
    """One after the other, here; each task is made when its turn comes, and let go before the next is made."""
    for number, make in enumerate(makers):
        yield number, make().run()


def mode_for(mode: str | None, jobs: int) -> str | None:
    """The mode that was asked for; where it was left open, several layers at a time ask for "parallel".

    Raises:
        InvalidTolerance: ``jobs`` is not a whole number ≥ 1.
    """
    return "parallel" if mode is None and checked_count("jobs", jobs) > 1 else mode


def executor(jobs: int, cascade: bool) -> Executor:
    """Who solves independent layers: this process, or several through joblib.

    Raises:
        InvalidTolerance: Not a whole number ≥ 1.
        InvalidInput: Several in cascade, where each layer waits for the one before.
    """
    if checked_count("jobs", jobs) == 1:
        return serially
    if cascade:
        raise InvalidInput(f"jobs: expected 1 in cascade, where each layer waits for the one before, found {jobs}")
    from convexprune.nettrim.pool import apart  # it needs tasks, and joblib takes time to import

    return partial(apart, jobs=jobs)
