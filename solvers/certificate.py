"""The judge: in float64, from the caller's own data, for weights and multipliers from any solver.

For any multipliers Λ [P, M] weak duality gives −f*(Λ) − g*(−XᵀΛ) ≤ optimum. Any Λ is first made dual feasible:

1. ``fit.curb``: signs clipped where the fit asks for one;
2. where the penalty leaves entries free (the bias) or nearly so, Λ is shifted on its unrestricted entries so that
   XᵀΛ keeps within the penalty there;
3. each column gets its own scale t_m, at most 1/s_m with s_m the dual norm of (XᵀΛ)_m, and among those the t that
   makes −f*(t∘Λ) largest.

Every step yields a valid lower bound, whoever produced Λ (docs/program.md has the proofs).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.fits import Fit
from convexprune.solvers.penalties import Penalty
from convexprune.solvers.program import LayerProgram

__all__ = ["Certificate", "Judgement", "certify", "judge"]

_BLOCK_ENTRIES = 2**20  # float64 entries a block of rows may hold at once
_ROUNDING = 2**-50  # relative error granted to float64 sums
_MOST_CHEAP = 64  # inputs that the repair of nearly free entries takes on
_FREE_FLOOR = 1e-8  # the least dual norm, relative to its largest possible value, of a column with free entries
# Weights that cost this many times more than those proposed are no answer: rounding of the data would swamp the fit.
_INFEASIBLE = {torch.float32: 1e4, torch.float64: 1e6}


@dataclass(frozen=True)
class Certificate:
    """What is proven about weights U.

    Attributes:
        value: g(U) + f(XU) without the indicator part of f: what the weights cost.
        bound: A lower bound on the value of every feasible U; −inf where none is claimed (the penalty is not convex).
        gap: (value − bound) / scale.
        scale: max(value, floor); floor is a thousandth of the least penalty with which any one column of X could
            produce an output as long as Y. So the gap is blind to the units of X and Y, and defined where U = 0 is
            optimal.
        violation: The distance of XU from the fit's set relative to eps (to ‖Y‖_F where eps = 0).
        infeasible: Whether the bound proves that no weights of a sensible size satisfy the fit at all.
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
    penalty, fit = program.penalty.to(U), program.fit
    if not penalty.convex:
        return _without_bound(program, U)
    cost = penalty.cost(program.shape)
    squares = _column_squares(program)
    cheap = _cheap(cost, squares)
    shift = _shift(program, U, multipliers, cheap, cost, squares) if bool(cheap.any()) else None
    sums = _sums(program, U, multipliers, squares, shift)
    bound, t = _bound(fit, penalty, cost, sums)
    value = float(penalty.value(U)) + fit.value(sums.fit)
    violation = fit.distance(sums.fit) / fit.scale
    reach = float(penalty.dual_norm(sums.column_squares.sqrt().expand(program.shape)).max())
    unit = max(fit.size, fit.scale) / reach if reach > 0 else 0.0
    scale = max(value, 1e-3 * unit)
    certificate = Certificate(
        value=value,
        bound=bound,
        gap=max(0.0, value - bound) / scale if scale > 0 else 0.0,
        violation=violation,
        scale=scale,
        infeasible=violation > 0
        and bound > _INFEASIBLE[program.dtype] * max(value, unit, _typical_cost(program, cost, sums)),
    )
    return Judgement(certificate, sums.A * t, _ROUNDING * sums.reach * t)


def _without_bound(program: LayerProgram, U: Tensor) -> Judgement:
    fit = program.fit
    sums = torch.stack([block.fit.sums(block.Z) for block in _blocks(program, U)]).sum(0)
    value = float(program.penalty.to(U).value(U)) + fit.value(sums)
    certificate = Certificate(value, -math.inf, math.inf, fit.distance(sums) / fit.scale, abs(value))
    return Judgement(certificate, torch.zeros_like(U), torch.zeros_like(U))


def _typical_cost(program: LayerProgram, cost: Tensor, sums: "_Sums") -> float:
    """What an output as long as Y costs at the median of the entries' prices w_jm/‖x_j‖."""
    price = (cost / sums.column_squares.sqrt())[(sums.column_squares > 0).expand_as(cost)]
    return program.fit.size * float(price.median()) if len(price) else 0.0


@dataclass(frozen=True)
class _Block:
    """Some samples of the program in float64, with the multipliers proposed for them."""

    X: Tensor
    fit: Fit
    U: Tensor
    proposed: Tensor | None

    @cached_property
    def Z(self) -> Tensor:
        """XU."""
        return self.X @ self.U

    @property
    def L(self) -> Tensor:
        """Λ, of the signs that the fit asks for."""
        return self.fit.curb(self.fit.residual(self.Z) if self.proposed is None else self.proposed)


def _blocks(program: LayerProgram, U: Tensor, multipliers: Tensor | None = None) -> Iterator[_Block]:
    X, (N, M) = program.inputs, program.shape
    rows = max(1, _BLOCK_ENTRIES // (N + 4 * M))
    for start in range(0, program.samples, rows):
        part = slice(start, start + rows)
        fit = program.fit.map(lambda array, part=part: array[part].to(torch.float64))  # type: ignore[misc]
        proposed = None if multipliers is None else multipliers[part].to(torch.float64)
        yield _Block(X[part].to(torch.float64), fit, U, proposed)


def _column_squares(program: LayerProgram) -> Tensor:
    """‖x_j‖² [N, 1]."""
    rows = max(1, _BLOCK_ENTRIES // 8 // program.shape[0])
    parts = (part.to(torch.float64).square().sum(0) for part in torch.split(program.inputs, rows))
    return torch.stack(list(parts)).sum(0)[:, None]


@dataclass(frozen=True)
class _Sums:
    """What one pass over the samples adds up."""

    fit: Tensor  # the fit's sums, [K, M]
    terms: Tensor  # the fit's dual terms, [2, M]
    A: Tensor  # XᵀΛ [N, M]
    multiplier_squares: Tensor  # ‖λ_m‖² [1, M]
    anchor_squares: Tensor  # of what ⟨Λ, ·⟩ in the dual terms is taken with [1, M]
    column_squares: Tensor  # ‖x_j‖² [N, 1]

    @property
    def reach(self) -> Tensor:
        """‖x_j‖·‖λ_m‖ ≥ Σ_p |x_pj λ_pm|, [N, M]: rounding of A is relative to it."""
        return self.column_squares.sqrt() * self.multiplier_squares.sqrt()


def _sums(
    program: LayerProgram, U: Tensor, multipliers: Tensor | None, column_squares: Tensor, shift: Tensor | None
) -> _Sums:
    totals: list[Tensor] = []
    for block in _blocks(program, U, multipliers):
        L = block.L
        if shift is not None:
            L = L - torch.where(block.fit.unrestricted(), block.X @ shift, 0.0)
        parts = [
            block.fit.sums(block.Z),
            block.fit.dual_terms(L),
            block.X.T @ L,
            L.square().sum(0)[None, :],
            block.fit.anchor.square().sum(0)[None, :],
        ]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
    fit, terms, A, multiplier_squares, anchor_squares = totals
    return _Sums(fit, terms, A, multiplier_squares, anchor_squares, column_squares)


def _cheap(cost: Tensor, column_squares: Tensor) -> Tensor:
    """[N, M]: entries that are free, or far cheaper than others for the same length of output."""
    price = cost / column_squares.sqrt().clamp(min=1e-300)
    cheap = (price <= 1e-2 * price.median()) & (column_squares > 0)
    # The repair of F inputs costs M·F² memory; beyond a few, only those that need it to have any bound are repaired.
    return cheap if int(cheap.any(1).sum()) <= _MOST_CHEAP else (cost == 0) & (column_squares > 0)


def _shift(
    program: LayerProgram,
    U: Tensor,
    multipliers: Tensor | None,
    cheap: Tensor,
    cost: Tensor,
    column_squares: Tensor,
) -> Tensor:
    """C [N, M] such that Λ − unrestricted∘(XC) in the place of Λ meets |XᵀΛ| ≤ cost on every cheap entry.

    A least squares problem a column over the cheap inputs F: (X_Fᵀ D X_F) c = r_F with D the unrestricted samples and r
    what X_FᵀΛ exceeds the cost by. Columns of X_F are scaled to unit length first.
    """
    rows = cheap.any(1).nonzero()[:, 0]
    mask = cheap[rows].T.to(torch.float64)  # [M, F]
    length = column_squares[rows].sqrt().clamp(min=1e-300)  # [F, 1]
    gram, A = U.new_zeros(*mask.shape, len(rows)), U.new_zeros(len(rows), len(mask))
    for block in _blocks(program, U, multipliers):
        XF = block.X[:, rows] / length.T
        gram += torch.einsum("pf,pm,pg->mfg", XF, block.fit.unrestricted().to(torch.float64), XF)
        A += XF.T @ block.L
    gram *= mask[:, :, None] * mask[:, None, :]
    limit = cost[rows] / length
    excess = (A - A.clamp(-limit, limit)).T * mask
    solution = torch.linalg.pinv(gram, hermitian=True) @ excess[:, :, None]
    return torch.zeros_like(U).index_copy(0, rows, (solution[:, :, 0] * mask).T / length)


def _bound(fit: Fit, penalty: Penalty, cost: Tensor, sums: _Sums) -> tuple[float, Tensor]:
    """The bound, and the scales t [M] of the columns that it holds for."""
    # Rounding of A is no evidence that Λ is orthogonal to a column.
    length, size = sums.multiplier_squares.sqrt(), sums.reach
    largest = penalty.dual_norm(size)
    norm = penalty.dual_norm(-sums.A) + _ROUNDING * largest  # −A is what g* sees
    # Where entries are free no weight bounds what rounding leaves of A, so such Λ may be scaled up far less.
    free = cost == 0
    norm = torch.where(free.any(0), torch.maximum(norm, _FREE_FLOOR * largest), norm)
    cap = 1 / norm.clamp(min=1e-100)  # a Λ exactly orthogonal to X may grow at will
    unmet = ((sums.A.abs() > 64 * _ROUNDING * size) & free).any(0) | free.all(0)
    # Likewise for the dual terms: where the caps are huge, their rounding would pass for a bound.
    rounding = _ROUNDING * length * (sums.anchor_squares.sqrt() + fit.scale)
    terms = torch.cat([sums.terms[:1] - rounding, sums.terms[1:]])
    t = fit.best_scaling(terms, torch.where(unmet, 0.0, cap))
    bound = fit.dual_value(terms, t)
    return (bound, t) if bound > 0 else (0.0, torch.zeros_like(t))
