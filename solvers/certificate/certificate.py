"""The judge: in float64, from the caller's own data, for weights and multipliers from any solver.

For any multipliers Λ [P, M] weak duality gives −f*(Λ) − g*(−XᵀΛ) ≤ optimum. Any Λ is first made dual feasible:

1. ``fit.curb``: into the domain of f*, which for ours is a matter of signs;
2. where the penalty leaves entries free (the bias) or nearly so, Λ is shifted so that XᵀΛ keeps within the penalty
   there, and curbed again (``repair``);
3. each column gets its own scale t_m, at most 1/s_m with s_m the dual norm of (XᵀΛ)_m, and among those the t that
   makes −f*(t∘Λ) largest (``dual``).

Every step yields a valid lower bound, whoever produced Λ (docs/program.md has the proofs).
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape
from convexprune.solvers.certificate.dual import ROUNDING, best_bound, dual_norm_of_sizes, sums_of
from convexprune.solvers.certificate.repair import BLOCK_ENTRIES, blocks, cheap_entries, shifts
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.penalties import Penalty, is_homogeneous
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.programs.units import moderated

_UNPRICED = 1e-5  # of the loss of U = 0: the unit of an objective in which no weight has a price
_RANK = 1e-14  # of the largest singular value; smaller ones are taken for rounding
# Weights that cost this many times more than those proposed and than a least squares fit are no answer: rounding of
# the data would swamp the fit.
_INFEASIBLE = {torch.float32: 1e4, torch.float64: 1e6}


@dataclass(frozen=True)
class Certificate:
    """What is proven about weights U.

    Attributes:
        value: g(U) + f(XU) without the indicator parts of both: what the weights cost.
        bound: A lower bound on the value of every feasible U; −inf where none is claimed (the penalty is not convex).
        gap: (value − bound) / scale.
        scale: max(value, floor); floor is a thousandth of the least penalty with which any one column of X could
            produce an output as long as Y. So the gap is blind to the units of X and Y, and defined where U = 0 is
            optimal.
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

    def meets(self, tol: float, feas_tol: float) -> bool:
        """Whether gap ≤ tol and violation ≤ feas_tol."""
        return self.gap <= tol and self.violation <= feas_tol

    def to_dict(self) -> dict[str, float | bool]:
        """The attributes by name."""
        return asdict(self)


def certify(
    program: LayerProgram, weights: ArrayLike, multipliers: ArrayLike | None = None, samples: ArrayLike | None = None
) -> Certificate:
    """Judge weights, with multipliers if there are any, in float64 and in the caller's units.

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
    return judge(program, *_checked(program, weights, multipliers, samples)).certificate


def _checked(
    program: LayerProgram, weights: ArrayLike, multipliers: ArrayLike | None, samples: ArrayLike | None = None
) -> tuple[Tensor, Tensor | None]:
    U = check_shape("weights U", as_matrix("weights U", weights), program.shape, "[N, M] of the program")
    if multipliers is not None:
        multipliers = as_matrix("multipliers", multipliers)
        multipliers = multipliers.to(program.inputs.device)
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
    """A certificate and the dual feasible point that proves its bound.

    Attributes:
        certificate: What is proven.
        A: XᵀΛ [N, M] of that point.
        rounding: [N, M], what rounding may have moved each entry of A by.
    """

    certificate: Certificate
    A: Tensor
    rounding: Tensor


def judge(program: LayerProgram, U: Tensor, multipliers: Tensor | None) -> Judgement:
    """As ``certify``, for checked float64 weights, with the dual point."""
    program, unit = moderated(program)
    multipliers = multipliers if multipliers is None or unit == 1 else multipliers / unit
    penalty, fit = program.penalty.to(U), program.fit
    if not penalty.convex:
        return _without_bound(program, U)
    cost, lengths = penalty.cost(program.shape), _lengths(program)
    # What is not homogeneous charges for more than its price: only entries without one are repaired.
    cheap = cheap_entries(cost, lengths) if is_homogeneous(penalty) else (cost == 0) & (lengths > 0)
    found = shifts(program, U, multipliers, cheap, cost, lengths) if bool(cheap.any()) else ()
    sums = sums_of(program, U, multipliers, lengths, found)
    within = penalty.prox(U, 0.0)
    value = float(penalty.value(within)) + fit.value(sums.fit)
    outside = float(torch.linalg.vector_norm((U - within) * torch.where(lengths > 0, lengths, lengths.amax())))
    violation = max(fit.distance(sums.fit), outside) / fit.scale
    unit = _unit(program, penalty, lengths)
    bound, t = best_bound(fit, penalty, cost, sums, max(value, unit))
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
    return Judgement(certificate, sums.A * t, ROUNDING * sums.reach * t)


def _without_bound(program: LayerProgram, U: Tensor) -> Judgement:
    fit = program.fit
    sums = torch.stack([block.fit.sums(block.Z) for block in blocks(program, U)]).sum(0)
    value = float(program.penalty.to(U).value(U)) + fit.value(sums)
    certificate = Certificate(value, -math.inf, math.inf, fit.distance(sums) / fit.scale, abs(value))
    return Judgement(certificate, torch.zeros_like(U), torch.zeros_like(U))


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


def _lengths(program: LayerProgram) -> Tensor:
    """‖x_j‖ [N, 1]."""
    rows = max(1, BLOCK_ENTRIES // 8 // program.shape[0])
    parts = (part.to(torch.float64).square().sum(0) for part in torch.split(program.inputs, rows))
    return torch.stack(list(parts)).sum(0)[:, None].sqrt()
