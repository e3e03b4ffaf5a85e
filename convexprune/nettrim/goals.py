"""All that may be asked of a layer. A new goal is one small class, listed here."""

from collections.abc import Mapping, Sequence
from typing import Any

from convexprune.nettrim.answers import REFITTED, Answer, Goal
from convexprune.nettrim.budgets import Keep, KeepByPath, Pattern
from convexprune.nettrim.measuring import Measure
from convexprune.nettrim.neurons import KeepInputs, RankInputs
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.tolerance import Within
from convexprune.solvers import LayerProgram

__all__ = [
    "GOALS",
    "REFITTED",
    "Answer",
    "Goal",
    "Keep",
    "KeepByPath",
    "KeepInputs",
    "Measure",
    "Pattern",
    "RankInputs",
    "Within",
    "as_goal",
    "posed_programs",
    "shares",
]

GOALS: Mapping[str, type[Any]] = {
    goal.kind: goal for goal in (Within, Keep, Pattern, KeepByPath, KeepInputs, Measure, RankInputs)
}
"""Goals by kind: all that a journal may name."""


def as_goal(data: Mapping[str, Any]) -> Goal:
    """The goal that ``to_dict`` described, or the journal's key that it is part of."""
    own = {name: value for name, value in data.items() if name not in ("kind", "after")}
    rest = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    goal: Goal = GOALS[data["kind"]](**rest)
    return goal


def posed_programs(goal: Goal, posed: Sequence[Posed], how: How) -> list[LayerProgram]:
    """The programs of a layer's groups."""
    return [goal.programs(group, how, share) for group, share in zip(posed, shares(posed), strict=True)]


def shares(posed: Sequence[Posed]) -> list[float]:
    """Each group's part of the layer's weights."""
    counts = [group.rows * group.stored.shape[1] for group in posed]
    return [count / sum(counts) for count in counts]
