"""What multipliers prove about single weights of every optimal solution (docs/guarantees.md)."""

import math

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, checked_radius
from convexprune.solvers.certificate.certificate import Judgement, judge
from convexprune.solvers.certificate.feasible import inside, mixture, proposed
from convexprune.solvers.certificate.solution import Solution
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits import ReluLoss, SquaredLoss
from convexprune.solvers.programs.kinds import NORMS, is_plain
from convexprune.solvers.programs.penalties import is_homogeneous
from convexprune.solvers.programs.program import LayerProgram

_ROUNDING = 2**-50  # relative error granted to float64 sums


def support_bounds(
    program: LayerProgram,
    weights: Solution | ArrayLike,
    multipliers: ArrayLike | None = None,
    *,
    feasible: ArrayLike | None = None,
) -> Tensor:
    """Upper bounds [N, M] on |u*_ij|, for every optimal U* and every feasible one that costs no more than the weights.

    |u*_ij| ≤ (value − bound)/c_ij with c = ``penalty.slack(XᵀΛ)``, for ℓ1 w − |XᵀΛ|; infinite where c is 0. For
    ``SquaredLoss`` and ``ReluLoss`` bounds are 0 where c stays positive for all Λ* that may be optimal.

    Args:
        program: The program, its penalty convex.
        weights: Feasible U [N, M], or a ``Solution`` with multipliers; they need not be optimal.
        multipliers: Any Λ [P, M]; without them the residual of the weights' outputs serves.
        feasible: Weights inside the fit's set, say the trained ones. Where the weights are outside, they are mixed with
            these (``make_feasible``) and the value of the mixture counts: that of infeasible weights bounds nothing.

    Raises:
        InvalidInput: The weights are outside the set by more than rounding and ``feasible`` is not given or is outside
            too; or the penalty is not convex, not homogeneous, or sees signs.
        ShapeMismatch, NonFinite: The arrays do not fit the program, or hold NaN or infinity.
    """
    check_convex(program)
    _check_signs(program)
    U, L = proposed(program, weights, multipliers)
    judged = judge(program, U, L)
    if not inside(program.fit, judged.certificate):
        if feasible is None:
            raise InvalidInput(
                f"weights U: expected weights that satisfy the fit, found a violation of "
                f"{judged.certificate.violation:.2g}: their value bounds no optimum from above. "
                "Pass feasible=W, weights inside the set to mix them with, or mix them by make_feasible"
            )
        judged = judge(program, mixture(program, U, feasible)[0], L)
    certificate = judged.certificate
    excess = max(0.0, certificate.value - certificate.bound) + _ROUNDING * certificate.scale
    slack = _slack(program, judged)
    bounds = torch.where(slack > 0, excess / slack, torch.inf)
    return torch.where(_slack(program, judged, _reach(program, excess)) > 0, 0.0, bounds)


def proven_zeros(
    program: LayerProgram,
    weights: Solution | ArrayLike,
    multipliers: ArrayLike | None = None,
    *,
    size: float,
    feasible: ArrayLike | None = None,
) -> Tensor:
    """Boolean [N, M]: weights proven to be at most ``size`` in absolute value in every optimal solution.

    Size 0 asks for exact zeros, which only the losses of ``support_bounds`` prove. Arguments and errors as there.
    """
    return support_bounds(program, weights, multipliers, feasible=feasible) <= checked_radius("size", size)


def _slack(program: LayerProgram, judged: Judgement, moved: Tensor | float = 0.0) -> Tensor:
    """c ≥ 0 with g(U) + ⟨A', U⟩ ≥ c_ij|u_ij| for all A' within rounding, and ``moved``, of A."""
    penalty, most = program.penalty.to(judged.A), judged.A.abs() + judged.rounding + moved
    return torch.minimum(penalty.slack(most), (penalty.cost(program.shape).to(most) - most).clamp(min=0))


def _reach(program: LayerProgram, excess: float) -> Tensor:
    """How far each entry of XᵀΛ may be from an optimal one: −f* of a loss is strongly concave, of a set it is not."""
    lengths: Tensor = torch.linalg.vector_norm(program.inputs, dim=0, dtype=torch.float64)[:, None]
    fit = program.fit
    if isinstance(fit, ReluLoss | SquaredLoss) and is_plain(fit, (ReluLoss, SquaredLoss)):
        return lengths * math.sqrt(2 * fit.weight * excess)
    return torch.full_like(lengths, torch.inf)


def _check_signs(program: LayerProgram) -> None:
    """Raise InvalidInput unless g is homogeneous and depends on the sizes of the weights alone, as slack must."""
    if is_plain(program.penalty, NORMS):
        return
    noise = torch.Generator().manual_seed(0)
    U = torch.randn(*program.shape, generator=noise, dtype=torch.float64)
    penalty = program.penalty.to(U)
    same = torch.equal(penalty.prox(U, 0.0), U) and torch.isclose(penalty.value(U.abs()), penalty.value(U))
    if not (is_homogeneous(penalty) and bool(same)):
        raise InvalidInput(
            "penalty: expected a homogeneous one that depends on the sizes of the weights alone, as L1 and GroupL2 do, "
            f"found {type(penalty).__name__}: its multipliers bound no single weights here"
        )


def check_convex(program: LayerProgram) -> None:
    """Raise InvalidInput unless multipliers can prove anything of the penalty."""
    if not program.penalty.convex:
        raise InvalidInput(
            f"penalty: expected a convex one, found {type(program.penalty).__name__}: multipliers prove nothing of it"
        )
