"""The smallest eps: which promises about outputs no weights of a sensible size can keep (docs/guarantees.md)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, checked_positive, checked_radius
from convexprune.solvers.certificate import Solution, Status, certify
from convexprune.solvers.certificate.certificate import dual_norm_of_sizes
from convexprune.solvers.certificate.guarantees import check_convex
from convexprune.solvers.errors import ConvexPruneError, Infeasible, InvalidInput
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.claims import LOSSES, SETS, is_plain
from convexprune.solvers.programs.fits import LossFit, SetFit
from convexprune.solvers.programs.program import Samples

_SENSIBLE = 10.0  # how many times the penalty of the weights found, or of typical ones, is still of a sensible size
_WEIGHTS = 8  # how many weights of the loss are tried, each up to 10 times the last
_NO_WEIGHTS = "no weights of a sensible size keep to the ceilings, whatever eps"


@dataclass(frozen=True, eq=False)
class EpsInterval:
    """The smallest eps that weights of a sensible size can reach, between two proofs.

    No weights with penalty ≤ ``budget`` satisfy the fit for any eps below ``low``: Λ proves it, for g(U) + ½ω‖h(XU)‖² ≥
    ``bound`` for all U below the ceilings. The budget is 10 times the penalty of ``weights`` or, if that is more, of an
    output as long as Y at the median price w_ij/‖x_j‖.
    """

    high: float  # the eps that the weights reach
    budget: float
    eps: float  # that of the program
    weights: Tensor  # U [N, M]
    violation: float  # how far these are outside the fit's ceilings, relative to ‖Y‖
    multipliers: Tensor  # Λ [P, M]
    weight: float  # ω of the loss
    bound: float

    @property
    def low(self) -> float:
        """√(2(bound − budget)₊/ω)."""
        return self.lowest(self.budget)

    @property
    def width(self) -> float:
        """high − low."""
        return self.high - self.low

    @property
    def infeasible(self) -> bool:
        """Whether no weights with penalty ≤ ``budget`` satisfy the program with its own eps."""
        return self.eps < self.low

    def lowest(self, budget: float) -> float:
        """``low`` for another budget: √(2(bound − budget)₊/ω)."""
        return math.sqrt(2 * max(0.0, self.bound - budget) / self.weight)


def feasible_eps(
    program: LayerProgram, *, tol: float = 1e-3, feas_tol: float = 1e-6, solver: str | Solver = "admm", **options: Any
) -> EpsInterval:
    """The smallest eps at which the program has solutions of a sensible size, as a certified interval.

    Solves the program of the loss ½ω‖h‖² in the place of the set, whose dual bounds ‖h‖² ≥ 2(bound − B)/ω for all
    weights with penalty ≤ B; ω is raised until B is small against the loss. The program has a set of one radius, and
    need not have a solution. ``tol`` is the width of the interval to reach, relative to ‖Y‖ (what is not reached by
    then is returned as it is: look at ``width``), ``feas_tol`` what weights may violate ceilings by, relative to ‖Y‖;
    the solver takes the losses.

    Raises:
        InvalidInput: The fit is a loss or has a radius for each neuron; or the penalty is not convex.
        Infeasible: No weights of a sensible size keep to the ceilings, whatever eps.
        SolverRefused and others: As ``solve``.
    """
    fit, tol = _one_ball(program), checked_positive("tol", tol)
    typical, size = _typical_penalty(program), fit.size or 1.0
    weight, start = (_SENSIBLE * typical or 1.0) / (tol * size**2), None  # B is about tol of the loss of U = 0
    for _ in range(_WEIGHTS):
        problem = LayerProgram(program.inputs, fit.as_loss(weight), program.penalty)
        found = solve(problem, solver, tol=tol / 2, feas_tol=feas_tol, start=start, **options)
        interval = _interval(problem, found, typical, float(fit.eps))
        if interval.low > _most(problem, interval.budget):
            missed = f"{interval.budget:.3g} would miss by {interval.low:.3g} at least, and cannot"
            raise Infeasible(f"{_NO_WEIGHTS}: those of a penalty of at most {missed}. Raise the ceiling")
        if interval.width <= tol * size:
            break
        # The width is about as 1/ω; large ω are the harder ones.
        weight, start = weight * min(max(1.5 * interval.width / (tol * size), 2.0), 10.0), found
    return interval


def proves_infeasible(program: LayerProgram, multipliers: ArrayLike, budget: float) -> bool:
    """Whether multipliers Λ [P, M] prove that no weights with penalty ≤ ``budget`` satisfy the program.

    Whatever satisfies it costs at least the bound, so it does where bound > budget. Those of an ``EpsInterval`` with
    low > eps do for its budget.
    """
    check_convex(program)
    bound = certify(program, torch.zeros(program.shape), multipliers).bound
    return bound > checked_radius("budget", budget)


def _interval(problem: LayerProgram, found: Solution, typical: float, eps: float) -> EpsInterval:
    assert isinstance(problem.fit, LossFit)  # noqa: S101 - feasible_eps made it one
    if found.status is Status.INFEASIBLE:
        proven = f"{found.certificate.bound:.3g}, those found cost {found.certificate.value:.3g}"
        raise Infeasible(f"{_NO_WEIGHTS}: the bound proves that any would cost {proven}. Raise the ceiling")
    if found.status in (Status.DIVERGED, Status.FAILED):
        raise ConvexPruneError(f"no interval, the solve of the loss {found.status}: {found.status.advice}")
    U = found.weights.to(torch.float64)
    samples = Samples.of(problem, torch.float64)
    Z = samples.outputs(U, U.new_empty(problem.fit.shape))
    penalty = problem.penalty.to(U)
    budget = _SENSIBLE * max(float(penalty.value(penalty.prox(U, 0.0))), typical)
    certificate, weight = found.certificate, problem.fit.weight
    return EpsInterval(
        high=float(samples.sums(Z)[0].sum().sqrt()),
        budget=budget,
        eps=eps,
        weights=found.weights,
        violation=certificate.violation,
        multipliers=problem.fit.residual(Z) if found.multipliers is None else found.multipliers,
        weight=weight,
        bound=certificate.bound,
    )


def _most(problem: LayerProgram, budget: float) -> float:
    """What ‖h(XU)‖ ≤ ‖XU‖ + ‖Y‖ is at most for weights with penalty ≤ budget; infinite where some have no price."""
    lengths = torch.linalg.vector_norm(problem.inputs, dim=0, dtype=torch.float64)[:, None]
    penalty = problem.penalty.to(lengths)
    if bool(((penalty.cost(problem.shape) == 0) & (lengths > 0)).any()):
        return math.inf
    reach = float(dual_norm_of_sizes(penalty, lengths.expand(problem.shape)).max())
    return budget * reach + problem.fit.size


def _typical_penalty(program: LayerProgram) -> float:
    """Of an output as long as Y, at the median of the prices w_ij/‖x_j‖ > 0."""
    lengths = torch.linalg.vector_norm(program.inputs, dim=0, dtype=torch.float64)[:, None]
    price = (program.penalty.to(lengths).cost(program.shape) / lengths)[(lengths > 0).expand(program.shape)]
    price = price[price > 0]
    return program.fit.size * float(price.median()) if len(price) else 0.0


def _one_ball(program: LayerProgram) -> SetFit:
    fit = program.fit
    check_convex(program)
    found = type(fit).__name__
    if is_plain(fit, LOSSES):
        raise InvalidInput(f"fit: expected a set with a radius eps, found {found}, which any weights satisfy")
    if not isinstance(fit, SetFit) or not is_plain(fit, SETS):
        expected = "Ball, ReluBall or NetTrimSet, whose distances a loss of ours measures"
        raise InvalidInput(f"fit: expected {expected}, found {found}: what it asks of the outputs is its own")
    if isinstance(fit.eps, Tensor):
        raise InvalidInput(
            f"fit: expected one eps, found {len(fit.eps)}, one for each neuron: their smallest values trade against "
            "each other in one penalty. Ask for one neuron at a time, with targets Y[:, [m]] and a number eps"
        )
    return fit
