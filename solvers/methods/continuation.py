"""Exact budgets by ADMM whose penalty rises until the support has settled, then a refit, then exchanges.

minimise f(XV) + ½δ‖V − V₀‖²  subject to  V = T, T within the budget  (columns of X scaled to unit norm)

by ADMM on (V, T) with the penalty σ raised geometrically from where T hardly matters to where it decides. For the
squared loss V solves normal equations, so iterations see XᵀX and XᵀY alone. For the ReLU loss they see a majoriser:
with Z = XU_k, ½‖h(XU)‖² ≤ ½‖XU − (Z − h(Z))‖² with equality at U_k, so that the target Z − h(Z) takes the place of Y.
It is renewed for one block of samples at each iteration; the others keep theirs. The error after the ReLU itself
(``exact``) is bounded likewise, up to a constant, with (Z − Y)·[Z > 0] in the place of h.

Sources: Boža, "Fast and effective weight update for pruned large language models" (2024) and Meng et al., "ALPS" (2024)
for ADMM on the layer's squared loss; Mairal, "Incremental majorization-minimization" (2015) for the blocks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_dtype, checked_positive, checked_radius
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.methods.curvature import Model, OneSided, Point, Quadratic, model_of
from convexprune.solvers.methods.interface import Deadline, Limits, Proposal, Start, Watch
from convexprune.solvers.methods.refit import SETTLED, UNSETTLED, conjugate, descend, unfit, unsettled
from convexprune.solvers.methods.registry import register
from convexprune.solvers.methods.swaps import improve
from convexprune.solvers.programs import NM, LayerProgram, TopK
from convexprune.solvers.programs.claims import BUDGETS, LOSSES, is_plain
from convexprune.solvers.programs.program import leveled


@register("continuation")
@dataclass(frozen=True)
class Continuation:
    """Exact budgets: ``TopK`` and ``NM`` with ``SquaredLoss`` or ``ReluLoss``, no bound claimed.

    ADMM with a rising penalty finds a support, Newton steps the best weights on it, exchanges a better support. What
    comes back is a local optimum; deterministic on one machine. The watch is not called: there is no gap to close.

    Args:
        steps: Iterations of the continuation, unless max_iter is lower.
        penalty: First and last σ, relative to a curvature of 1 in each weight.
        damping: δ, relative to the mean diagonal of XᵀX: a ridge around the start (or least squares) while a support
            is sought. It is not part of what is minimised in the end.
        ridge: The same in what is minimised in the end, against few samples; 0 leaves the program's own loss.
        exact: In place of a ReLU loss minimise what it bounds, ½‖ReLU(XU) − Y‖²: not convex, even on a support.
        batches: Blocks of samples of the ReLU loss; each iteration sees one.
        rounds: Rounds of exchanges at most; 0 for none.
        pool: Inputs of each neuron that take part in a round of exchanges.
        dtype: torch.float32 or torch.float64 for the iterations; None: the program's own.
    """

    steps: int = 300
    penalty: tuple[float, float] = (0.02, 1.0)
    damping: float = 0.01
    ridge: float = 0.0
    exact: bool = False
    batches: int = 16
    rounds: int = 3
    pool: int = 64
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batches", 1), ("rounds", 0), ("pool", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidTolerance(f"{name}: expected a whole number ≥ {least}, found {value!r}")
        first, last = (checked_positive("penalty", value) for value in self.penalty)
        if first > last:
            raise InvalidTolerance(f"penalty: expected a first number no larger than the last, found {self.penalty}")
        for name in ("damping", "ridge"):
            checked_radius(name, getattr(self, name))
        checked_dtype(self.dtype)

    def refuses(self, program: LayerProgram) -> str | None:
        """Everything but budgets with a loss whose h sees all outputs."""
        if not is_plain(program.penalty, BUDGETS):
            return f"it is for the budgets TopK and NM, found {type(program.penalty).__name__}; admm takes penalties"
        if not is_plain(program.fit, LOSSES):
            return f"it is for SquaredLoss and ReluLoss, found {type(program.fit).__name__}; admm takes sets"
        return unfit(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:  # noqa: ARG002
        """Continuation, refit, exchanges."""
        began = time.perf_counter()
        budget = program.penalty
        assert isinstance(budget, TopK | NM)  # noqa: S101 - refuses saw to it
        program, d = leveled(program.to(self.dtype or program.dtype))
        quadratic = Quadratic(program, program.dtype)
        loss = model_of(program, self.exact, quadratic)
        unit = float(quadratic.gram.diagonal().mean())
        dense = quadratic.solution() if start is None else (start.weights.to(d) * d).to(quadratic.moment)
        run = _prepared(quadratic.damped(self.damping * unit, dense), loss, dense, self.batches, program.dtype)
        setup = time.perf_counter() - began
        late = Deadline(limits, began)
        steps = min(self.steps, limits.max_iter or self.steps)
        U, done = run(steps, self.penalty, budget, late)
        at = self._improved(loss.damped(self.ridge * unit, dense), U, budget, late)
        ended = late.reason or ("iteration limit" if steps < self.steps else "own rule")
        found = {"loss": float(at.value.sum()), "iterate dtype": str(program.dtype)}
        if bool((d != 1).any()):
            found["columns"] = "scaled to one length"
        if left := unsettled(at):
            found[UNSETTLED] = left
        return Proposal((at.weights / d.to(at.weights)).to(program.dtype), None, ended, done, setup, effective=found)

    def _improved(self, model: Model, U: Tensor, budget: TopK | NM, late: Deadline) -> Point:
        support, rows = budget.support(U), budget.budgeted(len(U))
        support[rows:] = budget.allowed(U)[rows:]  # a free weight that is 0 stays free
        single = U.dtype == torch.float32
        if single and isinstance(model, Quadratic):
            at = conjugate(model, model.at(U), support)
            return improve(model, at, support, budget, self.rounds, self.pool, late)[0]
        at = model.at(U)
        if self.rounds and not late():
            at = descend(model, at, support, settled=1e-2, stop=late)
            at, support = improve(model, at, support, budget, self.rounds, self.pool, late)
        return descend(model, at, support, settled=1e-5 if single else SETTLED, stop=late)


Run = Callable[[int, tuple[float, float], TopK | NM, Deadline], tuple[Tensor, int]]
"""The iteration for so many steps: U, and how many there were."""


def _prepared(damped: Quadratic, loss: Model, dense: Tensor, batches: int, dtype: torch.dtype) -> Run:
    """The iteration in the variables V = diag(d) U, from the dense weights, with what it computes once."""
    lengths = damped.gram.lengths()
    inverse = damped.gram.scaled(lengths).inverses(dtype)  # of the scaled XᵀX + δI + σI, for each σ
    V0, d, moment = (dense * lengths).to(dtype), lengths.to(dtype), (damped.moment / lengths).to(dtype)
    majoriser = None
    if isinstance(loss, OneSided):
        majoriser = _Majoriser(loss, d, V0, (damped.ridge * dense / lengths).to(dtype), batches)

    def run(steps: int, penalty: tuple[float, float], budget: TopK | NM, late: Deadline) -> tuple[Tensor, int]:
        sigma, last = penalty
        growth = (last / sigma) ** (1 / max(1, steps - 1))
        V = T = V0
        S, done = torch.zeros_like(V), 0
        while done < steps and not late():
            right = torch.add(moment if majoriser is None else majoriser.moment(V, done), T + S, alpha=sigma)
            V = inverse(sigma) @ right
            R = V - S
            T = torch.where(_kept(budget, R), R, 0.0)
            S = (T - R) / growth  # the multiplier σS stays what it is when σ grows
            sigma *= growth
            done += 1
        return T / d, done

    return run


def _kept(budget: TopK | NM, V: Tensor) -> Tensor:
    """``budget.support`` by a threshold: the same but for equals, of which it may keep too many, and faster."""
    if isinstance(budget, NM):
        return budget.support(V)
    rows = budget.budgeted(len(V))
    allowed = budget.allowed(V)
    size = V[:rows].abs() * allowed[:rows]
    flat = size.reshape(-1, 1) if budget.per == "layer" else size
    least = flat.kthvalue(len(flat) - budget.k + 1, dim=0).values
    kept = size >= least
    return allowed & (kept if rows == len(V) else torch.cat([kept, kept.new_ones(len(V) - rows, V.shape[1])]))


class _Majoriser:
    """Xᵀ(Z − h(Z)) [N, M] in scaled variables, plus a constant, renewed block by block."""

    def __init__(self, loss: OneSided, d: Tensor, V: Tensor, constant: Tensor, batches: int) -> None:
        rows, self.d = -(-len(loss.inputs) // batches), d
        self.blocks = [loss.block(slice(first, first + rows)) for first in range(0, len(loss.inputs), rows)]
        self.parts = [self._part(b, V) for b in range(len(self.blocks))]
        self.total = constant + torch.stack(self.parts).sum(0)

    def moment(self, V: Tensor, step: int) -> Tensor:
        """What takes the place of XᵀY in this step, one block's targets moved to V."""
        b = step % len(self.blocks)
        part = self._part(b, V)
        self.total += part - self.parts[b]
        self.parts[b] = part
        return self.total

    def _part(self, b: int, V: Tensor) -> Tensor:
        return self.blocks[b].majorised(V / self.d) / self.d
