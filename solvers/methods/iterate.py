"""What ADMM knows between two iterations, and what is done with it besides iterating."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from convexprune.solvers.arrays import norm
from convexprune.solvers.methods.normal import NormalMatrix, Operator
from convexprune.solvers.programs import LayerProgram, Penalty, SquaredLoss
from convexprune.solvers.programs.claims import is_plain
from convexprune.solvers.programs.program import Block, Samples

_TINY = 1e-30
_COARSE = 0.25  # of the residual of Z = XU: what coarse products may be wrong by


@dataclass
class PenaltyParameter:
    """The penalty parameter of one constraint, and its relative residuals since it was last reviewed."""

    weight: float
    precision: float = 2.0**-52  # what arithmetic rounds to, relative
    primal: float = math.inf  # ‖constraint‖ relative to the larger of its two sides
    change: float = math.inf  # weight·‖change of the splitting variable‖ relative to the multiplier
    imbalance: list[float] = field(default_factory=list)  # ½ log(primal/change)
    share: float = 1.0  # the scaled dual relative to the larger side
    bounded: bool = False  # whether the last review wanted more than the precision allows

    def measure(self, side: float, apart: float, moved: float, dual: float) -> None:
        """Norms of the constraint's larger side, of the constraint, of the change, and of the scaled dual."""
        self.share = dual / max(side, _TINY)
        self.primal, self.change = apart / max(side, _TINY), moved / max(dual, _TINY)
        primal, change = (math.log(min(max(value, _TINY), 1 / _TINY)) for value in (self.primal, self.change))
        self.imbalance.append(0.5 * (primal - change))

    def rebalance(self, threshold: float, lead: float = 1.0) -> float:
        """Change the parameter if it is out of balance by more than the threshold; the factor, 1 if it stays.

        The scaled dual, which shrinks by that factor, and the side of the constraint that it is added to are kept
        within a factor of 1/√precision of each other: the sum holds half of the digits of either.
        """
        mean = sum(self.imbalance) / len(self.imbalance) + math.log(lead)
        self.imbalance.clear()
        self.bounded = False
        if abs(mean) <= threshold:
            return 1.0
        half = math.sqrt(self.precision)
        wanted = math.exp(min(max(mean, math.log(0.2)), math.log(5.0)))
        factor = min(max(wanted, min(1.0, self.share * half)), max(1.0, self.share / half))
        self.bounded = factor != wanted
        self.weight *= factor
        return factor


class Snapshot(NamedTuple):
    """Where an iterate has come to, in units that do not depend on its parameters."""

    scale: float  # logarithm of the fit's
    arrays: tuple[Tensor, ...]  # V, T, XU, Z, and the duals of T = V and of Z = XU


@dataclass
class Iterate:
    """Z and its scaled dual are known by their difference: q = Z − dual, Z = prox(q), so q − Z = −dual."""

    program: LayerProgram
    samples: Samples
    penalty: Penalty  # of the scaled variables
    d: Tensor  # [N, 1]: U = V/d for the scaled variables V
    gram: NormalMatrix  # of X/d, float64
    first_lead: float
    lead: float  # how much smaller than the dual residual of Z = XU the primal one is kept
    rho: PenaltyParameter
    sigma: PenaltyParameter
    products: torch.dtype  # of products with X of changes
    T: Tensor  # [N, M], sparse
    dual: Tensor  # of T = V, scaled
    q: Tensor  # [P, M]
    V: Tensor  # [N, M]
    XU: Tensor  # [P, M], U = V/d
    work: Tensor  # [P, M]; the multipliers, from ``finish`` to the next step
    sums: Tensor  # the fit's, of q
    inverse: Operator  # (gram + sigma/rho I)⁻¹
    adjoint: Tensor | None = None  # Xᵀwork [N, M], where work is what the last step multiplied
    iteration: int = 0
    due: int = 10  # the iteration at which the parameters are reviewed next
    scale: float = 0.0  # logarithm of the fit's
    error: Tensor = field(default_factory=lambda: torch.zeros(()))  # ‖·‖² of XU, by coarse products since it was exact
    shift: float = 0.0  # of the inverse: sigma/rho, or more where rounding of the Gram asks for it
    last: Snapshot | None = None  # where it came to with the fit before

    def negated_dual(self, block: Block) -> Tensor:
        """−dual of Z = XU for a block."""
        return block.fit.prox_residual(self.q[block.rows], self.sums, self.rho.weight)

    def add_error(self, change: Tensor) -> None:
        """Add what a coarse product with this change of V [N, M] may be wrong by, where products are coarse."""
        if self.products != self.q.dtype:
            rounding, lengths = torch.finfo(self.products).eps / 4, self.gram.diagonal().clamp(min=0).sqrt()[:, None]
            self.error = self.error + (rounding * norm(lengths.to(change) * change)).square()

    def refactor(self) -> None:
        """(gram + sigma/rho·I)⁻¹ in float64, rounded once."""
        inverse, self.shift = self.gram.inverse(self.sigma.weight / self.rho.weight)
        self.inverse = inverse.to(self.q)

    def set_duals(self, multipliers: Tensor) -> None:
        """Both duals from multipliers Λ."""
        like = self.T
        self.dual = self.samples.adjoint(lambda block: multipliers[block.rows].to(like), like)
        self.dual.div_(self.d).div_(self.sigma.weight)
        for block in self.samples:
            self.q[block.rows].add_(multipliers[block.rows].to(like), alpha=1 / self.rho.weight)

    def multipliers(self) -> Tensor:
        """Λ [P, M] of Z = XU, in the working memory."""
        self.adjoint = None
        for block in self.samples:
            torch.mul(self.negated_dual(block), self.rho.weight, out=self.work[block.rows])
        return self.work

    def restored(self, steps: int) -> Tensor:
        """T moved along its own support to the boundary of the fit's set, by Polyak's step on the distance to the set.

        The primal residual of ADMM leaves XT a little outside. At an optimum XᵀΛ is the same multiple of the penalty's
        gradient on the whole support, so to first order every way back along it costs the same. A step that does not
        halve the distance is taken back: there may be no way, or no set.
        """
        self.adjoint = None
        T = before = self.T
        support, last, change = T != 0, math.inf, (T - self.V) / self.d
        XT, last_XT = self.work, self.XU
        for step in range(steps + 1):
            sums = torch.zeros_like(self.sums)
            for block in self.samples:
                moved = block.outputs(change, self.products)
                sums += block.fit.sums(torch.add(last_XT[block.rows], moved, out=XT[block.rows]))
            last_XT = XT
            distance = self.samples.blocks[0].fit.distance(sums)
            if distance > 0.5 * last:
                return before
            if step == steps or distance <= _TINY:
                break
            gradient = torch.zeros_like(T)
            for block in self.samples:
                outside = block.fit.prox_residual(XT[block.rows], sums, math.inf)
                gradient.add_(block.adjoint(outside, self.products))
            gradient.div_(self.d).mul_(support)
            length = float(norm(gradient))
            if length <= _TINY:
                break
            before, last = T, distance
            T = self.penalty.prox(T.sub(gradient, alpha=(distance / length) ** 2), 0.0)  # within its domain
            change = (T - before) / self.d
        return T

    def follow(self, program: LayerProgram) -> None:
        """Take the program of another fit; from the third one on, extrapolate from the last two in log scale."""
        r = torch.empty_like(self.q)
        for block in self.samples:
            r[block.rows] = self.negated_dual(block)
        arrays = (self.V, self.T, self.XU.clone(), self.q - r, self.dual * self.sigma.weight, r.mul_(self.rho.weight))
        last, now, scale = self.last, Snapshot(self.scale, arrays), math.log(program.fit.scale)
        self.program, self.samples = program, Samples.of(program, self.q.dtype)
        self.last, self.scale = now, scale
        if last is not None:
            step = (scale - now.scale) / (now.scale - last.scale) if now.scale != last.scale else 0.0
            pairs = zip(now.arrays, last.arrays, strict=True)
            moved = (torch.lerp(b, a, 1 + min(max(step, 0.0), 1.5)) for a, b in pairs)
            self.V, self.T, self.XU, Z, M, L = moved
            self.dual = M / self.sigma.weight
            self.q = Z.add_(L, alpha=1 / self.rho.weight)
        self.sums = self.samples.sums(self.q)
        self.iteration, self.due = 0, 10
        for parameter in (self.rho, self.sigma):
            parameter.imbalance.clear()

    def measure(self, T: Tensor, dual: Tensor) -> None:
        """Residuals of both constraints; the working memory holds Z before this iteration.

        Where coarse products of what changes are wrong by a good part of what is left, they are no longer used.
        """
        squares, V = torch.zeros(5, dtype=torch.float64, device=T.device), self.V
        for block in self.samples:
            r, before, XU = self.negated_dual(block), self.work[block.rows], self.XU[block.rows]
            Z = self.q[block.rows] - r
            squares += torch.stack([norm(A) for A in (XU, Z, XU - Z, Z - before, r)]).square()
        XU_, Z_, apart, moved, r_ = squares.sqrt().tolist()
        self.rho.measure(max(XU_, Z_), apart, moved, r_)
        if float(self.error.sqrt()) > _COARSE * apart:
            self.products = self.q.dtype
        self.error = torch.zeros_like(self.error)
        V_, T_, apart, moved, dual_ = (float(norm(A)) for A in (V, T, V - T, T - self.T, dual))
        self.sigma.measure(max(V_, T_), apart, moved, dual_)

    def review(self, threshold: float) -> None:
        """Change penalties that are out of balance, keeping the multipliers."""
        # Every change of a penalty sets ADMM back, so changes come ever more rarely: else it can cycle for ever.
        self.due = self.iteration + max(10, self.iteration // 4)
        rho = self.rho.weight
        by, for_T = self.rho.rebalance(threshold, self.lead), self.sigma.rebalance(threshold)
        self.dual = self.dual / for_T
        if by != 1:
            for block in self.samples:
                qb = self.q[block.rows]
                qb.sub_(block.fit.prox_residual(qb, self.sums, rho), alpha=1 - 1 / by)
            self.sums = self.samples.sums(self.q)
        if by != 1 or for_T != 1:
            self.refactor()


_SPARE = 1.1  # times as many inputs as samples: with no more, those chosen may depend on each other
_EXCESS = 2.0  # times the loss of what reaches the targets: with no more, nothing is wrong with the sparse weights
_LEAST = 1e-3  # of a neuron's largest weight: what those that are 0 count as
_ENTRIES = 2**24  # that are held at once


def interpolated(program: LayerProgram, U: Tensor, V: Tensor, tension: Tensor) -> Tensor:
    """U or, if they cost less, weights near U that reach the targets of a squared loss with next to no penalty.

    Where inputs are more than samples, the sparse iterate of an ADMM is near the optimum long before its outputs are,
    and what they lack is squared and multiplied by a large weight. So each neuron moves by weighted least squares along
    its support and as many inputs more as it has samples: for r = y − Xu and D = diag(|u|), by D²Xᵀ(XD²Xᵀ)⁻¹r.

    Args:
        program: Only ``SquaredLoss`` with fewer samples than inputs is looked at.
        U: [N, M], sparse, in float64.
        V: [N, M], near U and the targets.
        tension: [N, M], how near each entry that is 0 is to being none.
    """
    fit, size = program.fit, min(len(U), int(_SPARE * program.samples) + 1)
    if not is_plain(fit, (SquaredLoss,)) or program.samples >= len(U) or int((U != 0).sum(0).max()) > size:
        return U
    X, Y = program.inputs.to(U), program.fit.anchor.to(U)
    before, near = (float((X @ A - Y).square().sum()) for A in (U, V))
    if before <= _EXCESS * near:
        return U
    chosen = torch.where(U != 0, torch.inf, tension).topk(size, dim=0).indices
    moved = U.clone()
    for columns in torch.split(torch.arange(U.shape[1]), max(1, _ENTRIES // (size * len(X)))):
        rows, u = chosen[:, columns], U[:, columns]
        D = torch.maximum(u.abs().gather(0, rows), _LEAST * u.abs().amax(0)).T[:, None]  # [M, 1, S]
        left = (Y[:, columns] - X @ u).T[:, :, None]
        step = torch.linalg.lstsq(X.T[rows.T].mT * D, left).solution * D.mT  # [M, S, 1]
        moved[rows, columns] += step[:, :, 0].T.nan_to_num(0.0)
    assert isinstance(fit, SquaredLoss)  # noqa: S101 - is_plain saw to it
    penalty, after = program.penalty.to(U), float((X @ moved - Y).square().sum())
    cheaper = float(penalty.value(moved)) + fit.weight / 2 * after < float(penalty.value(U)) + fit.weight / 2 * before
    return moved if cheaper else U
