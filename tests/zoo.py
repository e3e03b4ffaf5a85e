"""The problem zoo of ``convexprune.solvers.testing`` by name, with tight solutions that tests share."""

from functools import cache, partial

from tolerances import TIGHT
from torch import Tensor

from convexprune.solvers import LayerProgram, Solution, solve
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.layers import SETS, awkward, gaussian, infeasible_ceiling, layer
from convexprune.solvers.testing.layers import program_of as program

__all__ = [
    "CLOSING",
    "FITS",
    "MEMBERS",
    "NAMES",
    "SMALL",
    "badly_scaled",
    "build",
    "free_bias",
    "gaussian",
    "infeasible_ceiling",
    "large_units",
    "layer",
    "multipliers",
    "no_slack",
    "program",
    "tight",
    "weighted",
]

badly_scaled, free_bias, large_units, weighted = (
    partial(awkward, kind=kind) for kind in ("badly_scaled", "free_bias", "large_units", "weighted")
)
FITS = SETS
"""The three sets."""
MEMBERS = {member.name: member for member in zoo.members()}
"""All feasible convex members."""
NAMES = list(MEMBERS)
SMALL = [f"{fit} {build}" for fit in FITS for build in ("plain 20x8x5", "free_bias", "weighted")]
"""One of each set without free weights, with a free bias, and with weights of all sizes."""
_LEFT_OUT = ("badly_scaled", "nearly_collinear", "tall", "0.98")
CLOSING = [
    member.name
    for member in zoo.members("plain", "eps", "awkward", "known")
    if member.name.split()[0] in FITS and not member.name.endswith((*_LEFT_OUT, "rows"))
]
"""Sets with an ℓ1 norm that ADMM takes a while to solve, and whose certificate closes to eight digits in float64."""


def no_slack(fit: str) -> LayerProgram:
    """eps = 0 and neurons with fewer active samples than inputs: a linear program with many vertices."""
    return program(*layer(24, 60, 8, 5), fit, 0.0)


@cache
def build(name: str) -> LayerProgram:
    """The member's program, built once."""
    return zoo.program(name)


@cache
def tight(name: str) -> Solution:
    """The member's solution by ADMM to eight digits, computed once."""
    return solve(build(name), tol=TIGHT, feas_tol=TIGHT, max_iter=50_000)


def multipliers(solution: Solution) -> Tensor:
    """The solution's multipliers, which every solver tested here gives."""
    assert solution.multipliers is not None
    return solution.multipliers
