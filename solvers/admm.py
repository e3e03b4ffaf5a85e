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

from convexprune.solvers.arrays import as_number, checked_dtype, checked_positive, norm
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.fits import Fit
from convexprune.solvers.interface import IterativeSolver, Start
from convexprune.solvers.penalties import Penalty
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import register

__all__ = ["ADMM", "gram_matrix"]

_TINY = 1e-30


@dataclass
class _Block:
    """One constraint: its value in the splitting variable, its scaled dual, its penalty, its last residuals."""

    value: Tensor
    dual: Tensor  # multiplier / weight
    weight: float  # the penalty parameter
    primal: float = math.inf  # ‖constraint‖ relative to the larger of its two sides
    change: float = math.inf  # weight·‖change of value‖ relative to the multiplier

    imbalance: list[float] = field(default_factory=list)  # ½ log(primal/change), since the penalty was last reviewed

    def rebalance(self, threshold: float) -> bool:
        """Change the penalty, keeping the multiplier, if the mean imbalance is beyond the threshold."""
        mean = sum(self.imbalance) / len(self.imbalance)
        self.imbalance.clear()
        if abs(mean) <= threshold:
            return False
        factor = min(max(math.exp(mean), 0.2), 5.0)
        self.weight *= factor
        self.dual /= factor
        return True


@dataclass
class _State:
    X: Tensor
    fit: Fit
    penalty: Penalty  # of the scaled variables
    d: Tensor  # column norms of X [N, 1]: U = V/d for the scaled variables V
    gram: Tensor  # of the scaled columns, float64
    Z: _Block
    T: _Block
    inverse: Tensor  # (gram + sigma/rho I)⁻¹
    work: Tensor  # a [P, M] buffer
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

    def refuses(self, program: LayerProgram) -> str | None:  # noqa: ARG002
        """None: whatever has a prox can be taken."""
        return None

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """Scale, factorise, and find a start and penalties of the right size."""
        program = program.to(self.dtype or program.dtype)
        X, fit = program.inputs, program.fit
        gram = gram_matrix(X)
        d = gram.diagonal().sqrt()[:, None]
        d = torch.where(d > 0, d, 1.0)
        gram /= d * d.T
        d = d.to(X)
        penalty = program.penalty.rescaled(d)
        V = self._start(X, fit, gram, d, start)
        Z = X @ (V / d)
        rho, sigma = self._penalties(V, Z, penalty)
        multipliers = None if start is None else start.multipliers
        dual = torch.zeros_like(Z) if multipliers is None else multipliers.to(Z) / -rho
        state = _State(
            X, fit, penalty, d, gram, _Block(Z, dual, rho), _Block(V, torch.zeros_like(V), sigma), gram, dual.clone()
        )
        if multipliers is not None:
            state.T.dual = (X.T @ state.Z.dual) / d * (-rho / sigma)
        state.inverse = self._inverse(state)
        return state

    def step(self, state: _State) -> None:
        """Least squares for U, then the two proxes; penalties are balanced every tenth iteration."""
        X, d, Z, T, work, a = state.X, state.d, state.Z, state.T, state.work, self.relaxation
        torch.add(Z.value, Z.dual, out=work)
        moment = (X.T @ work).div_(d).add_(T.value + T.dual, alpha=T.weight / Z.weight)
        V = state.inverse @ moment
        torch.mm(X, V / d, out=work)
        state.iteration += 1
        measured = (work.clone(), V, Z.value, T.value) if state.iteration % 10 == 0 else None
        work.mul_(a).add_(Z.value, alpha=1 - a).sub_(Z.dual)
        relaxed = a * V + (1 - a) * T.value - T.dual
        Z.value = state.fit.prox(work, Z.weight)
        T.value = state.penalty.prox(relaxed, 1 / T.weight)
        torch.sub(Z.value, work, out=Z.dual)
        torch.sub(T.value, relaxed, out=T.dual)
        if measured is not None:
            self._balance(state, *measured)

    def residuals(self, state: _State) -> Mapping[str, float]:
        """Primal and dual residual of each constraint, relative."""
        if state.iteration < 10:  # they are measured every tenth iteration
            return {}
        return {
            "primal Z": state.Z.primal,
            "dual Z": state.Z.change,
            "primal T": state.T.primal,
            "dual T": state.T.change,
        }

    def finish(self, state: _State) -> tuple[Tensor, Tensor]:
        """The sparse iterate T, restored towards feasibility, in the caller's units; and the multipliers of Z = XU."""
        return self._restored(state) / state.d, state.Z.dual * -state.Z.weight

    def effective(self, state: _State) -> Mapping[str, Any]:
        """The penalties at the end."""
        return {"rho": state.Z.weight, "sigma": state.T.weight, "iterate dtype": str(state.X.dtype)}

    def _start(self, X: Tensor, fit: Fit, gram: Tensor, d: Tensor, start: Start | None) -> Tensor:
        """Scaled variables [N, M] to start from: the caller's, or a lightly damped least squares fit of the targets."""
        if start is not None:
            return start.weights.to(X) * d
        ridge = gram + 1e-3 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        moment = (X.T @ fit.anchor) / d
        start_weights: Tensor = torch.linalg.solve(ridge, moment.to(gram))
        return start_weights.to(X)

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
        T = before = state.T.value
        support, last = T != 0, math.inf
        for step in range(self.restorations + 1):
            XT = torch.mm(state.X, T / state.d, out=state.work)
            outside = XT - state.fit.prox(XT, state.Z.weight)
            distance = _norm(outside)
            if distance > 0.5 * last:
                return before
            if step == self.restorations:
                break
            gradient = (state.X.T @ outside).div_(state.d).mul_(support)
            length = _norm(gradient)
            if length <= _TINY:
                break
            before, last = T, distance
            T = T.sub(gradient, alpha=(distance / length) ** 2)
        return T

    def _inverse(self, state: _State) -> Tensor:
        """(gram + sigma/rho·I)⁻¹ in float64, rounded once."""
        ratio = max(state.T.weight / state.Z.weight, 1e-12)
        shifted = state.gram + ratio * torch.eye(len(state.gram), dtype=torch.float64, device=state.gram.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(state.X)

    def _balance(self, state: _State, XV: Tensor, V: Tensor, Z_before: Tensor, T_before: Tensor) -> None:
        """Relative residuals of both constraints; when it is time, penalties that are out of balance are changed."""
        blocks = ((state.Z, XV, Z_before), (state.T, V, T_before))
        for block, other, before in blocks:
            block.primal = _distance(other, block.value) / max(_norm(other), _norm(block.value), _TINY)
            block.change = _distance(block.value, before) / max(_norm(block.dual), _TINY)
            block.imbalance.append(0.5 * math.log(max(block.primal, _TINY) / max(block.change, _TINY)))
        if state.iteration < state.due:
            return
        # Every change of a penalty sets ADMM back, so changes come ever more rarely: else it can cycle for ever.
        state.due = state.iteration + max(10, state.iteration // 4)
        changed = [block.rebalance(math.log(self.balance)) for block, _, _ in blocks]
        if any(changed):
            state.inverse = self._inverse(state)


def gram_matrix(X: Tensor) -> Tensor:
    """XᵀX in float64, by blocks of rows so that X is never copied whole."""
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    rows = max(1, 2**22 // X.shape[1])
    for first in range(0, len(X), rows):
        wide = X[first : first + rows].to(torch.float64)
        gram.addmm_(wide.T, wide)
    return gram


def _norm(A: Tensor) -> float:
    return float(norm(A))


def _distance(A: Tensor, B: Tensor) -> float:
    return float(norm(A - B))
