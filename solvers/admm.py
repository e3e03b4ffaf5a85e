"""The custom ADMM: graph form, column scaling, two balanced penalties, over-relaxation.

minimise g(T) + f(Z)  subject to  Z = XU,  T = U

by ADMM on the pairs (U) and (Z, T) (Parikh & Boyd, "Block splitting for distributed optimization", 2014), with one
penalty parameter for each constraint: rho for Z = XU and sigma for T = U.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import as_number, blocks_of, checked_dtype, checked_positive, norm
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.fits import Fit
from convexprune.solvers.interface import IterativeSolver, Start
from convexprune.solvers.penalties import Penalty
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import register

__all__ = ["ADMM", "gram_matrix"]

_TINY = 1e-30


@dataclass
class _Penalty:
    """The penalty parameter of one constraint, and its residuals: relative, and since when it was last reviewed."""

    weight: float
    primal: float = math.inf  # ‖constraint‖ relative to the larger of its two sides
    change: float = math.inf  # weight·‖change of the splitting variable‖ relative to the multiplier
    imbalance: list[float] = field(default_factory=list)  # ½ log(primal/change)

    def measure(self, sides: tuple[float, float], gap: float, moved: float, dual: float) -> None:
        """Norms of both sides of the constraint, of their difference, of the change, and of the scaled dual."""
        self.primal, self.change = gap / max(*sides, _TINY), moved / max(dual, _TINY)
        self.imbalance.append(0.5 * math.log(max(self.primal, _TINY) / max(self.change, _TINY)))

    def rebalance(self, threshold: float) -> float:
        """Change the penalty if the mean imbalance is beyond the threshold; the factor, 1 if it stays."""
        mean = sum(self.imbalance) / len(self.imbalance)
        self.imbalance.clear()
        if abs(mean) <= threshold:
            return 1.0
        factor = min(max(math.exp(mean), 0.2), 5.0)
        self.weight *= factor
        return factor


@dataclass(frozen=True, eq=False)
class _Samples:
    """A block of samples; X and the targets in the caller's own precision."""

    rows: slice
    X: Tensor
    fit: Fit

    def inputs(self, like: Tensor) -> Tensor:
        return self.X.to(like.dtype)


@dataclass
class _State:
    """Z and its scaled dual are known by their sum: q = Z − dual, Z = prox(q), so r = q − Z is −dual."""

    blocks: list[_Samples]
    penalty: Penalty  # of the scaled variables
    d: Tensor  # column norms of X [N, 1]: U = V/d for the scaled variables V
    gram: Tensor  # of the scaled columns, float64
    q: Tensor  # [P, M]
    sums: Tensor  # the fit's, of q
    T: Tensor  # [N, M], sparse
    dual: Tensor  # of T = V, scaled
    rho: _Penalty
    sigma: _Penalty
    inverse: Tensor  # (gram + sigma/rho I)⁻¹
    work: tuple[Tensor, Tensor]  # [P, M] each
    iteration: int = 0
    due: int = 10  # the iteration at which the penalties are reviewed next


@register("admm")
@dataclass(frozen=True)
class ADMM(IterativeSolver[_State]):
    """Our ADMM: any fit and penalty with a prox, on the device of the data.

    Columns of X are scaled to unit norm implicitly, so X is never copied in its own precision. rho and sigma start from
    the size of a ridge solution (or of the start) and are then balanced: each is multiplied by the square root of the
    ratio of its constraint's relative primal and dual residuals whenever that is off by more than ``balance``.

    Args:
        relaxation: Over-relaxation in (0, 2).
        rho: Initial penalty of Z = XU in the caller's units, or None to derive it.
        sigma: Initial penalty of T = U in scaled units, or None to derive it.
        balance: Factor ≥ 1 that residuals may be out of balance; infinite keeps the penalties fixed.
        restorations: Steps that move the sparse iterate along its support back to the fit's set when it is judged.
        dtype: torch.float32 or torch.float64 for the iterations; None: the program's own.
    """

    relaxation: float = 1.7
    rho: float | None = None
    sigma: float | None = None
    balance: float = 1.2
    restorations: int = 2
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < as_number("relaxation", self.relaxation) < 2:
            raise InvalidTolerance(f"relaxation: expected a number strictly between 0 and 2, found {self.relaxation}")
        if not as_number("balance", self.balance) >= 1:
            raise InvalidTolerance(f"balance: expected a factor ≥ 1, found {self.balance}")
        for name, value in (("rho", self.rho), ("sigma", self.sigma)):
            if value is not None:
                checked_positive(name, value)
        if not (isinstance(self.restorations, int) and self.restorations >= 0):
            raise InvalidTolerance(f"restorations: expected a whole number ≥ 0, found {self.restorations!r}")
        checked_dtype(self.dtype)

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None: whatever is convex and has a prox can be."""
        if program.penalty.convex:
            return None
        return f"{type(program.penalty).__name__} is not convex; the solver 'continuation' takes it"

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """Factorise, and find a start and penalties of the right size. Nothing of X is copied."""
        X, dtype = program.inputs, self.dtype or program.dtype
        gram = gram_matrix(X)
        d = gram.diagonal().sqrt()[:, None]
        d = torch.where(d > 0, d, 1.0)
        gram /= d * d.T
        d = d.to(dtype)
        penalty = program.penalty.rescaled(d)
        blocks = _blocks(program, dtype)
        V = self._start(blocks, gram, d, start)
        q = X.new_empty(program.fit.shape, dtype=dtype)
        for block in blocks:
            torch.mm(block.inputs(q), V / d, out=q[block.rows])
        rho, sigma = self._penalties(V, q, penalty)
        dual = torch.zeros_like(V)
        if start is not None and start.multipliers is not None:
            dual = sum(block.inputs(q).T @ start.multipliers[block.rows].to(q) for block in blocks) / d / sigma
            q.add_(start.multipliers.to(q), alpha=1 / rho)
        state = _State(
            *(blocks, penalty, d, gram, q, torch.zeros(0), V, dual, _Penalty(rho), _Penalty(sigma), gram),
            work=(torch.empty_like(q), torch.empty_like(q)),
        )
        state.sums = _sums(state, q)
        state.inverse = self._inverse(state)
        return state

    def step(self, state: _State) -> None:
        """Least squares for V, then both proxes; penalties are reviewed at measured iterations."""
        state.iteration += 1
        measured = state.iteration % 10 == 0
        rho, sigma, a, q = state.rho.weight, state.sigma.weight, self.relaxation, state.q
        moment = torch.zeros_like(state.T)
        for block in state.blocks:
            qb = q[block.rows]
            r = block.fit.pull(qb, state.sums, rho)
            if measured:
                torch.sub(qb, r, out=state.work[0][block.rows])
            moment.addmm_(block.inputs(q).T, torch.sub(qb, r, alpha=2, out=r))
        V = state.inverse @ moment.div_(state.d).add_(state.T + state.dual, alpha=sigma / rho)
        W, sums, before = V / state.d, 0.0, state.sums
        for block in state.blocks:
            qb = q[block.rows]
            r = block.fit.pull(qb, before, rho)
            XW = torch.mm(block.inputs(q), W, out=state.work[1][block.rows] if measured else None)
            qb.mul_(1 - a).add_(r, alpha=a).add_(XW, alpha=a)
            sums = sums + block.fit.sums(qb).to(torch.float64)
        relaxed = a * V + (1 - a) * state.T - state.dual
        T, state.sums = state.penalty.prox(relaxed, 1 / sigma), sums
        if measured:
            self._measure(state, V, T, T - relaxed)
        state.T, state.dual = T, T - relaxed
        if measured and state.iteration >= state.due:
            self._review(state)

    def residuals(self, state: _State) -> Mapping[str, float]:
        """Primal and dual residual of each constraint, relative."""
        if state.iteration < 10:  # they are measured every tenth iteration
            return {}
        return {
            "primal Z": state.rho.primal,
            "dual Z": state.rho.change,
            "primal T": state.sigma.primal,
            "dual T": state.sigma.change,
        }

    def finish(self, state: _State) -> tuple[Tensor, Tensor]:
        """The sparse iterate T, restored towards feasibility, in the caller's units; and the multipliers of Z = XU."""
        weights = self._restored(state) / state.d
        multipliers = torch.empty_like(state.q)
        for block in state.blocks:
            r = block.fit.pull(state.q[block.rows], state.sums, state.rho.weight)
            torch.mul(r, state.rho.weight, out=multipliers[block.rows])
        return weights, multipliers

    def effective(self, state: _State) -> Mapping[str, Any]:
        """The penalties at the end."""
        return {"rho": state.rho.weight, "sigma": state.sigma.weight, "iterate dtype": str(state.q.dtype)}

    def _start(self, blocks: list[_Samples], gram: Tensor, d: Tensor, start: Start | None) -> Tensor:
        """Scaled variables [N, M] to start from: the caller's, or a lightly damped least squares fit of the targets."""
        if start is not None:
            return start.weights.to(d) * d
        ridge = gram + 1e-3 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        moment = sum(block.inputs(d).T @ block.fit.anchor for block in blocks) / d
        start_weights: Tensor = torch.linalg.solve(ridge, moment.to(gram))
        return start_weights.to(d)

    def _penalties(self, V: Tensor, Z: Tensor, penalty: Penalty) -> tuple[float, float]:
        """Multiplier size over primal size for each constraint, from g(V) ≈ ⟨Λ, Z⟩ ≈ ⟨M, V⟩ at an optimum."""
        cost = float(penalty.value(V))
        rho, sigma = cost / max(_norm(Z) ** 2, _TINY), cost / max(_norm(V) ** 2, _TINY)
        return self.rho or rho or 1.0, self.sigma or sigma or 1.0

    def _restored(self, state: _State) -> Tensor:
        """T moved along its own support to the boundary of the fit's set, by Polyak's step on the distance to the set.

        The primal residual of ADMM leaves XT a little outside. At an optimum XᵀΛ is the same multiple of the penalty's
        gradient on the whole support, so to first order every way back along it costs the same. A step that does not
        halve the distance is taken back: there may be no way, or no set.
        """
        T = before = state.T
        support, last = T != 0, math.inf
        for step in range(self.restorations + 1):
            XT, W = state.work[0], T / state.d
            for block in state.blocks:
                torch.mm(block.inputs(XT), W, out=XT[block.rows])
            sums = _sums(state, XT)
            distance = state.blocks[0].fit.distance(sums)
            if distance > 0.5 * last:
                return before
            if step == self.restorations or distance <= _TINY:
                break
            gradient = torch.zeros_like(T)
            for block in state.blocks:
                gradient.addmm_(block.inputs(XT).T, block.fit.pull(XT[block.rows], sums, math.inf))
            gradient.div_(state.d).mul_(support)
            length = _norm(gradient)
            if length <= _TINY:
                break
            before, last = T, distance
            T = T.sub(gradient, alpha=(distance / length) ** 2)
        return T

    def _inverse(self, state: _State) -> Tensor:
        """(gram + sigma/rho·I)⁻¹ in float64, rounded once."""
        ratio = max(state.sigma.weight / state.rho.weight, 1e-12)
        shifted = state.gram + ratio * torch.eye(len(state.gram), dtype=torch.float64, device=state.gram.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(state.q)

    def _measure(self, state: _State, V: Tensor, T: Tensor, dual: Tensor) -> None:
        """Residuals of both constraints, from Z before this iteration and XV, which the work arrays hold."""
        squares = torch.zeros(5, dtype=torch.float64, device=V.device)
        before, XV = state.work
        for block in state.blocks:
            r = block.fit.pull(state.q[block.rows], state.sums, state.rho.weight)
            Z = state.q[block.rows] - r
            parts = (XV[block.rows], Z, XV[block.rows] - Z, Z - before[block.rows], r)
            squares += torch.stack([norm(part) for part in parts]).square()
        XV_, Z_, gap, moved, r_ = squares.sqrt().tolist()
        state.rho.measure((XV_, Z_), gap, moved, r_)
        sides = (_norm(V), _norm(T))
        state.sigma.measure(sides, _norm(V - T), _norm(T - state.T), _norm(dual))

    def _review(self, state: _State) -> None:
        """Change penalties that are out of balance, keeping the multipliers."""
        # Every change of a penalty sets ADMM back, so changes come ever more rarely: else it can cycle for ever.
        state.due = state.iteration + max(10, state.iteration // 4)
        threshold, rho = math.log(self.balance), state.rho.weight
        by, dual = state.rho.rebalance(threshold), state.sigma.rebalance(threshold)
        state.dual = state.dual / dual
        if by != 1:
            for block in state.blocks:
                qb = state.q[block.rows]
                qb.sub_(block.fit.pull(qb, state.sums, rho), alpha=1 - 1 / by)
            state.sums = _sums(state, state.q)
        if by != 1 or dual != 1:
            state.inverse = self._inverse(state)


def _blocks(program: LayerProgram, dtype: torch.dtype) -> list[_Samples]:
    X, fit = program.inputs, program.fit
    blocks = []
    for rows in blocks_of(X, program.shape[1]):
        part = fit.map(lambda array, rows=rows: array[rows].to(dtype))  # type: ignore[misc]
        blocks.append(_Samples(rows, X[rows], part))
    return blocks


def _sums(state: _State, Z: Tensor) -> Tensor:
    parts = [block.fit.sums(Z[block.rows]).to(torch.float64) for block in state.blocks]
    return torch.stack(parts).sum(0)


def gram_matrix(X: Tensor) -> Tensor:
    """XᵀX in float64, by blocks of rows so that X is never copied whole."""
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks_of(X):
        wide = X[rows].to(torch.float64)
        gram.addmm_(wide.T, wide)
    return gram


def _norm(A: Tensor) -> float:
    return float(norm(A))
