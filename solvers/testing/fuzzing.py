"""What a solver makes of random programs, checked against weights that are known to satisfy them and a reference."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from convexprune.solvers.certificate.certificate import certify
from convexprune.solvers.certificate.solution import Solution, Status
from convexprune.solvers.errors import ConvexPruneError
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.testing.random_programs import Drawn

SETTLED = (Status.SOLVED, Status.INFEASIBLE)
"""Both are proven."""
_ROUNDING = 1e-6  # what a bound may exceed the value of other weights by, relative to that value
_FEAS_TOL = 1e-5


@dataclass(frozen=True, eq=False)
class Trial:
    """A solver's answer to a random program.

    Attributes:
        drawn: The program.
        outcome: The status, or the name of the exception.
        faults: What must never be: each one a sentence.
        solution: The answer, None where an exception took its place.
    """

    drawn: Drawn
    outcome: str
    faults: tuple[str, ...]
    solution: Solution | None

    @property
    def settled(self) -> bool:
        """Whether it is solved, or proven to have no solution."""
        return self.outcome in map(str, SETTLED)


def try_on(drawn: Drawn, solver: str | Solver | None = None, *, judge: bool = False) -> Trial:
    """Solve a random program at the default settings and look for faults.

    Args:
        drawn: The program.
        solver: As in ``solve``.
        judge: Whether cvxpy, with Clarabel, solves the program too, to judge the bound and the value.
    """
    try:
        solution = solve(drawn.program, solver)
    except ConvexPruneError as error:
        return Trial(drawn, type(error).__name__, (), None)
    except Exception as error:  # noqa: BLE001 - that there is none is what is tested
        return Trial(drawn, type(error).__name__, (f"an exception of another package: {error}",), None)
    return Trial(drawn, str(solution.status), tuple(_faults(drawn, solution, judge)), solution)


def _faults(drawn: Drawn, solution: Solution, judge: bool) -> Iterable[str]:
    inside, reached = drawn.reached(0.0), drawn.reached(_FEAS_TOL)
    c, status = solution.certificate, solution.status
    if inside is not None and c.bound > inside * (1 + _ROUNDING):
        yield f"the bound {c.bound:.8g} is above {inside:.8g}, which the weights behind the targets reach"
    if reached is not None and status in (Status.DIVERGED, Status.FAILED, Status.INFEASIBLE):
        yield f"{status}, though the weights behind the targets satisfy the program"
    again = certify(drawn.program, solution.weights, solution.multipliers) if status is Status.SOLVED else c
    if again != c:
        yield f"called solved by {c}; judged again, it is {again}"
    if judge:
        yield from _judged(drawn, solution)


def _judged(drawn: Drawn, solution: Solution) -> Iterable[str]:
    """Against cvxpy's answer, where that one satisfies the program."""
    program, own = drawn.program, solution.certificate
    other = solve(program, "cvxpy").certificate
    slack = 1e-4 * max(other.scale, own.scale)
    if other.violation <= _FEAS_TOL and own.bound > other.value + slack:
        yield f"the bound {own.bound:.8g} is above the reference's value {other.value:.8g}"
    if solution.status is Status.SOLVED and own.value < other.bound - slack:
        # What is tolerated of a violation may save much of the penalty, most of all at eps = 0. Ceilings get a part of
        # what a set is raised by, and all of the violation may be at one of them.
        wide = program.to(torch.float64)
        fit: Any = wide.fit
        wide = replace(wide, fit=fit.relaxed((2 * fit.Y.numel()) ** 0.5 * _FEAS_TOL * fit.scale))
        least = solve(wide, "cvxpy").certificate.bound
        if own.value < least - slack:
            yield f"solved at {own.value:.8g}, below the reference's bound {least:.8g} for what is tolerated"


def table(trials: Iterable[Trial]) -> str:
    """A row for each family and dtype: programs, those not settled in per cent and by outcome, and faults.

    "reached" are those not settled that the weights behind their targets satisfy.
    """
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        dtype = str(trial.drawn.program.inputs.dtype).removeprefix("torch.")
        for key in ((trial.drawn.family, dtype), (trial.drawn.family, "all")):
            groups.setdefault(key, []).append(trial)
    rows = [f"{'family':<28} {'dtype':<9} {'programs':>8} {'unsolved':>9} {'reached':>7} {'faults':>6}  outcomes"]
    for (family, dtype), members in sorted(groups.items()):
        left = [trial for trial in members if not trial.settled]
        reached = sum(trial.drawn.reached(_FEAS_TOL) is not None for trial in left)
        faults = sum(bool(trial.faults) for trial in members)
        outcomes = ", ".join(f"{n} {name}" for name, n in Counter(trial.outcome for trial in members).most_common())
        share = f"{100 * len(left) / len(members):.1f} %"
        rows.append(f"{family:<28} {dtype:<9} {len(members):>8} {share:>9} {reached:>7} {faults:>6}  {outcomes}")
    return "\n".join(rows)
