"""All that may be asked of a layer. A new goal is one small class, listed here."""

from collections.abc import Mapping
from typing import Any

from convexprune.nettrim.answers import KEPT, REFITTED, Answer, Goal
from convexprune.nettrim.budgets import Keep, KeepByPath, Pattern
from convexprune.nettrim.measuring import Measure, Measurement
from convexprune.nettrim.neurons import KeepInputs, RankInputs
from convexprune.nettrim.tolerance import Within

__all__ = [
    "GOALS",
    "KEPT",
    "REFITTED",
    "Answer",
    "Goal",
    "Keep",
    "KeepByPath",
    "KeepInputs",
    "Measure",
    "Measurement",
    "Pattern",
    "RankInputs",
    "Within",
    "as_goal",
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
