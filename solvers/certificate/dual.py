"""The dual value of repaired multipliers, and the scale of each neuron's that makes it large.

D(t∘Λ) = −f*(t∘Λ) − g*(−XᵀΛ diag(t)), t [M] ≥ 0, bounds the optimum from below for every t at which it is finite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.certificate.repair import MET, Shift, blocks
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.penalties import Penalty, is_homogeneous
from convexprune.solvers.programs.program import LayerProgram

ROUNDING = 2**-50  # relative error granted to float64 sums
_DOUBLINGS = 200
_SECTIONS = 12  # from a range of 4 to one of 2 %, which D sees squared
_GOLDEN = (5**0.5 - 1) / 2
_FREE_FLOOR = 1e-8  # the least dual norm, relative to its largest possible value, of a column with free entries


@dataclass(frozen=True)
class Sums:
    """What one pass over the samples adds up."""

    fit: Tensor  # the fit's sums, [K, M]
    terms: Tensor  # the fit's dual terms, [K, M]
    A: Tensor  # XᵀΛ [N, M]
    multipliers: Tensor  # ‖λ_m‖ [M]
    anchors: Tensor  # of what ⟨Λ, ·⟩ in the dual terms is taken with, the lengths [M]
    lengths: Tensor  # ‖x_j‖ [N, 1]

    @property
    def reach(self) -> Tensor:
        """‖x_j‖·‖λ_m‖ ≥ Σ_p |x_pj λ_pm|, [N, M]: rounding of A is relative to it."""
        return self.lengths * self.multipliers


def sums_of(
    program: LayerProgram, U: Tensor, multipliers: Tensor | None, lengths: Tensor, shifts: tuple[Shift, ...]
) -> Sums:
    """Those of weights U and of the multipliers after these shifts."""
    totals: list[Tensor] = []
    for block in blocks(program, U, multipliers, shifts):
        L = block.multipliers
        parts = [
            block.fit.sums(block.Z),
            block.fit.dual_terms(L),
            block.X.T @ L,
            L.square().sum(0),
            block.fit.anchor.square().sum(0).expand(L.shape[1]),
        ]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
    fit, terms, A, multipliers2, anchors2 = totals
    return Sums(fit, terms, A, multipliers2.sqrt(), anchors2.sqrt(), lengths)


def dual_norm_of_sizes(penalty: Penalty, sizes: Tensor) -> Tensor:
    """[M], the dual norm of a matrix of which only the sizes ≥ 0 of the entries are known."""
    return torch.maximum(penalty.dual_norm(sizes), penalty.dual_norm(-sizes))


def best_bound(fit: Fit, penalty: Penalty, cost: Tensor, sums: Sums, worth: float) -> tuple[float, Tensor]:
    """The bound, and the scales t [M] of the columns that it holds for.

    Args:
        fit: The fit of all samples.
        penalty: A convex penalty in float64.
        cost: Its prices [N, M].
        sums: Of the multipliers.
        worth: The unit of the objective: what weights at hand cost, or an output as long as the targets.
    """
    cap, doubt = _caps(fit, penalty, cost, sums, worth)
    terms = torch.cat([sums.terms[:1] - doubt, sums.terms[1:]])
    if is_homogeneous(penalty):
        t = _scales(fit, terms, cap)
        bound = fit.dual_value(terms, t)
    else:
        bound, t = _searched(fit, terms, cap, _Conjugate(penalty, cost, sums))
    return (bound, t) if bound > 0 else (0.0, torch.zeros_like(t))


def _scales(fit: Fit, terms: Tensor, cap: Tensor) -> Tensor:
    """The fit's own, which are held to what the bound rests on: 0 ≤ t ≤ cap."""
    return fit.best_scaling(terms, cap).nan_to_num(0.0).clamp(min=0).minimum(cap)


@dataclass(frozen=True, eq=False)
class _Conjugate:
    """t ↦ g*(−XᵀΛ diag(t)) by column, at the worst that rounding may have made of XᵀΛ."""

    penalty: Penalty
    cost: Tensor
    sums: Sums

    def __call__(self, t: Tensor) -> Tensor:
        # g* ≥ g*(0) = 0 is convex, so it grows outwards.
        A = self.sums.A + ROUNDING * self.sums.reach * self.sums.A.sign()
        penalty: Any = self.penalty
        conjugate: Tensor = penalty.conjugate(torch.where(self.cost == 0, 0.0, -A * t))
        return conjugate.to(torch.float64) * (1 + ROUNDING)


def _searched(fit: Fit, terms: Tensor, cap: Tensor, conjugate: _Conjugate) -> tuple[float, Tensor]:
    """The largest D(t∘Λ) over t = best_scaling(min(cap, τ)), τ > 0, where g* is no longer 0 or ∞.

    Multipliers of an optimum have τ = 1. D is concave along a ray: τ is doubled or halved as long as that helps, then
    found by golden sections.
    """
    cap = cap * (1 - 4 * ROUNDING)  # not quite where g* becomes infinite

    def at(power: float) -> tuple[float, Tensor]:
        t = _scales(fit, terms, cap.clamp(max=2.0**power))
        lost = conjugate(t)
        t = torch.where(torch.isfinite(lost), t, 0.0)
        return fit.dual_value(terms, t) - float(torch.where(t > 0, lost, 0.0).sum()), t

    best, power = at(0.0), 0.0
    for direction in (1.0, -1.0):
        while abs(power) < _DOUBLINGS and (moved := at(power + direction))[0] > best[0]:
            best, power = moved, power + direction
        if power:
            break
    low, high = power - 1, power + 1
    for _ in range(_SECTIONS):
        inner, outer = (low + (high - low) * part for part in (1 - _GOLDEN, _GOLDEN))
        a, b = at(inner), at(outer)
        best = max(best, a, b, key=lambda found: found[0])
        low, high = (low, outer) if a[0] >= b[0] else (inner, high)
    return best


def _caps(fit: Fit, penalty: Penalty, cost: Tensor, sums: Sums, worth: float) -> tuple[Tensor, Tensor]:
    """[M], the largest scales; and [M], by how much rounding may make the bound too high at scale 1."""
    size, free = sums.reach, (cost == 0) & (sums.lengths > 0)
    outputs = sums.anchors + fit.scale
    # Rounding of A is no evidence that Λ is orthogonal to a column.
    largest = dual_norm_of_sizes(penalty, size)
    norm = penalty.dual_norm(-sums.A) + ROUNDING * largest  # −A is what g* sees
    # Where entries are free no weight bounds what rounding leaves of A, so such Λ may be scaled up far less.
    alone = sums.multipliers * outputs / worth if worth > 0 else torch.full_like(largest, torch.inf)
    least = torch.where(largest > 0, largest, alone)
    norm = torch.where(free.any(0), torch.maximum(norm, _FREE_FLOOR * least), norm)
    unmet = ((sums.A.abs() > MET * size) & free).any(0)
    cap = torch.where(unmet, 0.0, 1 / norm.clamp(min=1e-100))  # a Λ exactly orthogonal to X may grow at will
    # ⟨A, U⟩ of free entries whose outputs together are no longer than the targets, and rounding of the dual terms:
    # where caps are huge, either would pass for a bound.
    left = torch.where(free, sums.A / sums.lengths.clamp(min=1e-300), 0.0)
    return cap, (ROUNDING * sums.multipliers + torch.linalg.vector_norm(left, dim=0)) * outputs
