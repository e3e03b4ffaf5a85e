"""The custom ADMM: graph form, column scaling, two balanced penalties, over-relaxation, a start from a sample.

minimise g(T) + f(Z)  subject to  Z = XU,  T = U

by ADMM on the pairs (U) and (Z, T) (Parikh & Boyd, "Block splitting for distributed optimization", 2014), with one
penalty parameter for each constraint: rho for Z = XU and sigma for T = U.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from convexprune.solvers.arrays import (
    as_number,
    checked_count,
    checked_dtype,
    checked_positive,
    multiplies_bfloat16,
    norm,
    stratified,
)
from convexprune.solvers.errors import InvalidInput, InvalidTolerance
from convexprune.solvers.methods.interface import Excess, Start
from convexprune.solvers.methods.iterate import Iterate, PenaltyParameter, interpolated
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.normal import NormalMatrix, positive_or_one
from convexprune.solvers.methods.packages import Clarabel
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.program import Samples

_TINY = 1e-30
_STEER, _MOST = 1.5, 3.0  # how fast and how far the lead follows what the certificate lacks
_TRANSIENT = 25  # iterations before that says anything


class _Sampled(NamedTuple):
    """What a run on some of the samples says about all of them, in the caller's units."""

    U: Tensor  # [N, M]
    A: Tensor  # XᵀΛ [N, M]
    rho: float
    sigma: float
    slope: float  # Λ over the residual


@register("admm")
@dataclass(frozen=True)
class ADMM(IterativeSolver[Iterate]):
    """Our ADMM: any convex fit and penalty with a prox, on the device of the data.

    X is never copied: columns are scaled implicitly, other precisions are converted block by block. Where there are
    many samples and no start is given, it first runs a while on a fraction of them. rho and sigma are balanced: each is
    multiplied by the square root of the ratio of its constraint's relative primal and dual residuals whenever that is
    off by more than ``balance``.

    Args:
        relaxation: Over-relaxation in (0, 2).
        rho: Initial penalty of Z = XU in the caller's units, or None to derive it.
        sigma: Initial penalty of T = U in scaled units, or None to derive it.
        balance: Factor ≥ 1 that residuals may be out of balance; infinite keeps the penalties fixed.
        evening: p in [0, 1]: the columns of X are divided by ‖x_j‖·(price of x_j)^p, so that prices w_j/‖x_j‖ become
            more even; 0 gives columns of unit length.
        sampled: Iterations on a random fraction of the samples to start from; 0: none.
        seed: Of that choice, ≥ 0.
        restorations: Steps that move the sparse iterate along its support back to the fit's set when it is judged.
        dtype: torch.float32 or torch.float64 for the iterations; None: the program's own.
        products: Precision of products between X and what changed since the iteration before, a floating dtype; what
            the changes add up to is computed afresh in that of the iterations at every tenth. None: that of the
            iterations throughout; "auto": bfloat16 for iterations in float32 on a device that multiplies it natively.
    """

    relaxation: float = 1.7
    rho: float | None = None
    sigma: float | None = None
    balance: float = 1.2
    evening: float = 0.4
    sampled: int = 30
    seed: int = 0
    restorations: int = 2
    dtype: torch.dtype | None = None
    products: torch.dtype | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if not 0 < as_number("relaxation", self.relaxation) < 2:
            raise InvalidTolerance(f"relaxation: expected a number strictly between 0 and 2, found {self.relaxation}")
        if not as_number("balance", self.balance) >= 1:
            raise InvalidTolerance(f"balance: expected a factor ≥ 1, found {self.balance}")
        if not 0 <= as_number("evening", self.evening) <= 1:
            raise InvalidTolerance(f"evening: expected a power between 0 and 1, found {self.evening}")
        for name in ("rho", "sigma"):
            if getattr(self, name) is not None:
                checked_positive(name, getattr(self, name))
        for name in ("restorations", "sampled", "seed"):
            checked_count(name, getattr(self, name), 0)
        checked_dtype(self.dtype)
        if not (self.products in (None, "auto") or getattr(self.products, "is_floating_point", False)):
            raise InvalidInput(f'products: expected a floating torch.dtype, "auto" or None, found {self.products!r}')

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None: whatever is convex and has a prox can be."""
        if program.penalty.convex:
            return None
        return f"{type(program.penalty).__name__} is not convex; the solver 'continuation' takes it"

    def init(self, program: LayerProgram, start: Start | None) -> Iterate:
        """Factorise, and find a start and penalties of the right size."""
        # First of all, so that the arrays for a fraction of the samples are gone when those for all are made.
        sample = None if start is not None else self._on_sample(program)
        dtype = self.dtype or program.dtype
        samples, gram = Samples.of(program, dtype), NormalMatrix.of(program.inputs)
        d = self._lengths(program, gram.diagonal())
        gram = gram.scaled(d)
        d = d.to(dtype)
        penalty = program.penalty.rescaled(d)
        V = self._first(samples, gram, d, start) if sample is None else sample.U.to(d) * d
        XU = samples.outputs(V / d, V.new_empty(program.fit.shape))
        q, work = XU.clone(), torch.empty_like(XU)
        if sample is None:  # multiplier over primal size for each constraint, from g(V) ≈ ⟨Λ, Z⟩ ≈ ⟨M, V⟩ at an optimum
            cost = float(penalty.value(penalty.prox(V, 0.0)))
            rho, sigma = (cost / max(float(norm(A)) ** 2, _TINY) or 1.0 for A in (XU, V))
        else:
            rho, sigma = sample.rho, sample.sigma
        rounding = torch.finfo(dtype).eps
        parameters = PenaltyParameter(self.rho or rho, rounding), PenaltyParameter(self.sigma or sigma, rounding)
        lead, products, nothing = self._lead(program), self._products(dtype, d.device), torch.zeros(0)
        settings = (program, samples, penalty, d, gram, lead, lead, *parameters, products)
        state = Iterate(*settings, V, torch.zeros_like(V), q, V, XU, work, nothing, nothing)
        if sample is not None:
            state.dual = sample.A.to(d) / d / state.sigma.weight
            for block in samples:
                qb = q[block.rows]
                qb.add_(block.fit.residual(qb), alpha=sample.slope / state.rho.weight)
        elif start is not None and start.multipliers is not None:
            state.set_duals(start.multipliers)
        state.sums = samples.sums(q)
        state.refactor()
        state.scale = math.log(program.fit.scale)
        return state

    def retarget(self, state: Iterate, program: LayerProgram) -> Iterate | None:
        """The state made to go on with another fit of the same samples and penalty: nothing is factorised again."""
        state.lead = state.first_lead = self._lead(program)
        state.follow(program)
        return state

    def step(self, state: Iterate) -> None:
        """Least squares for V, then both proxes; penalties are reviewed at measured iterations."""
        state.iteration += 1
        measured = state.iteration % 10 == 0
        sigma, a = state.sigma.weight, self.relaxation
        # V moves by what its optimality lacks: rounding of the inverse then shrinks with the steps.
        lacking = self._adjoint(state, measured) / state.d
        lacking.add_(state.T + state.dual - state.V, alpha=sigma / state.rho.weight)
        change = state.inverse @ lacking
        state.V = V = state.V + change
        state.add_error(change)
        state.sums = self._move(state, change / state.d, measured)
        relaxed = a * V + (1 - a) * state.T - state.dual
        T = state.penalty.prox(relaxed, 1 / sigma)
        dual = T - relaxed
        if measured:
            state.measure(T, dual)
        state.T, state.dual = T, dual
        if measured and state.iteration >= state.due:
            state.review(math.log(self.balance))

    def _adjoint(self, state: Iterate, exact: bool) -> Tensor:
        """XᵀR [N, M], R = Z + dual − XU; afterwards the working memory holds R, or Z if exact."""
        known = None if exact else state.adjoint
        total = torch.zeros_like(state.T) if known is None else known
        for block in state.samples:
            q, work, r = state.q[block.rows], state.work[block.rows], state.negated_dual(block)
            if exact:
                torch.sub(q, r, out=work)
            R = torch.sub(q, r, alpha=2, out=r).sub_(state.XU[block.rows])
            if known is None:
                total.addmm_(block.inputs(R).T, R)
            else:
                total.add_(block.adjoint(R - work, state.products))
            if not exact:
                work.copy_(R)
        state.adjoint = None if exact else total
        return total

    def _move(self, state: Iterate, change: Tensor, exact: bool) -> Tensor:
        """XU for U + change, and q + relaxation·(XU − Z); the fit's sums of that."""
        a, sums = self.relaxation, torch.zeros_like(state.sums)
        U = state.V / state.d if exact else None
        for block in state.samples:
            q, XU, work = state.q[block.rows], state.XU[block.rows], state.work[block.rows]
            if U is not None:
                torch.mm(block.inputs(q), U, out=XU)
                q.add_(XU, alpha=a).sub_(work, alpha=a)
            else:
                # Z is the mean of q and XU + R.
                moved = block.outputs(change, state.products)
                q.lerp_(XU - work, a / 2).add_(moved, alpha=a)
                XU.add_(moved)
            sums += block.fit.sums(q)
        return sums

    def steer(self, state: Iterate, excess: Excess) -> None:
        """Keep the primal residual of Z = XU smaller the more violation is what the certificate lacks."""
        if state.iteration < _TRANSIENT or not (0 < excess.gap < math.inf and excess.violation < math.inf):
            return
        factor = min(max(math.sqrt(excess.violation / excess.gap), 1 / _STEER), _STEER)
        state.lead = min(max(state.lead * factor, 1.0), _MOST * state.first_lead)

    def finite(self, state: Iterate) -> bool:
        """Whether Z is: whatever else is not finite makes it so."""
        return math.isfinite(float(state.sums.sum()))

    def exhausted(self, state: Iterate) -> str:
        """Whether rho should be where the precision of Z and its dual would not do."""
        return "rho reached the end of its range" if state.rho.bounded else ""

    @property
    def stage(self) -> str:
        """With the precision, where one was chosen."""
        return "admm" + ("" if self.dtype is None else f" in {str(self.dtype).removeprefix('torch.')}")

    def successor(self, program: LayerProgram) -> "ADMM | Clarabel | None":
        """An interior point method for small programs; for others, from float32 the same in float64."""
        if Clarabel.suits(program):
            return Clarabel()
        if (self.dtype or program.dtype) == torch.float64:
            return None
        return replace(self, dtype=torch.float64, products=None, rho=None, sigma=None)

    def residuals(self, state: Iterate) -> Mapping[str, float]:
        """Primal and dual residual of each constraint, relative."""
        if math.isinf(state.rho.primal):  # they are measured every tenth iteration
            return {}
        rho, sigma = state.rho, state.sigma
        return {"primal Z": rho.primal, "dual Z": rho.change, "primal T": sigma.primal, "dual T": sigma.change}

    def finish(self, state: Iterate) -> tuple[Tensor, Tensor]:
        """The sparse iterate T, restored to the set, or of a loss moved to the targets where that pays; multipliers.

        These are the state's own memory, and hold until the next step.
        """
        weights = state.restored(self.restorations) / state.d
        if weights.dtype == torch.float64:
            tension = (state.T - state.dual).abs() / state.penalty.cost(state.program.shape).clamp(min=_TINY)
            weights = interpolated(state.program, weights, state.V / state.d, tension)
        return weights, state.multipliers()

    def effective(self, state: Iterate) -> Mapping[str, Any]:
        """The penalties at the end, the precisions, and a shift in the linear system that is not their ratio."""
        rho, sigma = state.rho.weight, state.sigma.weight
        shift = {"shift raised to": state.shift} if state.shift > sigma / rho else {}
        dtypes = {"iterate dtype": str(state.q.dtype), "products dtype": str(state.products)}
        return {"rho": rho, "sigma": sigma} | shift | dtypes

    def gone_on(self, state: Iterate) -> str:
        """Products in the precision of the iterations, where coarser ones would no longer do."""
        coarse = self._products(state.q.dtype, state.q.device)
        return "" if coarse == state.products else f"products in {str(state.products).removeprefix('torch.')}"

    def _lengths(self, program: LayerProgram, squares: Tensor) -> Tensor:
        """d [N, 1], what the columns of X are divided by: their lengths, somewhat more for those of a low price.

        The price of input j is what an output of unit length costs through it, in units of the median input's.
        """
        length = positive_or_one(squares.clamp(min=0).sqrt()[:, None])
        price = program.penalty.to(length).cost(program.shape).to(length).mean(1, keepdim=True) / length
        paid = price > 0
        relative = torch.where(paid, price / price[paid].median(), 1.0) if bool(paid.any()) else torch.ones_like(price)
        return length * relative**self.evening

    def _first(self, samples: Samples, gram: NormalMatrix, d: Tensor, start: Start | None) -> Tensor:
        """Scaled variables [N, M] to start from: the caller's, or a lightly damped least squares fit of the targets."""
        if start is not None:
            return start.weights.to(d) * d
        # The same for all columns: a short one of the shape of a free bias would start far too large.
        damping = 1e-3 * float(gram.diagonal().max()) + _TINY
        like = d.new_empty(len(d), samples.blocks[0].fit.shape[1])
        moment = samples.adjoint(lambda block: block.fit.anchor, like).div_(d)
        return (gram.inverse(damping)[0] @ moment.to(torch.float64)).to(d)

    def _on_sample(self, program: LayerProgram) -> _Sampled | None:
        """Some iterations on random samples, at least twice as many as inputs; None if those are over a quarter."""
        P, N = program.samples, program.shape[0]
        count = max(2 * N, P // 8, 256)
        if 4 * count > P or self.sampled == 0:
            return None
        rows = stratified(P, count, self.seed)
        part = LayerProgram(program.inputs[rows], program.fit.sample(rows), program.penalty)
        share = count / P
        given = {name: value / share for name in ("rho", "sigma") if (value := getattr(self, name)) is not None}
        method = replace(self, **given)
        state = method.init(part, None)
        for _ in range(self.sampled):
            method.step(state)
        # Λ is ∂f(XU), for ours a multiple of the residual, but where the fit has bounds; its entries become smaller as
        # samples become more, so that XᵀΛ stays.
        U, rho, sigma = state.T / state.d, state.rho.weight * share, state.sigma.weight
        Z = state.samples.outputs(U, state.work)
        lengths = [(norm(state.negated_dual(b)), norm(b.fit.residual(Z[b.rows]))) for b in state.samples]
        duals, residuals = (math.hypot(*map(float, column)) for column in zip(*lengths, strict=True))
        return _Sampled(U, state.dual * state.d * sigma, rho, sigma * share, duals * rho / max(residuals, _TINY))

    def _lead(self, program: LayerProgram) -> float:
        return math.sqrt(math.sqrt(max(1.0, program.fit.size / program.fit.scale)))

    def _products(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """What products of changes are computed in."""
        if self.products != "auto":
            return self.products or dtype
        return torch.bfloat16 if dtype == torch.float32 and multiplies_bfloat16(device) else dtype
