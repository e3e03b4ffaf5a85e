"""ADMM on the Gram, for fits that see the weights through ‖XU − Y‖ alone: an iteration costs the same for any P.

minimise g(T) + f(XU)  subject to  T = U

Unlike ``admm`` it does not split Z = XU off: the prox of U ↦ f(XU) is one product with (I + νXᵀX)⁻¹ for a squared
loss. For a ball ν is the root of a scalar equation in the eigenbasis of XᵀX (Reinsch, "Smoothing by spline functions
II", 1971; Moré & Sorensen, "Computing a trust region step", 1983). See docs/quadratic.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from convexprune.solvers.arrays import as_number, blocks_of, checked_positive, norm
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.methods.curvature import Quadratic
from convexprune.solvers.methods.interface import Start
from convexprune.solvers.methods.iterate import PenaltyParameter, interpolated
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.normal import LowRank, Operator
from convexprune.solvers.methods.packages import Clarabel
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import Ball, LayerProgram, Penalty, SquaredLoss
from convexprune.solvers.programs.claims import is_plain

_TINY = 1e-300
_LOSS = 0.3  # initial sigma over the weight of a loss, the Gram's diagonal having mean 1
_TOLERATED = 1.5  # by what factor sigma may be out of balance
_RANK = 1e-14  # of the largest eigenvalue, for each input; smaller ones are taken for rounding
_SHARP = 1e-9  # of ‖Y‖: shorter distances drown in the rounding of ‖XU − Y‖² as a difference of squares
_NEWTON = 60  # steps at most; 2 or 3 are usual once ν is known, 7 from zero


class Eigenbasis:
    """‖XU − Y‖² as a function of the scaled variables V = diag(d)U, all in float64.

    By one pass over the samples and one eigendecomposition; d_j is in proportion to ‖x_j‖^scaling.
    """

    def __init__(self, program: LayerProgram, scaling: float) -> None:
        model = Quadratic(program)
        length2 = model.gram.diagonal()[:, None].clamp(min=0)
        d = torch.where(length2 > 0, length2.clamp(min=_TINY) ** (scaling / 2), 1.0)
        d *= float((length2 / d.square()).mean()) ** 0.5 or 1.0
        self.d = d  # [N, 1], such that the Gram of X/d has a diagonal of mean 1
        self.gram, self.moment = model.gram.scaled(d), model.moment / d  # (X/d)ᵀ(X/d) [N, N], (X/d)ᵀY [N, M]
        values, vectors = self.gram.eigen()
        kept = values > _RANK * len(d) * values.max()
        self.values, self.vectors = values[kept, None], vectors[:, kept]  # λ [r, 1] beyond rounding, Q [N, r]
        self.rotated = self.vectors.T @ self.moment  # [r, M]
        self.square = model.square  # ‖y_m‖² [M]
        # [M], the squared distances of the targets from the span of the inputs.
        self.rest = (model.square - (self.rotated.square() / self.values).sum(0)).clamp(min=0)

    def gradient(self, V: Tensor) -> Tensor:
        """[N, M], that of ½‖XU − Y‖²."""
        return self.gram @ V - self.moment

    def distances(self, V: Tensor, gradient: Tensor) -> Tensor:
        """‖XU − Y‖² neuron by neuron, [M]."""
        return ((V * (gradient - self.moment)).sum(0) + self.square).clamp(min=0)

    def resolvent(self, nu: float) -> Operator:
        """(I + ν·gram)⁻¹."""
        share = nu * self.values / (1 + nu * self.values)
        if 2 * len(share) < len(self.d):
            return LowRank(1.0, self.vectors, -share)
        matrix = (self.vectors * -share.T) @ self.vectors.T
        matrix.diagonal().add_(1)
        return matrix

    def ridge(self, nu: float) -> Tensor:
        """(I + ν·gram)⁻¹·ν·moment [N, M]: the minimiser of ½ν‖XU − Y‖² + ½‖V‖²."""
        return self.vectors @ (nu / (1 + nu * self.values) * self.rotated)

    def project(self, q: Tensor, radii: float | Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest V = q − ν·gradient(V) to q [N, M] with XU in the balls; and ν ≥ 0, sought from the one given."""
        rotated = self.vectors.T @ q
        slope = self.values * rotated - self.rotated
        squares = slope.square() / self.values
        if isinstance(radii, Tensor):
            radius2, rest, square = radii.square(), self.rest, self.square
        else:
            squares = squares.sum(1, keepdim=True)
            radius2, rest, square = q.new_tensor([radii**2]), self.rest.sum(), self.square.sum()
        nu = self._root(squares, torch.maximum(radius2 - rest, _SHARP**2 * square), nu)
        return q - self.vectors @ (slope * (nu / (1 + nu * self.values))), nu

    def _root(self, squares: Tensor, goal2: Tensor, nu: Tensor) -> Tensor:
        """The least ν ≥ 0 with Σ_j squares_j/(1 + νλ_j)² ≤ goal2, for each column of squares.

        The sum to the power −½ is a power mean, of exponent −2, of numbers that are linear in ν, so it is concave:
        wherever Newton's method begins, its first step ends left of the root, and from there it climbs.
        """
        goal = goal2.clamp(min=_TINY).sqrt()
        for _ in range(_NEWTON):
            grown = 1 + nu * self.values
            parts = squares / grown.square()
            size2, fall = parts.sum(0), (parts * self.values / grown).sum(0)
            move = size2 * (size2.sqrt() / goal - 1) / fall.clamp(min=_TINY)
            before, nu = nu, torch.where(fall > 0, (nu + move).clamp(min=0), 0.0)
            if bool(((nu - before).abs() <= 1e-13 * before).all()):
                break
        return nu


@dataclass
class _State:
    program: LayerProgram
    fit: Ball | SquaredLoss
    basis: Eigenbasis
    penalty: Penalty  # of the scaled variables
    sigma: PenaltyParameter  # of T = U
    T: Tensor  # [N, M], sparse
    dual: Tensor  # of T = V, scaled
    V: Tensor
    price: Tensor  # μ, [1] or [M]: the multiplier of ½‖XU − Y‖²
    resolvent: Operator | None = None  # of a squared loss, V = resolvent @ q + ridge
    ridge: Tensor | float = 0.0
    iteration: int = 0
    due: int = 10  # the iteration at which sigma is reviewed next


@register("quadratic")
@dataclass(frozen=True)
class QuadraticADMM(IterativeSolver[_State]):
    """Our ADMM on the Gram: Ball and SquaredLoss, any convex penalty with a prox, no pass over the samples to iterate.

    Everything is in float64, for XᵀX squares the condition of X. sigma is balanced as in ``admm``. "weight" among what
    it reports as effective is that of the SquaredLoss that a layer's Ball amounts to.

    Args:
        relaxation: Over-relaxation in (0, 2).
        sigma: Initial penalty of T = U in scaled units, or None to derive it.
        scaling: p in d_j ∝ ‖x_j‖^p, what the columns of X are divided by: 1 gives equal lengths, 0 leaves them.
    """

    relaxation: float = 1.7
    sigma: float | None = None
    scaling: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < as_number("relaxation", self.relaxation) < 2:
            raise InvalidTolerance(f"relaxation: expected a number strictly between 0 and 2, found {self.relaxation}")
        if not 0 <= as_number("scaling", self.scaling) <= 1:
            raise InvalidTolerance(f"scaling: expected a power between 0 and 1, found {self.scaling}")
        if self.sigma is not None:
            checked_positive("sigma", self.sigma)

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""
        if not program.penalty.convex:
            return f"{type(program.penalty).__name__} is not convex; the solver 'continuation' takes it"
        if not is_plain(program.fit, (Ball, SquaredLoss)):
            return f"{type(program.fit).__name__} is more than ‖XU − Y‖ (expected Ball or SquaredLoss); 'admm' takes it"
        return None

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """The eigenbasis, and a start."""
        basis = Eigenbasis(program, self.scaling)
        penalty = program.penalty.to(basis.d).rescaled(basis.d)
        T = torch.zeros_like(basis.moment) if start is None else penalty.prox(start.weights.to(basis.d) * basis.d, 0.0)
        fit, V = _fit(program), penalty.prox(basis.ridge(1.0), 0.0)
        # Of a ball multiplier over variable, from g(V) ≈ ⟨multiplier, V⟩.
        found = float(penalty.value(V)) / max(float(norm(V)) ** 2, _TINY) or 1.0
        sigma = PenaltyParameter(self.sigma or (_LOSS * fit.weight if isinstance(fit, SquaredLoss) else found))
        state = _State(program, fit, basis, penalty, sigma, T, torch.zeros_like(T), T, T.new_zeros(1))
        gradient = basis.gradient(T)
        # g(T) = −μ⟨gradient, T⟩ at an optimum where g is homogeneous, and of that size where it is not.
        slope = -float((gradient * T).sum())
        if slope > 0:
            state.price = state.price + float(penalty.value(T)) / slope
        self._begin(state)
        if start is not None:
            # −μ·gradient is the multiplier of T = V there, and a subgradient of g: no larger, whatever the start is.
            multiplier = state.price * -gradient
            state.dual = multiplier / penalty.dual_norm(multiplier).clamp(min=1.0) / sigma.weight
        return state

    def retarget(self, state: _State, program: LayerProgram) -> _State | None:
        """The state made to go on with another radius or weight for the same targets: nothing is computed again."""
        if program.fit.Y is not state.program.fit.Y:
            return None
        before, state.program, state.fit = state.fit, program, _fit(program)
        if isinstance(before, SquaredLoss) and isinstance(state.fit, SquaredLoss):
            # sigma·dual is a subgradient of the penalty, which does not know of the weight; the resolvent stays.
            heavier = state.fit.weight / before.weight
            state.sigma.weight, state.dual = state.sigma.weight * heavier, state.dual / heavier
        state.iteration, state.due, state.sigma = 0, 10, PenaltyParameter(state.sigma.weight)
        self._begin(state)
        return state

    def step(self, state: _State) -> None:
        """The prox of the fit, then that of the penalty; sigma is reviewed at measured iterations."""
        state.iteration += 1
        a, T, q, sigma = self.relaxation, state.T, state.T - state.dual, state.sigma
        if isinstance(state.fit, SquaredLoss):
            assert state.resolvent is not None  # noqa: S101 - _begin made it
            state.V = state.resolvent @ q + state.ridge
        else:
            state.V, nu = state.basis.project(q, state.fit.radii, state.price / sigma.weight)
            state.price = nu * sigma.weight
        relaxed = a * state.V + (1 - a) * T + state.dual
        state.T = state.penalty.prox(relaxed, 1 / sigma.weight)
        state.dual = relaxed - state.T
        if state.iteration % 10 == 0:
            V_, T_, *sizes = (float(norm(A)) for A in (state.V, state.T, state.V - state.T, state.T - T, state.dual))
            sigma.imbalance.clear()  # the latest counts alone
            sigma.measure(max(V_, T_), *sizes)
            if state.iteration >= state.due:
                self._review(state)

    def finite(self, state: _State) -> bool:
        """Whether T is: whatever else is not finite makes it so."""
        return math.isfinite(float(state.T.sum()))

    def successor(self, program: LayerProgram) -> Clarabel | None:
        """An interior point method for small programs."""
        return Clarabel() if Clarabel.suits(program) else None

    def residuals(self, state: _State) -> Mapping[str, float]:
        """Primal and dual residual of T = U, relative; measured every tenth iteration."""
        return {} if math.isinf(state.sigma.primal) else {"primal": state.sigma.primal, "dual": state.sigma.change}

    def finish(self, state: _State) -> tuple[Tensor, Tensor]:
        """The sparse iterate T, moved to the balls or targets; Λ = μ(XU − Y) of the other; in the caller's units."""
        X, Y, U = state.program.inputs, state.program.fit.Y, state.V / state.basis.d
        multipliers = U.new_empty(Y.shape)
        for rows in blocks_of(X, U.shape[1]):
            torch.mm(X[rows].to(U), U, out=multipliers[rows]).sub_(Y[rows]).mul_(state.price)
        tension = (state.T + state.dual).abs() / state.penalty.cost(state.program.shape).clamp(min=_TINY)
        return interpolated(state.program, self._restored(state) / state.basis.d, U, tension), multipliers

    def effective(self, state: _State) -> Mapping[str, Any]:
        """sigma at the end, and μ, where each neuron has its own the mean."""
        return {"sigma": state.sigma.weight, "weight": float(state.price.mean()), "iterate dtype": str(state.T.dtype)}

    def _begin(self, state: _State) -> None:
        """The price for the state's fit, and with sigma the resolvent of a loss."""
        if isinstance(state.fit, SquaredLoss):
            state.price = state.T.new_tensor([state.fit.weight])
            nu = state.fit.weight / state.sigma.weight
            state.resolvent, state.ridge = state.basis.resolvent(nu), state.basis.ridge(nu)
        elif len(state.price) != (neurons := state.T.shape[1] if isinstance(state.fit.radii, Tensor) else 1):
            state.price = state.price.mean().expand(neurons)

    def _review(self, state: _State) -> None:
        """Change sigma if it is out of balance, keeping the multiplier; ever more rarely, as in ``admm``."""
        state.due = state.iteration + max(10, state.iteration // 4)
        factor = state.sigma.rebalance(math.log(_TOLERATED))
        if factor != 1:
            state.dual = state.dual / factor
            if isinstance(state.fit, SquaredLoss):
                self._begin(state)

    def _restored(self, state: _State) -> Tensor:
        """T moved along the gradient on its own support to the boundary of the balls, or as near as that leads.

        ‖h‖² after a step t is a parabola, square − 2t·slope + t²·bend: its nearer root, or its lowest point.
        """
        fit, T = state.fit, state.T
        if isinstance(fit, SquaredLoss):
            return T
        gradient = state.basis.gradient(T)
        along = gradient * (T != 0)
        square, slope = state.basis.distances(T, gradient), along.square().sum(0)
        bend = (along * (state.basis.gram @ along)).sum(0)
        if not isinstance(fit.radii, Tensor):
            square, slope, bend = square.sum(), slope.sum(), bend.sum()
        beyond = (square - fit.radii**2).clamp(min=0)
        root = (slope.square() - bend * beyond).clamp(min=0).sqrt()
        moved = T - along * torch.where(root > 0, beyond / (slope + root), slope / bend.clamp(min=_TINY))
        return state.penalty.prox(moved, 0.0)  # within its domain


def _fit(program: LayerProgram) -> Ball | SquaredLoss:
    return cast(Ball | SquaredLoss, program.fit)  # as refuses saw to
