"""Certificates, computed in float64 from the caller's own data, for weights and multipliers from any solver.

For any multipliers Λ [P, M] weak duality gives −f*(Λ) − g*(−XᵀΛ) ≤ optimum. Any Λ is first made dual feasible:

1. ``fit.project_dual``: into the domain of f*, which for the package's fits is a matter of signs;
2. where the penalty leaves entries free (the bias) or nearly so, Λ is shifted so that XᵀΛ keeps within the penalty
   there, and projected again (``repair``);
3. each column gets its own scale t_m ≥ 0, at most 1/s_m with s_m the dual norm of (XᵀΛ)_m, and among those the t that
   makes D(t∘Λ) = −f*(t∘Λ) − g*(−XᵀΛ diag(t)) largest.

Every step yields a valid lower bound, whoever produced Λ (docs/program.md has the proofs).
"""

import math
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape
from convexprune.solvers.certificate.repair import NEGLIGIBLE, blocks, cheap_entries, shifts
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.penalties import Penalty, is_homogeneous
from convexprune.solvers.programs.program import LayerProgram, moderated

_UNPRICED = 1e-5  # of the loss of U = 0: the unit of an objective in which no weight has a price
_RANK = 1e-14  # of the largest singular value; smaller ones are taken for rounding
# Weights that cost this many times more than those proposed and than a least squares fit are no answer: rounding of
# the data would swamp the fit.
_INFEASIBLE = {torch.float32: 1e4, torch.float64: 1e6}
ROUNDING = 2**-50  # relative error granted to float64 sums
_DOUBLINGS = 200
_SECTIONS = 12  # from a range of 4 to one of 2 %, which D sees squared
_GOLDEN = (5**0.5 - 1) / 2
_FREE_FLOOR = 1e-8  # the least dual norm, relative to its largest possible value, of a column with free entries


@dataclass(frozen=True)
class Certificate:
    """What is proven about weights U.

    Attributes:
        value: g(U) + f(XU) without the indicator parts of both: what the weights cost.
        bound: A lower bound on the value of every feasible U; −inf where none is claimed (the penalty is not convex).
        gap: (value − bound) / scale.
        scale: max(value, floor); floor is a thousandth of the least penalty with which any one column of X could
            produce an output as long as Y. So the gap does not depend on units, also where U = 0 is optimal.
        violation: The distance of XU from the fit's set relative to eps (to ‖Y‖_F where eps = 0); or that of U from
            the penalty's domain, where it has one, √Σ (‖x_j‖·|u_jm − nearest_jm|)², if it is larger.
        infeasible: Whether the bound proves that no weights of a sensible size satisfy the fit at all: that any cost
            10⁶ times (10⁴ for float32) what these and a least squares fit of the targets cost.
    """

    value: float
    bound: float
    gap: float
    violation: float
    scale: float
    infeasible: bool = False

    def within(self, tol: float, feas_tol: float) -> bool:
        """Whether gap ≤ tol and violation ≤ feas_tol."""
        return self.gap <= tol and self.violation <= feas_tol

    def to_dict(self) -> dict[str, float | bool]:
        """The attributes by name."""
        return asdict(self)


def certify(
    program: LayerProgram, weights: ArrayLike, multipliers: ArrayLike | None = None, samples: ArrayLike | None = None
) -> Certificate:
    """Certify weights, with multipliers if there are any, in float64 and in the caller's units.

    Args:
        program: The program they claim to solve.
        weights: U [N, M].
        multipliers: Λ [P, M] of the constraint Z = XU, in the Lagrangian g(U) + f(Z) + ⟨Λ, XU − Z⟩. Without them the
            residual of the weights' own outputs serves: exact at an optimum of ``Ball`` and ``ReluBall``.
        samples: [S] indices of the samples that the multipliers [S, M] belong to, where only some were solved for;
            those of the others are 0, which is dual feasible too. So a small program bounds the large one.

    Returns:
        The certificate. A bound that no multipliers support is 0, the trivial one.

    Raises:
        ShapeMismatch, NonFinite: The arrays do not fit the program, or hold NaN or infinity.
        InvalidInput: Samples that are not distinct indices of the program's.
    """
    return judge(program, *checked(program, weights, multipliers, samples)).certificate


def checked(
    program: LayerProgram, weights: ArrayLike, multipliers: ArrayLike | None, samples: ArrayLike | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weights [N, M] in float64 and multipliers [P, M], on the program's device."""
    U = check_shape("weights U", as_matrix("weights U", weights), program.shape, "[N, M] of the program")
    if multipliers is not None:
        multipliers = as_matrix("multipliers", multipliers).to(program.inputs.device)
        if samples is not None:
            multipliers = _padded(program, multipliers, samples)
        check_shape("multipliers", multipliers, program.fit.shape, "[P, M] of the program")
    return U.to(program.inputs.device, torch.float64), multipliers


def _padded(program: LayerProgram, multipliers: Tensor, samples: ArrayLike) -> Tensor:
    rows = torch.as_tensor(samples).to(multipliers.device)
    whole = rows.ndim == 1 and not rows.is_floating_point() and rows.dtype != torch.bool
    inside = whole and len(rows) > 0 and 0 <= int(rows.min()) and int(rows.max()) < program.samples
    if not inside or len(torch.unique(rows)) != len(rows):
        raise InvalidInput(f"samples: expected distinct indices below {program.samples}, found {samples!r}")
    check_shape("multipliers", multipliers, (len(rows), program.shape[1]), "[S, M], one row a sample given")
    return multipliers.new_zeros(program.fit.shape).index_copy_(0, rows.long(), multipliers)


@dataclass(frozen=True, eq=False)
class Judgement:
    """A certificate with A = XᵀΛ [N, M] of the dual feasible point that proves its bound, and its rounding [N, M]."""

    certificate: Certificate
    A: Tensor
    rounding: Tensor


def judge(program: LayerProgram, U: Tensor, multipliers: Tensor | None) -> Judgement:
    """As ``certify``, for checked float64 weights, with the dual point."""
    program, unit = moderated(program)
    multipliers = multipliers if multipliers is None or unit == 1 else multipliers / unit
    penalty, fit = program.penalty.to(U), program.fit
    if not penalty.convex:
        seen = torch.stack([block.fit.sums(block.Z) for block in blocks(program, U)]).sum(0)
        value = float(penalty.value(U)) + fit.value(seen)
        certificate = Certificate(value, -math.inf, math.inf, fit.distance(seen) / fit.scale, abs(value))
        return Judgement(certificate, torch.zeros_like(U), torch.zeros_like(U))
    dual = _Dual.of(program, penalty, U, multipliers)
    within, lengths = penalty.prox(U, 0.0), dual.lengths
    value = float(penalty.value(within)) + fit.value(dual.sums)
    outside = float(torch.linalg.vector_norm((U - within) * torch.where(lengths > 0, lengths, lengths.amax())))
    violation = max(fit.distance(dual.sums), outside) / fit.scale
    unit = _unit(program, penalty, lengths)
    bound, t = dual.bound(max(value, unit))
    scale = max(value, 1e-3 * unit)
    certificate = Certificate(
        value=value,
        bound=bound,
        gap=max(0.0, value - bound) / scale if scale > 0 else 0.0,
        violation=violation,
        scale=scale,
        infeasible=violation > 0
        and bound > (most := _INFEASIBLE[program.dtype]) * max(value, unit)
        and bound > most * _fitted_cost(program, penalty, lengths),
    )
    return Judgement(certificate, dual.A * t, ROUNDING * dual.reach * t)


def _unit(program: LayerProgram, penalty: Penalty, lengths: Tensor) -> float:
    """The least penalty of an output as long as Y, from one column of X; a part of f(0) where nothing has a price."""
    fit = program.fit
    reach = float(dual_norm_of_sizes(penalty, lengths.expand(program.shape)).max())
    if reach > 0:
        return max(fit.size, fit.scale) / reach
    return _UNPRICED * fit.value(fit.sums(torch.zeros(1, 1).to(lengths).expand(fit.shape)))


def _fitted_cost(program: LayerProgram, penalty: Penalty, lengths: Tensor) -> float:
    """What the least squares fit of the targets costs: a sensible size, also where inputs depend on each other."""
    d = torch.where(lengths > 0, lengths, 1.0)
    inverse = torch.linalg.pinv(program.inputs.to(torch.float64) / d.T, rtol=_RANK)
    anchor = program.fit.anchor.to(torch.float64).expand(program.fit.shape)
    return float(penalty.value(penalty.prox(inverse @ anchor / d, 0.0)))


@dataclass(frozen=True, eq=False)
class _Dual:
    """Multipliers Λ, dual feasible but for the scales of their columns, by what one pass over the samples adds up."""

    fit: Fit
    penalty: Penalty
    cost: Tensor  # the price of each weight [N, M]
    lengths: Tensor  # ‖x_j‖ [N, 1]
    sums: Tensor  # the fit's, [K, M], of the outputs of the weights
    terms: Tensor  # the fit's dual terms, [K, M]
    A: Tensor  # XᵀΛ [N, M]
    multipliers: Tensor  # ‖λ_m‖ [M]
    anchors: Tensor  # of what ⟨Λ, ·⟩ in the dual terms is taken with, the lengths [M]

    @classmethod
    def of(cls, program: LayerProgram, penalty: Penalty, U: Tensor, multipliers: Tensor | None) -> Self:
        """That of multipliers, or without them of the residual of the weights' outputs, repaired."""
        cost, lengths = penalty.cost(program.shape), program.lengths
        # What is not homogeneous charges for more than its price: only entries without one are repaired.
        cheap = cheap_entries(cost, lengths) if is_homogeneous(penalty) else (cost == 0) & (lengths > 0)
        found = shifts(program, U, multipliers, cheap, cost, lengths) if bool(cheap.any()) else ()
        totals: list[Tensor] = []
        for block in blocks(program, U, multipliers, found):
            L = block.multipliers
            anchors2 = block.fit.anchor.square().sum(0).expand(L.shape[1])
            parts = [block.fit.sums(block.Z), block.fit.dual_terms(L), block.X.T @ L, L.square().sum(0), anchors2]
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        sums, terms, A, multipliers2, anchors2 = totals
        return cls(program.fit, penalty, cost, lengths, sums, terms, A, multipliers2.sqrt(), anchors2.sqrt())

    @property
    def reach(self) -> Tensor:
        """‖x_j‖·‖λ_m‖ ≥ Σ_p |x_pj λ_pm|, [N, M]: rounding of A is relative to it."""
        return self.lengths * self.multipliers

    def bound(self, worth: float) -> tuple[float, Tensor]:
        """The largest bound, and the scales t [M] of the columns that it holds for.

        ``worth`` is the unit of the objective: what weights at hand cost, or an output as long as the targets.
        """
        cap, doubt = self._caps(worth)
        terms = torch.cat([self.terms[:1] - doubt, self.terms[1:]])
        if is_homogeneous(self.penalty):
            t = self._scales(terms, cap)
            bound = self.fit.dual_value(terms, t)
        else:
            bound, t = self._searched(terms, cap)
        return (bound, t) if bound > 0 else (0.0, torch.zeros_like(t))

    def _scales(self, terms: Tensor, cap: Tensor) -> Tensor:
        # The fit's own, which are held to what the bound rests on: 0 ≤ t ≤ cap.
        return self.fit.best_scaling(terms, cap).nan_to_num(0.0).clamp(min=0).minimum(cap)

    def _searched(self, terms: Tensor, cap: Tensor) -> tuple[float, Tensor]:
        """The largest D(t∘Λ) over t = best_scaling(min(cap, τ)), τ > 0, where g* is no longer 0 or ∞.

        D is concave along a ray: τ is doubled or halved as long as that helps, then found by golden sections.
        """
        cap = cap * (1 - 4 * ROUNDING)  # not quite where g* becomes infinite
        # At the worst that rounding may have made of XᵀΛ: g* ≥ g*(0) = 0 is convex, so it grows outwards.
        worst = torch.where(self.cost == 0, 0.0, -self.A - ROUNDING * self.reach * self.A.sign())

        def at(power: float) -> tuple[float, Tensor]:
            t = self._scales(terms, cap.clamp(max=2.0**power))
            lost = self.penalty.conjugate(worst * t).to(torch.float64) * (1 + ROUNDING)
            t = torch.where(torch.isfinite(lost), t, 0.0)
            return self.fit.dual_value(terms, t) - float(torch.where(t > 0, lost, 0.0).sum()), t

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

    def _caps(self, worth: float) -> tuple[Tensor, Tensor]:
        """[M], the largest scales; and [M], by how much rounding may make the bound too high at scale 1."""
        size, free = self.reach, (self.cost == 0) & (self.lengths > 0)
        outputs = self.anchors + self.fit.scale
        # Rounding of A is no evidence that Λ is orthogonal to a column.
        largest = dual_norm_of_sizes(self.penalty, size)
        norm = self.penalty.dual_norm(-self.A) + ROUNDING * largest  # −A is what g* sees
        # Where entries are free no weight bounds what rounding leaves of A, so such Λ may be scaled up far less.
        alone = self.multipliers * outputs / worth if worth > 0 else torch.full_like(largest, torch.inf)
        least = torch.where(largest > 0, largest, alone)
        norm = torch.where(free.any(0), torch.maximum(norm, _FREE_FLOOR * least), norm)
        unmet = ((self.A.abs() > NEGLIGIBLE * size) & free).any(0)
        cap = torch.where(unmet, 0.0, 1 / norm.clamp(min=1e-100))  # a Λ exactly orthogonal to X may grow at will
        # No bound are ⟨A, U⟩ of free entries with outputs no longer than the targets, and rounding of the dual terms.
        left = torch.where(free, self.A / self.lengths.clamp(min=1e-300), 0.0)
        return cap, (ROUNDING * self.multipliers + torch.linalg.vector_norm(left, dim=0)) * outputs


def dual_norm_of_sizes(penalty: Penalty, sizes: Tensor) -> Tensor:
    """[M], the dual norm of a matrix of which only the sizes ≥ 0 of the entries are known."""
    return torch.maximum(penalty.dual_norm(sizes), penalty.dual_norm(-sizes))
