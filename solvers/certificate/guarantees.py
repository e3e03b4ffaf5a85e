"""From certificates to guarantees: weights that keep the promise, and bounds on single weights (docs/guarantees.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, checked_radius
from convexprune.solvers.certificate.certificate import ROUNDING, Certificate, Judgement, checked, judge
from convexprune.solvers.certificate.solution import Solution
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.claims import NORMS, is_plain
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.geometries import ReluLoss, SquaredLoss
from convexprune.solvers.programs.penalties import is_homogeneous
from convexprune.solvers.programs.program import Block, LayerProgram, Samples

_WITHIN = 2**-44  # distance from the set, relative to ‖Y‖ + eps, that rounding explains


def _within(fit: Fit) -> float:
    """The distance from the set that rounding explains."""
    return _WITHIN * (fit.size + fit.scale)


@dataclass(frozen=True, eq=False)
class Feasible:
    """Weights made to satisfy the fit.

    Attributes:
        weights: U_θ = θU + (1 − θ)W [N, M] in float64.
        theta: θ, 1 where U was inside already.
        certificate: That of U_θ, its violation within rounding.
    """

    weights: Tensor
    theta: float
    certificate: Certificate


def make_feasible(
    program: LayerProgram,
    weights: Solution | ArrayLike,
    feasible: ArrayLike,
    multipliers: ArrayLike | None = None,
) -> Feasible:
    """Mix weights U that violate slightly with feasible W: U_θ = θU + (1 − θ)W for the largest feasible θ.

    U is first moved to the nearest point of the penalty's domain. The penalty of U_θ is at most θ·g(U) + (1 − θ)·g(W).
    Zeros of U are filled in with (1 − θ)-fold entries of W: U_θ is for bounds, or for weights that must keep the
    promise, not for storage. Where W lies on the boundary θ may well be 0. Memory: two float64 arrays [P, M].

    Args:
        program: The program, with any fit.
        weights: U [N, M], or a ``Solution``.
        feasible: W [N, M].
        multipliers: For the certificate; without them the residual of the outputs serves.

    Raises:
        InvalidInput: W is outside by more than rounding, of the fit's set or of the penalty's domain.
        ShapeMismatch, NonFinite: The arrays do not fit the program, or hold NaN or infinity.
    """
    U, L = proposed(program, weights, multipliers)
    mixed, theta = mixture(program, U, feasible)
    return Feasible(mixed, theta, judge(program, mixed, L).certificate)


def mixture(program: LayerProgram, U: Tensor, feasible: ArrayLike) -> tuple[Tensor, float]:
    """U_θ and θ of ``make_feasible``, for checked float64 U.

    The distance from the fit's set is convex in θ, so Newton's steps from θ = 1 never pass the largest root.
    """
    fit, within, W = program.fit, _within(program.fit), checked(program, feasible, None)[0]
    if program.penalty.convex:
        nearest = program.penalty.to(U).prox
        U = nearest(U, 0.0)
        if not torch.allclose(nearest(W, 0.0), W, rtol=_WITHIN, atol=0.0):
            raise InvalidInput(f"feasible W: expected weights in the domain of {type(program.penalty).__name__}")
    samples = Samples.of(program, torch.float64)
    base, change = (samples.outputs(A, U.new_empty(fit.shape)) for A in (W, U - W))  # Z_θ = base + θ·change

    def outputs(block: Block, theta: float) -> Tensor:
        return base[block.rows].add(change[block.rows], alpha=theta)

    def sums_at(theta: float) -> Tensor:
        return torch.stack([block.fit.sums(outputs(block, theta)) for block in samples]).sum(0)

    if (distance := fit.distance(sums_at(0.0))) > within:
        raise InvalidInput(
            f"feasible W: expected weights that satisfy the fit, found a distance of {distance:.3g} from its set, "
            f"{distance / fit.scale:.2g} of eps (of ‖Y‖ where there is none), of which rounding explains "
            f"{within:.2g}. Raise eps or the ceiling, or compute the ceiling in float64"
        )
    theta = 1.0
    while theta > 0:
        sums = sums_at(theta)
        distance = fit.distance(sums)
        if distance <= within / 2:  # the other half is for rounding of the mixture
            break
        # The derivative of the distance: ⟨Z − P(Z), X(U − W)⟩ over it, P the projection on the domain of f.
        parts = (block.fit.prox_residual(outputs(block, theta), sums, math.inf) for block in samples)
        along = (part.mul_(change[block.rows]).sum() for block, part in zip(samples, parts, strict=True))
        rate = float(sum(along)) / distance
        # At the end of double precision a step may be too short to be seen.
        theta = max(0.0, min(theta - distance / rate, theta * (1 - ROUNDING))) if rate > 0 else 0.0
    return U if theta == 1 else theta * U + (1 - theta) * W, theta


def proposed(
    program: LayerProgram, weights: Solution | ArrayLike, multipliers: ArrayLike | None
) -> tuple[Tensor, Tensor | None]:
    """Weights and multipliers, from a solution or apart, checked; weights in float64."""
    if isinstance(weights, Solution):
        return checked(program, weights.weights, weights.multipliers if multipliers is None else multipliers)
    return checked(program, weights, multipliers)


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
        feasible: Weights inside the fit's set, say the trained ones. Weights outside are mixed with these
            (``make_feasible``) and the value of the mixture counts: that of infeasible weights bounds nothing.

    Raises:
        InvalidInput: The weights are outside the set by more than rounding and ``feasible`` is not given or is outside
            too; or the penalty is not convex, not homogeneous, or depends on signs.
        ShapeMismatch, NonFinite: The arrays do not fit the program, or hold NaN or infinity.
    """
    check_convex(program)
    _check_signs(program)
    U, L = proposed(program, weights, multipliers)
    judged = judge(program, U, L)
    if judged.certificate.violation * program.fit.scale > _within(program.fit):
        if feasible is None:
            raise InvalidInput(
                f"weights U: expected weights that satisfy the fit, found a violation of "
                f"{judged.certificate.violation:.2g}: their value bounds no optimum from above. "
                "Pass feasible=W, weights inside the set to mix them with, or mix them by make_feasible"
            )
        judged = judge(program, mixture(program, U, feasible)[0], L)
    certificate = judged.certificate
    excess = max(0.0, certificate.value - certificate.bound) + ROUNDING * certificate.scale
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
    fit, lengths = program.fit, program.lengths
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
