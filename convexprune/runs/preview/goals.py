"""What each layer would be solved for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convexprune.nettrim.goals import Goal, KeepInputs, Measure, RankInputs, Within
from convexprune.nettrim.network import NetworkEps, NetworkSparsity
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.search import MeasuredEps
from convexprune.nettrim.structured import NeuronSparsity
from convexprune.nettrim.targets import Each, Target
from convexprune.runs.preview.forecast import Kinds

_TRIALS = 4  # that a search by measured errors takes, about


@dataclass(frozen=True)
class Asked:
    """Of a layer.

    Attributes:
        told: What is asked, in words.
        goals: What it is solved for, one after the other; numbers that are known only later are stood in for.
        eps: Of those that have one; NaN where it is not known.
    """

    told: str
    goals: Sequence[Goal]
    eps: float = math.nan

    @property
    def kinds(self) -> Kinds:
        """The kinds of the goals, with the eps."""
        return [(goal.kind, self.eps) for goal in self.goals]


def large_eps(target: Target) -> list[str]:
    """A line on layers whose eps is so large that no weights at all would keep it."""
    goals = target.goals if isinstance(target, Each) else {}
    names = [name for name, goal in goals.items() if isinstance(goal, Within) and goal.eps >= 1]
    told = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    text = f"eps is 1 or more for {told}: zero weights keep that promise, whatever was trained; give a smaller eps"
    return [text] if names else []


def goals_of(target: Target, plan: Plan) -> Mapping[str, Asked]:
    """What is asked of each layer."""
    if isinstance(target, Each):
        return _each(target.goals)
    if isinstance(target, NetworkSparsity):
        shares = {name: count for names, count in target.counts.items() for name in names}
        split = {name: Asked(f"share of {n:,}", [Measure(), target.kind(1)]) for name, n in shares.items()}
        return _each(target.own) | split
    return dict.fromkeys(plan.sites, _shared(target))


def _each(goals: Mapping[str, Goal]) -> dict[str, Asked]:
    """What is asked of layers one by one."""
    return {name: Asked(str(goal), [goal], getattr(goal, "eps", math.nan)) for name, goal in goals.items()}


def _shared(target: Target) -> Asked:
    """What is asked of all layers together."""
    if isinstance(target, NetworkEps | MeasuredEps):
        goals: list[Goal] = [Measure()] if target.nonzeros else []
        if isinstance(target, MeasuredEps):
            goals += [Within(target.eps)] * (_TRIALS - 1)
        return Asked(f"share of network eps {target.eps:g}", [*goals, Within(target.eps)], target.eps)
    assert isinstance(target, NeuronSparsity)  # noqa: S101 - there is no other
    return Asked(f"inputs: {target.part:.0%} fewer", [RankInputs(1), KeepInputs(1, (0,))])
