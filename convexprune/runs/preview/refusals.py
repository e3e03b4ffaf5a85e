"""What a run would refuse only once it has begun, asked beforehand: a bound on the network, and tiny programs."""

from collections.abc import Sequence

import torch
from torch import nn

from convexprune.nettrim.goals import Goal, KeepByPath, KeepInputs, Within
from convexprune.nettrim.outcome import bound_of, check_known
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.posed import Posed
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.run import Run
from convexprune.nettrim.sites import Site, Versions
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward
from convexprune.solvers import Gram
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.methods.registry import make_solver


def check_bound(
    model: nn.Module, calibration: Calibration, forward: Forward | None, plan: Plan, recipe: Recipe
) -> None:
    """Whether a bound on the network's outputs is known, to allocate eps by.

    Raises:
        InvalidInput: None is.
    """
    versions = Versions(plan.sites)
    run = Run(
        model=model,
        calibration=calibration,
        forward=forward,
        sites=plan.sites,
        versions=versions,
        counted=plan.counted,
        mixing=plan.mixing,
        how=recipe.how(),
    )
    check_known(bound_of(run))


def check_goals(site: Site, goals: Sequence[Goal], gram: bool, recipe: Recipe) -> None:
    """Whether the layer's programs can be posed, and the solver asked for takes them; on two samples.

    Args:
        site: The layer.
        goals: What it is solved for.
        gram: Whether its data are kept as products.
        recipe: What is asked.

    Raises:
        SolverRefused, MissingExtra: The solver does not take such programs, or its package is not installed.
        InvalidInput: The fit is not for such a goal.
    """
    how, posed = recipe.how(), _tiny(site, gram)
    for goal in goals:
        program = goal.programs(posed, how)
        if recipe.solver is None or isinstance(goal, KeepInputs):  # the latter is a refit
            continue
        if isinstance(goal, KeepByPath):  # its own program is what a refit is judged by
            program = Within(0.1).programs(posed, how)
        name, method = make_solver(recipe.solver, dict(recipe.options))
        if reason := method.refuses(program):
            raise SolverRefused(f"solver {name!r} cannot take this program: {reason}. Choose another solver")


def _tiny(site: Site, gram: bool) -> Posed:
    """The first group with two samples, whose targets are such that no set is a point."""
    stored, fold = site.read()[0], site.folds[0]
    like = fold.apply(stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32))
    X, Y = like.new_ones(2, len(like)), like.new_ones(2, like.shape[1])
    data: tuple[torch.Tensor | Gram, torch.Tensor | None] = (Gram.of([(X, Y)], torch.float64), None) if gram else (X, Y)
    return Posed(*data, stored, fold, site.biased, site.fit, 2)
