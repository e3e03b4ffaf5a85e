"""Exact budgets by ADMM whose penalty rises until the support has settled, then a refit, then exchanges.

minimise f(XV) + ½δ‖V − V₀‖²  subject to  V = T, T within the budget  (columns of X scaled to unit norm)

by ADMM on (V, T) with the penalty σ raised geometrically from where T hardly matters to where it decides. For the
squared loss V solves normal equations, so iterations see XᵀX and XᵀY alone. For the ReLU loss they see a majoriser:
with Z = XU_k, ½‖h(XU)‖² ≤ ½‖XU − (Z − h(Z))‖² with equality at U_k, so that the target Z − h(Z) takes the place of Y.
It is renewed for one block of samples at each iteration; the others keep theirs. The error after the ReLU itself
(``exact``) is bounded likewise, up to a constant, with (Z − Y)·[Z > 0] in the place of h.

Sources: Boža, "Fast and effective weight update for pruned large language models" (2024) and Meng et al., "ALPS" (2024)
for ADMM on the layer's squared loss; Mairal, "Incremental majorization-minimization" (2015) for the blocks; for the
sweep operator of the exchanges Beaton (1964), as in Goodnight, "A tutorial on the SWEEP operator" (1979).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_count, checked_dtype, checked_positive, checked_radius
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.methods.curvature import Model, OneSided, Point, Quadratic, model_of
from convexprune.solvers.methods.interface import Deadline, Limits, Proposal, Start, Watch
from convexprune.solvers.methods.refit import (
    SETTLED,
    UNSETTLED,
    Packed,
    conjugate,
    descend,
    factored,
    packed,
    unfit,
    unsettled,
)
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import NM, LayerProgram, TopK
from convexprune.solvers.programs.claims import BUDGETS, LOSSES, is_plain
from convexprune.solvers.programs.program import leveled

_ROUGHLY = 1e-4
_AT_ONCE = 8  # exchanges of each neuron between two refits, at first
_WORTH = 1e-9  # of the loss, the least that an exchange must gain


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
            checked_count(name, getattr(self, name), least)
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
        search = _Search(quadratic.damped(self.damping * unit, dense), loss, dense, self.batches, program.dtype)
        setup = time.perf_counter() - began
        late = Deadline(limits, began)
        steps = min(self.steps, limits.max_iter or self.steps)
        U, done = search.run(steps, self.penalty, budget, late)
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


class _Search:
    """The iteration in the variables V = diag(d) U, from the dense weights, with what it computes once."""

    def __init__(self, damped: Quadratic, loss: Model, dense: Tensor, batches: int, dtype: torch.dtype) -> None:
        lengths = damped.gram.lengths()
        self.inverse = damped.gram.scaled(lengths).inverses(dtype)  # of the scaled XᵀX + δI + σI, for each σ
        self.V, self.d = (dense * lengths).to(dtype), lengths.to(dtype)
        self.moment, self.blocks = (damped.moment / lengths).to(dtype), list[OneSided]()
        if isinstance(loss, OneSided):  # Xᵀ(Z − h(Z)), renewed block by block, in the place of XᵀY
            P = len(loss.inputs)
            rows = -(-P // batches)
            self.blocks = [loss.block(slice(first, first + rows)) for first in range(0, P, rows)]
            self.parts = [self._part(b, self.V) for b in range(len(self.blocks))]
            self.moment = (damped.ridge * dense / lengths).to(dtype) + torch.stack(self.parts).sum(0)

    def run(self, steps: int, penalty: tuple[float, float], budget: TopK | NM, late: Deadline) -> tuple[Tensor, int]:
        """U after so many steps, and how many there were."""
        sigma, last = penalty
        growth = (last / sigma) ** (1 / max(1, steps - 1))
        V = T = self.V
        S, done = torch.zeros_like(V), 0
        while done < steps and not late():
            if self.blocks:
                b = done % len(self.blocks)
                part = self._part(b, V)
                self.moment += part - self.parts[b]
                self.parts[b] = part
            V = self.inverse(sigma) @ torch.add(self.moment, T + S, alpha=sigma)
            R = V - S
            T = torch.where(_kept(budget, R), R, 0.0)
            S = (T - R) / growth  # the multiplier σS stays what it is when σ grows
            sigma *= growth
            done += 1
        return T / self.d, done

    def _part(self, b: int, V: Tensor) -> Tensor:
        return self.blocks[b].majorised(V / self.d) / self.d


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


def improve(
    model: Model,
    at: Point,
    support: Tensor,
    budget: TopK | NM,
    rounds: int,
    pool: int,
    stop: Callable[[], bool] | None = None,
) -> tuple[Point, Tensor]:
    """Exchange, refit, keep what lowered the loss; the budget stays spent as it was. The last point and its support.

    From weights that are optimal on the support [N, M], with at most so many ``rounds`` of tableaus for a ``pool`` of
    inputs of each neuron, half of them from its support; a true answer of ``stop`` before a round ends them.
    """
    coupled, limit = isinstance(budget, TopK) and budget.per == "layer", _AT_ONCE
    for _ in range(rounds):
        if stop is not None and stop():
            break
        trial = _Tableau(model, at, support, budget, pool).exchanged(support, coupled, limit)
        if torch.equal(trial, support):
            break
        changed = (trial != support).any(0)
        new = descend(model, at, trial, _ROUGHLY, changed)
        better = changed & (new.value < at.value)
        if coupled:  # neurons that gave weights to others are judged together with those that took them
            moved = trial.sum(0) != support.sum(0)
            better = torch.where(moved, new.value[moved].sum() < at.value[moved].sum(), better)
        if not bool(better.any()):
            limit //= 4  # the model was trusted too far: fewer at a time
            if limit == 0:
                break
            continue
        support = torch.where(better, trial, support)
        at = new if bool(better.all()) else model.at(torch.where(better, new.weights, at.weights))
    return at, support


class _Tableau:
    """What exchanges gain, for a pool of inputs of each neuron: the cheapest of its support, and the best others.

    On a neuron's quadratic model ½uᵀHu − cᵀu with support S, the matrix [[H, c], [cᵀ, ·]] swept by S becomes T: −K =
    −H_SS⁻¹, the coefficients B = K H_SR of the rest R, its Schur complements, the weights u_S and the residuals r_R =
    c_R − H_RS u_S. To drop i costs u_i²/(2K_ii), to add j gains r_j²/(2T_jj), to do both gains
    (r_j + B_ij u_i/K_ii)²/(2(T_jj + B_ij²/K_ii)) less that cost; doing it is two rank-one updates.
    """

    def __init__(self, model: Model, at: Point, support: Tensor, budget: TopK | NM, pool: int) -> None:
        N, M = support.shape
        q = max(1, min(pool // 2, N))
        rows = budget.budgeted(N)
        size = budget.m if isinstance(budget, NM) else rows
        group = torch.arange(N, device=support.device) // size
        group[rows:] = -1  # free
        p = 2 * q
        table = torch.eye(p + 1, dtype=torch.float64, device=support.device).repeat(M, 1, 1)
        chosen = torch.zeros(M, p, dtype=torch.long, device=support.device)
        movable = torch.zeros_like(chosen, dtype=torch.bool)
        gains = at.gradient.to(torch.float64).square() / (2 * model.diagonal(at).to(torch.float64).clamp(min=1e-300))
        outside = ~support & (group >= 0)[:, None] & budget.allowed(at.weights)
        gains = torch.where(outside & (model.diagonal(at) > 0), gains, -torch.inf)
        for part in packed(support, extra=q):
            best, strong = gains[:, part.neurons].T.topk(q, dim=1)
            t, weak, cheap = _swept(model, at, part, strong, best, group)
            where = part.neurons
            table[where], chosen[where] = t.to(table), torch.cat([weak, strong], 1)
            movable[where] = torch.cat([cheap, best > -torch.inf], 1)
        self.table, self.pool, self.movable = table, chosen, movable  # [M, p+1, p+1], inputs [M, p], which may move
        self.group = group[chosen]  # [M, p], within which each may be exchanged
        self.worth = _WORTH * float(at.value.sum()) / max(1, M)  # what an exchange must gain

    def exchanged(self, support: Tensor, coupled: bool, limit: int) -> Tensor:
        """The support after the best exchanges, at most ``limit`` for each neuron."""
        T, (M, p) = self.table.clone(), self.pool.shape
        # Not by the diagonal's sign: a Schur complement that should be 0 may be rounded below it.
        inside = (torch.arange(p, device=T.device) < p // 2).repeat(M, 1)
        for _ in range(limit):
            within, i, j = self._best_pairs(T, inside)
            busy = torch.zeros(M, dtype=torch.bool, device=T.device)
            if coupled:
                busy = self._transfer(T, inside, within)
            neurons = ((within < -self.worth) & ~busy).nonzero()[:, 0]
            _pivot(T, inside, neurons, i[neurons])
            _pivot(T, inside, neurons, j[neurons])
            if not (len(neurons) or bool(busy.any())):
                break
        result = support.clone()
        neurons = torch.arange(M, device=T.device)[:, None].expand_as(self.pool)
        result[self.pool[self.movable], neurons[self.movable]] = inside[self.movable]
        return result

    def _parts(self, T: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each pool entry: −K_ii or T_jj, u_i or r_j, the cost of dropping it, the gain of adding it."""
        p = inside.shape[1]
        diagonal, edge = T.diagonal(dim1=1, dim2=2)[:, :p], T[:, :p, p]
        worth = edge.square() / (2 * diagonal.abs().clamp(min=1e-300))
        cost = torch.where(inside & self.movable, worth, torch.inf)
        gain = torch.where(~inside & self.movable & (diagonal > 0), worth, -torch.inf)
        return diagonal, edge, cost, gain

    def _best_pairs(self, T: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each neuron the exchange that lowers its loss most: the change [M], who leaves, who comes."""
        p = inside.shape[1]
        diagonal, edge, cost, gain = self._parts(T, inside)
        K, B = -diagonal[:, :, None], T[:, :p, :p]
        ratio = B / torch.where(K > 0, K, 1.0)
        residual = edge[:, None, :] + ratio * edge[:, :, None]
        schur = (diagonal[:, None, :] + ratio * B).clamp(min=1e-300)
        change = cost[:, :, None] - residual.square() / (2 * schur)
        allowed = torch.isfinite(cost)[:, :, None] & torch.isfinite(gain)[:, None, :]
        allowed &= self.group[:, :, None] == self.group[:, None, :]
        best, index = torch.where(allowed, change, torch.inf).flatten(1).min(1)
        return best, index // p, index % p

    def _transfer(self, T: Tensor, inside: Tensor, within: Tensor) -> Tensor:
        """Move budget between neurons, from the cheapest drops to the largest gains; returns who took part [M]."""
        _, _, cost, gain = self._parts(T, inside)
        (drop, i), (add, j) = cost.min(1), gain.max(1)
        givers, takers = _pairs(drop, add, within, self.worth)
        _pivot(T, inside, givers, i[givers])
        _pivot(T, inside, takers, j[takers])
        busy = torch.zeros(len(T), dtype=torch.bool, device=T.device)
        busy[givers] = busy[takers] = True
        return busy


def _pairs(drop: Tensor, add: Tensor, within: Tensor, worth: float) -> tuple[Tensor, Tensor]:
    """Givers and takers: different neurons, matched in the order of their worth, where it beats an exchange within."""
    d, a, w = drop.tolist(), add.tolist(), within.tolist()
    givers, takers, used = [], [], set()
    offers = iter(drop.argsort(stable=True).tolist())
    for m in add.argsort(descending=True, stable=True).tolist():
        if m in used:
            continue
        giver = next((g for g in offers if g not in used and g != m), None)
        if giver is None or a[m] - d[giver] <= worth:
            break
        if a[m] - d[giver] > -w[giver]:
            givers.append(giver)
            takers.append(m)
            used |= {giver, m}
    index = drop.new_tensor
    return index(givers, dtype=torch.long), index(takers, dtype=torch.long)


def _pivot(T: Tensor, inside: Tensor, neurons: Tensor, k: Tensor) -> None:
    """Sweep input k [c] of these neurons into the support, or out of it."""
    if not len(neurons):
        return
    A, c = T[neurons], torch.arange(len(neurons), device=T.device)
    row = A[c, k].clone()
    pivot = row[c, k][:, None]
    A -= row[:, :, None] * (row / pivot)[:, None, :]
    new = row / pivot.abs()
    A[c, k], A[c, :, k] = new, new
    A[c, k, k] = -1 / pivot[:, 0]
    T[neurons] = A
    inside[neurons, k] = ~inside[neurons, k]


def _swept(
    model: Model, at: Point, part: Packed, strong: Tensor, best: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The tableaus [c, 2q+1, 2q+1] of a part, its weak inputs [c, q], and which of those may move."""
    q, s = strong.shape[1], part.rows.shape[1]
    H = model.curvature(at, part.neurons, torch.cat([part.rows, strong], 1))
    factor, d = factored(part.fill(H[:, :s, :s].clone()))
    K = torch.cholesky_inverse(factor) / d[:, :, None] / d[:, None, :]
    u, g = part.take(at.weights).to(K), at.gradient[strong, part.neurons[:, None]].to(K)
    score = u.square() / (2 * K.diagonal(dim1=1, dim2=2))
    label = group[part.rows]
    if bool((group > 0).any()):  # in small groups only those whose group has something to offer matter
        offer = torch.full((len(u), int(group.max()) + 1), -torch.inf, dtype=u.dtype, device=u.device)
        offer.scatter_reduce_(1, group[strong].clamp(min=0), best.to(offer), "amax")
        score = score - offer.gather(1, label.clamp(min=0))
    score = torch.where(part.valid & (label >= 0), score, torch.inf)
    score, local = score.topk(min(q, s), dim=1, largest=False)
    n = local.shape[1]
    T = torch.eye(2 * q + 1, dtype=u.dtype, device=u.device).repeat(len(u), 1, 1)
    B = K @ (H[:, :s, s:] * part.valid[:, :, None])
    schur = H[:, s:, s:] - (H[:, s:, :s] * part.valid[:, None, :]) @ B
    cross = B.gather(1, local[:, :, None].expand(-1, -1, q))
    T[:, :q, :q] *= -1
    T[:, :n, :n] = -K.gather(1, local[:, :, None].expand(-1, -1, s)).gather(2, local[:, None, :].expand(-1, n, -1))
    T[:, :n, q : 2 * q], T[:, q : 2 * q, :n] = cross, cross.mT
    T[:, q : 2 * q, q : 2 * q] = schur
    T[:, :n, 2 * q] = T[:, 2 * q, :n] = u.gather(1, local)
    T[:, q : 2 * q, 2 * q] = T[:, 2 * q, q : 2 * q] = -g
    weak = torch.zeros_like(strong)
    weak[:, :n] = part.rows.gather(1, local)
    cheap = torch.zeros_like(strong, dtype=torch.bool)
    cheap[:, :n] = torch.isfinite(score)
    return T, weak, cheap
