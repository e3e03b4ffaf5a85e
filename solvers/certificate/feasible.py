"""From weights that violate slightly to weights that do not, by mixing with others (docs/guarantees.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike
from convexprune.solvers.certificate.certificate import Certificate, _checked, judge
from convexprune.solvers.certificate.solution import Solution
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.blocks import Block, Samples
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.program import LayerProgram

_ROUNDING = 2**-50  # relative error granted to float64 sums
_WITHIN = 2**-44  # distance from the set, relative to ‖Y‖ + eps, that rounding explains


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

    U is first moved to the nearest point of the penalty's domain, where that has one.
    The penalty of U_θ is at most θ·g(U) + (1 − θ)·g(W). Zeros of U are filled in with (1 − θ)-fold entries of W: U_θ is
    for bounds, or for weights that must keep the promise, not for storage. Where W itself lies on the boundary, as
    under ceilings V = XW, θ may well be 0. X is multiplied twice, whatever θ; memory: two float64 arrays [P, M].

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
    """U_θ and θ of ``make_feasible``, for checked float64 U."""
    W = _checked(program, feasible, None)[0]
    if program.penalty.convex:
        nearest = program.penalty.to(U).prox
        U = nearest(U, 0.0)
        if not torch.allclose(nearest(W, 0.0), W, rtol=_WITHIN, atol=0.0):
            raise InvalidInput(f"feasible W: expected weights in the domain of {type(program.penalty).__name__}")
    segment, within = _Segment.between(program, W, U), _within(program.fit)
    _check_inside(program.fit, program.fit.distance(segment.sums(0.0)), within)
    theta = _largest_share(segment, within)
    return U if theta == 1 else theta * U + (1 - theta) * W, theta


def _largest_share(segment: "_Segment", within: float) -> float:
    """The largest θ in [0, 1] at which the distance is rounding, known that it is at 0.

    The distance is convex in θ, so Newton's steps from θ = 1 never pass the largest root.
    """
    theta = 1.0
    while theta > 0:
        sums = segment.sums(theta)
        distance = segment.fit.distance(sums)
        if distance <= within / 2:  # the other half is for rounding of the mixture
            return theta
        rate = segment.rate(theta, sums, distance)
        # At the end of double precision a step may be too short to be seen.
        theta = min(theta - distance / rate, theta * (1 - _ROUNDING)) if rate > 0 else 0.0
    return 0.0


@dataclass(frozen=True, eq=False)
class _Segment:
    """Outputs Z_θ = XW + θX(U − W), two products with X for all θ."""

    samples: Samples
    fit: Fit
    base: Tensor  # XW [P, M]
    change: Tensor  # X(U − W) [P, M]

    @classmethod
    def between(cls, program: LayerProgram, W: Tensor, U: Tensor) -> "_Segment":
        samples = Samples.of(program, torch.float64)
        base, change = (samples.outputs(A, U.new_empty(program.fit.shape)) for A in (W, U - W))
        return cls(samples, program.fit, base, change)

    def outputs(self, block: Block, theta: float) -> Tensor:
        return self.base[block.rows].add(self.change[block.rows], alpha=theta)

    def sums(self, theta: float) -> Tensor:
        """The fit's sums of Z_θ."""
        return torch.stack([block.fit.sums(self.outputs(block, theta)) for block in self.samples]).sum(0)

    def rate(self, theta: float, sums: Tensor, distance: float) -> float:
        """The derivative of the distance d by θ: ⟨Z − P(Z), X(U − W)⟩/d, P the projection on the domain of f."""
        terms = (
            block.fit.pull(self.outputs(block, theta), sums, math.inf).mul_(self.change[block.rows]).sum()
            for block in self.samples
        )
        return float(sum(terms)) / distance


def proposed(
    program: LayerProgram, weights: Solution | ArrayLike, multipliers: ArrayLike | None
) -> tuple[Tensor, Tensor | None]:
    """Weights and multipliers, from a solution or apart, checked; weights in float64."""
    if isinstance(weights, Solution):
        multipliers = weights.multipliers if multipliers is None else multipliers
        weights = weights.weights
    return _checked(program, weights, multipliers)


def inside(fit: Fit, certificate: Certificate) -> bool:
    """Whether the violation is rounding."""
    return certificate.violation * fit.scale <= _within(fit)


def _check_inside(fit: Fit, distance: float, within: float) -> None:
    if distance > within:
        raise InvalidInput(
            f"feasible W: expected weights that satisfy the fit, found a distance of {distance:.3g} from its set, "
            f"{distance / fit.scale:.2g} of eps (of ‖Y‖ where there is none), of which rounding explains {within:.2g}. "
            "Raise eps or the ceiling, or compute the ceiling in float64"
        )


def _within(fit: Fit) -> float:
    """The distance from the set that rounding explains."""
    return _WITHIN * (fit.size + fit.scale)
