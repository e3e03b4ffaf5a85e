"""All that may be asked of a layer. A new goal is one small class, listed here."""

from collections.abc import Mapping
from typing import Any

from convexprune.nettrim.answers import KEPT as KEPT
from convexprune.nettrim.answers import REFITTED as REFITTED
from convexprune.nettrim.answers import Answer as Answer
from convexprune.nettrim.answers import Goal as Goal
from convexprune.nettrim.budgets import Keep as Keep
from convexprune.nettrim.budgets import KeepByPath as KeepByPath
from convexprune.nettrim.budgets import Pattern as Pattern
from convexprune.nettrim.measuring import Measure as Measure
from convexprune.nettrim.measuring import Measurement as Measurement
from convexprune.nettrim.neurons import KeepInputs as KeepInputs
from convexprune.nettrim.neurons import RankInputs as RankInputs
from convexprune.nettrim.tolerance import Within as Within

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
