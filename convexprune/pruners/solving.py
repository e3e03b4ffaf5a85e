"""Pruners that solve a program for each layer: from what the target says to a goal for each layer."""

from contextlib import suppress
from typing import ClassVar

from convexprune.options import Options
from convexprune.pruners.measuring import Stopped, curves, nonzeros, split_counts
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import compared_counts, wanted_of
from convexprune.runs.answer import Goal
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Sparsity, Target

_WORTH_MORE = "left as trained: the weights that are allowed are worth more here than in other layers"


class Solving(Pruner):
    """Base of pruners that solve a program for each layer; write ``budget`` and, where it can take one, ``pattern``."""

    proves: ClassVar[bool] = True

    def budget(self, count: int) -> Goal:
        """The goal of a layer that keeps at most so many weights."""
        raise NotImplementedError

    def pattern(self, n: int, m: int) -> Goal:
        """The goal of a layer of which at most n of m consecutive inputs are not zero.

        Raises:
            InvalidInput: The pruner takes no patterns.
        """
        raise InvalidInput(f"sparsity: {type(self).__name__} takes no pattern such as '{n}:{m}'; use method='budget'")

    def prune(self, run: Run, target: Target) -> None:
        """Solve and write; nothing if the run ends before all is measured that the target needs."""
        with suppress(Stopped):
            self.reach(run, target)

    def reach(self, run: Run, target: Target) -> None:
        """Solve and write the layers' budgets, which layers of one number may share."""
        assert isinstance(target, Sparsity)  # noqa: S101 - subclasses take the other kinds
        wanted = {name: wanted_of(target, name) for name in run.layers}
        goals = {name: self.pattern(*each) for name, each in wanted.items() if isinstance(each, tuple)}
        counts = compared_counts(run.layers, target)
        found = curves(run, {name for names in counts for name in names}) if target.scope == "network" else {}
        for names, count in counts.items():
            split = split_counts(run, {name: found[name] for name in names}, count) if found else {names[0]: count}
            goals |= {name: self.budget(share) for name, share in split.items()}
            if found:
                run.left |= {name: _WORTH_MORE for name, share in split.items() if share >= nonzeros(run, name)}
        run.prune({name: goals[name] for name in run.layers if name not in run.left})

    def refuses(self, target: Target, options: Options) -> str | None:
        """As in the base; and a refit, which budgets always have."""
        if isinstance(target, Sparsity) and options.refit:
            return "a budget's weights are fitted on their support anyway: leave refit out"
        return super().refuses(target, options)
