"""The custom ADMM: graph form, column scaling, two balanced penalties, over-relaxation, a start from a sample.

minimise g(T) + f(Z)  subject to  Z = XU,  T = U

by ADMM on the pairs (U) and (Z, T) (Parikh & Boyd, "Block splitting for distributed optimization", 2014), with one
penalty parameter for each constraint: rho for Z = XU and sigma for T = U.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import as_number, checked_dtype, checked_positive, norm
from convexprune.solvers.balance import PenaltyParameter
from convexprune.solvers.blocks import Block, Samples, gram_matrix
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.interface import Excess, IterativeSolver, Start
from convexprune.solvers.penalties import Penalty
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import register

__all__ = ["ADMM"]

_TINY = 1e-30
_STEER, _MOST = 1.5, 3.0  # how fast and how far the lead follows what the certificate lacks
_TRANSIENT = 25  # iterations before that says anything


@dataclass
class _State:
    """Z and its scaled dual are known by their difference: q = Z − dual, Z = prox(q), so pull(q) = q − Z = −dual."""

    samples: Samples
    penalty: Penalty  # of the scaled variables
    d: Tensor  # [N, 1]: U = V/d for the scaled variables V
    gram: Tensor  # of X/d, float64
    first_lead: float
    lead: float  # how much smaller than the dual residual of Z = XU the primal one is kept
    rho: PenaltyParameter
    sigma: PenaltyParameter
    T: Tensor  # [N, M], sparse
    dual: Tensor  # of T = V, scaled
    q: Tensor  # [P, M]
    V: Tensor  # [N, M]
    XU: Tensor  # [P, M], U = V/d
    work: Tensor  # [P, M]; the multipliers, from ``finish`` to the next step
    sums: Tensor  # the fit's, of q
    inverse: Tensor  # (gram + sigma/rho I)⁻¹
    iteration: int = 0
    due: int = 10  # the iteration at which the parameters are reviewed next
    scale: float = 0.0  # logarithm of the fit's
    last: "_Snapshot | None" = None  # where it came to with the fit before

    def pull(self, block: Block) -> Tensor:
        """−dual of Z = XU for a block."""
        return block.fit.pull(self.q[block.rows], self.sums, self.rho.weight)


@register("admm")
@dataclass(frozen=True)
class ADMM(IterativeSolver[_State]):
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
        sampled: Iterations on a fraction of the samples to start from; 0: none.
        restorations: Steps that move the sparse iterate along its support back to the fit's set when it is judged.
        dtype: torch.float32 or torch.float64 for the iterations; None: the program's own.
    """

    relaxation: float = 1.7
    rho: float | None = None
    sigma: float | None = None
    balance: float = 1.2
    evening: float = 0.4
    sampled: int = 30
    restorations: int = 2
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < as_number("relaxation", self.relaxation) < 2:
            raise InvalidTolerance(f"relaxation: expected a number strictly between 0 and 2, found {self.relaxation}")
        if not as_number("balance", self.balance) >= 1:
            raise InvalidTolerance(f"balance: expected a factor ≥ 1, found {self.balance}")
        if not 0 <= as_number("evening", self.evening) <= 1:
            raise InvalidTolerance(f"evening: expected a power between 0 and 1, found {self.evening}")
        for name, value in (("rho", self.rho), ("sigma", self.sigma)):
            if value is not None:
                checked_positive(name, value)
        for name in ("restorations", "sampled"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 0):
                raise InvalidTolerance(f"{name}: expected a whole number ≥ 0, found {getattr(self, name)!r}")
        checked_dtype(self.dtype)

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None: whatever is convex and has a prox can be."""
        if program.penalty.convex:
            return None
        return f"{type(program.penalty).__name__} is not convex; the solver 'continuation' takes it"

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """Factorise, and find a start and penalties of the right size."""
        # First of all, so that the arrays for a fraction of the samples are gone when those for all are made.
        sample = None if start is not None else self._on_sample(program)
        dtype = self.dtype or program.dtype
        samples, gram = Samples.of(program, dtype), gram_matrix(program.inputs)
        d = self._lengths(program, gram)
        gram /= d * d.T
        d = d.to(dtype)
        penalty = program.penalty.rescaled(d)
        V = self._first(samples, gram, d, start) if sample is None else sample.weights.to(d) * d
        XU = samples.outputs(V / d, V.new_empty(program.fit.shape))
        q, work = XU.clone(), torch.empty_like(XU)
        rho, sigma = self._parameters(V, XU, penalty) if sample is None else (sample.rho, sample.sigma)
        parameters = PenaltyParameter(self.rho or rho), PenaltyParameter(self.sigma or sigma)
        dual = torch.zeros_like(V)
        lead = max(1.0, program.fit.size / program.fit.scale) ** 0.25
        nothing = torch.zeros(0)
        state = _State(samples, penalty, d, gram, lead, lead, *parameters, V, dual, q, V, XU, work, nothing, nothing)
        if sample is not None:
            state.dual = sample.A.to(d) / d / state.sigma.weight
            for block in samples:
                qb = q[block.rows]
                qb.add_(block.fit.residual(qb), alpha=sample.slope / state.rho.weight)
        elif start is not None and start.multipliers is not None:
            self._adopt(state, start.multipliers)
        state.sums, state.inverse = samples.sums(q), self._inverse(state)
        state.scale = math.log(program.fit.scale)
        return state

    def retarget(self, state: _State, program: LayerProgram) -> _State | None:
        """The state made to go on with another fit of the same samples and penalty: nothing is factorised again.

        From the third fit on, everything is first moved on along the line through the last two, in the logarithm of the
        fit's scale.
        """
        last, state.last = state.last, _Snapshot.of(state)
        state.samples = Samples.of(program, state.q.dtype)
        state.lead = state.first_lead = max(1.0, program.fit.size / program.fit.scale) ** 0.25
        if last is not None:
            state.last.extrapolate(state, last, math.log(program.fit.scale))
        state.scale = math.log(program.fit.scale)
        state.sums = state.samples.sums(state.q)
        state.iteration, state.due = 0, 10
        return state

    def step(self, state: _State) -> None:
        """Least squares for V, then both proxes; penalties are reviewed at measured iterations."""
        state.iteration += 1
        measured = state.iteration % 10 == 0
        sigma, a = state.sigma.weight, self.relaxation

        def reflected(block: Block) -> Tensor:
            """Z + dual − XU = q − 2 pull(q) − XU."""
            qb, r = state.q[block.rows], state.pull(block)
            if measured:
                torch.sub(qb, r, out=state.work[block.rows])
            return torch.sub(qb, r, alpha=2, out=r).sub_(state.XU[block.rows])

        # V moves by what its optimality lacks: rounding of the inverse then shrinks with the steps.
        lacking = state.samples.adjoint(reflected, state.T).div_(state.d)
        lacking.add_(state.T + state.dual - state.V, alpha=sigma / state.rho.weight)
        state.V = V = state.V + state.inverse @ lacking
        U, sums = V / state.d, torch.zeros_like(state.sums)
        for block in state.samples:
            # a·XU + (1 − a)·Z − dual, the next q, with Z = q + dual
            qb, r = state.q[block.rows], state.pull(block)
            XU = torch.mm(block.inputs(qb), U, out=state.XU[block.rows])
            qb.mul_(1 - a).add_(r, alpha=a).add_(XU, alpha=a)
            sums += block.fit.sums(qb)
        state.sums = sums
        relaxed = a * V + (1 - a) * state.T - state.dual
        T = state.penalty.prox(relaxed, 1 / sigma)
        dual = T - relaxed
        if measured:
            self._measure(state, T, dual)
        state.T, state.dual = T, dual
        if measured and state.iteration >= state.due:
            self._review(state)

    def steer(self, state: _State, excess: Excess) -> None:
        """Keep the primal residual of Z = XU smaller the more violation is what the certificate lacks."""
        if state.iteration < _TRANSIENT or not (0 < excess.gap < math.inf and excess.violation < math.inf):
            return
        factor = min(max(math.sqrt(excess.violation / excess.gap), 1 / _STEER), _STEER)
        state.lead = min(max(state.lead * factor, 1.0), _MOST * state.first_lead)

    def residuals(self, state: _State) -> Mapping[str, float]:
        """Primal and dual residual of each constraint, relative."""
        if math.isinf(state.rho.primal):  # they are measured every tenth iteration
            return {}
        rho, sigma = state.rho, state.sigma
        return {"primal Z": rho.primal, "dual Z": rho.change, "primal T": sigma.primal, "dual T": sigma.change}

    def finish(self, state: _State) -> tuple[Tensor, Tensor]:
        """The sparse iterate T, restored towards feasibility, in the caller's units; and the multipliers of Z = XU.

        The multipliers are the state's own memory, and hold until the next step.
        """
        weights = self._restored(state) / state.d
        for block in state.samples:
            torch.mul(state.pull(block), state.rho.weight, out=state.work[block.rows])
        return weights, state.work

    def effective(self, state: _State) -> Mapping[str, Any]:
        """The penalties at the end."""
        return {"rho": state.rho.weight, "sigma": state.sigma.weight, "iterate dtype": str(state.q.dtype)}

    def _lengths(self, program: LayerProgram, gram: Tensor) -> Tensor:
        """d [N, 1], what the columns of X are divided by: their lengths, somewhat more for those of a low price.

        The price of input j is what an output of unit length costs through it, in units of the median input's.
        """
        length = gram.diagonal().clamp(min=0).sqrt()[:, None]
        length = torch.where(length > 0, length, 1.0)
        price = program.penalty.to(gram).cost(program.shape).to(gram).mean(1, keepdim=True) / length
        paid = price > 0
        relative = torch.where(paid, price / price[paid].median(), 1.0) if bool(paid.any()) else torch.ones_like(price)
        return length * relative**self.evening

    def _first(self, samples: Samples, gram: Tensor, d: Tensor, start: Start | None) -> Tensor:
        """Scaled variables [N, M] to start from: the caller's, or a lightly damped least squares fit of the targets."""
        if start is not None:
            return start.weights.to(d) * d
        damping = 1e-3 * gram.diagonal().clamp(min=_TINY)
        like = d.new_empty(len(d), samples.blocks[0].fit.shape[1])
        moment = samples.adjoint(lambda block: block.fit.anchor, like).div_(d)
        solution: Tensor = torch.linalg.solve(gram + torch.diag(damping), moment.to(gram))
        return solution.to(d)

    def _parameters(self, V: Tensor, Z: Tensor, penalty: Penalty) -> tuple[float, float]:
        """Multiplier size over primal size for each constraint, from g(V) ≈ ⟨Λ, Z⟩ ≈ ⟨M, V⟩ at an optimum."""
        cost = float(penalty.value(V))
        return cost / max(_norm(Z) ** 2, _TINY) or 1.0, cost / max(_norm(V) ** 2, _TINY) or 1.0

    def _on_sample(self, program: LayerProgram) -> "_Sampled | None":
        """Some iterations on every k-th sample, of which there should be twice as many as inputs; None if k < 4."""
        P, N = program.samples, program.shape[0]
        every = P // max(2 * N, P // 8, 256)
        if every < 4 or self.sampled == 0:
            return None
        rows = slice(None, None, every)
        part = LayerProgram(program.inputs[rows], program.fit.sample(rows), program.penalty)
        state = self.init(part, None)
        for _ in range(self.sampled):
            self.step(state)
        # Λ is ∂f(XU), for ours a multiple of the residual, but where the fit has bounds; its entries become smaller as
        # samples become more, so that XᵀΛ stays.
        share, Z = len(part.inputs) / P, state.samples.outputs(state.T / state.d, state.work)
        lengths = [(_norm(state.pull(b)), _norm(b.fit.residual(Z[b.rows]))) for b in state.samples]
        pulls, residuals = (math.hypot(*column) for column in zip(*lengths, strict=True))
        rho, sigma = state.rho.weight * share, state.sigma.weight
        return _Sampled(
            state.T / state.d,
            state.dual * state.d * sigma,
            rho,
            sigma * share,
            pulls * rho / max(residuals, _TINY),
        )

    def _adopt(self, state: _State, multipliers: Tensor) -> None:
        """Start from multipliers Λ: both duals follow from them."""
        like = state.T
        state.dual = state.samples.adjoint(lambda block: multipliers[block.rows].to(like), like)
        state.dual.div_(state.d).div_(state.sigma.weight)
        for block in state.samples:
            state.q[block.rows].add_(multipliers[block.rows].to(like), alpha=1 / state.rho.weight)

    def _restored(self, state: _State) -> Tensor:
        """T moved along its own support to the boundary of the fit's set, by Polyak's step on the distance to the set.

        The primal residual of ADMM leaves XT a little outside. At an optimum XᵀΛ is the same multiple of the penalty's
        gradient on the whole support, so to first order every way back along it costs the same. A step that does not
        halve the distance is taken back: there may be no way, or no set.
        """
        T = before = state.T
        support, last = T != 0, math.inf
        samples, XT = state.samples, state.work
        for step in range(self.restorations + 1):
            samples.outputs(T / state.d, XT)
            sums = samples.sums(XT)
            distance = samples.blocks[0].fit.distance(sums)
            if distance > 0.5 * last:
                return before
            if step == self.restorations or distance <= _TINY:
                break
            outside = samples.adjoint(lambda b, sums=sums: b.fit.pull(XT[b.rows], sums, math.inf), T)  # type: ignore[misc]
            gradient = outside.div_(state.d).mul_(support)
            length = _norm(gradient)
            if length <= _TINY:
                break
            before, last = T, distance
            T = T.sub(gradient, alpha=(distance / length) ** 2)
        return T

    def _inverse(self, state: _State) -> Tensor:
        """(gram + sigma/rho·I)⁻¹ in float64, rounded once."""
        ratio = max(state.sigma.weight / state.rho.weight, 1e-12 * float(state.gram.diagonal().max()))
        shifted = state.gram + ratio * torch.eye(len(state.gram), dtype=torch.float64, device=state.gram.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(state.q)

    def _measure(self, state: _State, T: Tensor, dual: Tensor) -> None:
        """Residuals of both constraints; the work array holds Z before this iteration."""
        squares, V = torch.zeros(5, dtype=torch.float64, device=T.device), state.V
        for block in state.samples:
            r, before, XU = state.pull(block), state.work[block.rows], state.XU[block.rows]
            Z = state.q[block.rows] - r
            squares += torch.stack([norm(A) for A in (XU, Z, XU - Z, Z - before, r)]).square()
        XU_, Z_, apart, moved, r_ = squares.sqrt().tolist()
        state.rho.measure(max(XU_, Z_), apart, moved, r_)
        state.sigma.measure(max(_norm(V), _norm(T)), _norm(V - T), _norm(T - state.T), _norm(dual))

    def _review(self, state: _State) -> None:
        """Change penalties that are out of balance, keeping the multipliers."""
        # Every change of a penalty sets ADMM back, so changes come ever more rarely: else it can cycle for ever.
        state.due = state.iteration + max(10, state.iteration // 4)
        threshold, rho = math.log(self.balance), state.rho.weight
        by, for_T = state.rho.rebalance(threshold, state.lead), state.sigma.rebalance(threshold)
        state.dual = state.dual / for_T
        if by != 1:
            for block in state.samples:
                qb = state.q[block.rows]
                qb.sub_(block.fit.pull(qb, state.sums, rho), alpha=1 - 1 / by)
            state.sums = state.samples.sums(state.q)
        if by != 1 or for_T != 1:
            state.inverse = self._inverse(state)


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Where a state has come to, in units that do not depend on its parameters."""

    scale: float
    primal: tuple[Tensor, Tensor, Tensor, Tensor]  # V, T, XU, Z
    dual: tuple[Tensor, Tensor]  # of T = V and of Z = XU

    @classmethod
    def of(cls, state: _State) -> "_Snapshot":
        r = torch.empty_like(state.q)
        for block in state.samples:
            r[block.rows] = state.pull(block)
        primal = (state.V, state.T, state.XU.clone(), state.q - r)
        return cls(state.scale, primal, (state.dual * state.sigma.weight, r.mul_(state.rho.weight)))

    def extrapolate(self, state: _State, last: "_Snapshot", scale: float) -> None:
        """Set the state to this + step·(this − last) at the new scale."""
        step = (scale - self.scale) / (self.scale - last.scale) if self.scale != last.scale else 0.0
        step = min(max(step, 0.0), 1.5)
        moved = [torch.lerp(b, a, 1 + step) for a, b in zip(self.primal, last.primal, strict=True)]
        M, L = (torch.lerp(b, a, 1 + step) for a, b in zip(self.dual, last.dual, strict=True))
        state.V, state.T, state.XU, Z = moved
        state.dual = M / state.sigma.weight
        state.q = Z.add_(L, alpha=1 / state.rho.weight)


@dataclass(frozen=True, eq=False)
class _Sampled:
    """What a run on some of the samples says about all of them, in the caller's units."""

    weights: Tensor  # U [N, M]
    A: Tensor  # XᵀΛ [N, M]
    rho: float
    sigma: float
    slope: float  # Λ over the residual


def _norm(A: Tensor) -> float:
    return float(norm(A))
