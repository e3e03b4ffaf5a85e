"""Exchanges that improve a support: a weight leaves, another of the same budget comes, if the loss falls.

On a neuron's quadratic model ½uᵀHu − cᵀu with support S, the tableau of the sweep operator tells what exchanges gain.
Swept by S, the matrix [[H, c], [cᵀ, ·]] becomes T: −K = −H_SS⁻¹, the coefficients B = K H_SR of the rest R, its Schur
complements, the weights u_S and the residuals r_R = c_R − H_RS u_S. To drop i costs u_i²/(2K_ii), to add j gains
r_j²/(2T_jj), to do both gains (r_j + B_ij u_i/K_ii)²/(2(T_jj + B_ij²/K_ii)) less that cost; doing it is two rank-one
updates. Only a pool of inputs is kept of each tableau: those of the support that are cheapest to drop, and the others
that promise most.

Source: the sweep operator of Beaton (1964), as in Goodnight, "A tutorial on the SWEEP operator" (1979).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.methods.curvature import Model, Point
from convexprune.solvers.methods.refit import Packed, descend, factored, packed
from convexprune.solvers.programs import NM, TopK

_SETTLED = 1e-4
_AT_ONCE = 8  # exchanges of each neuron between two refits, at first
_WORTH = 1e-9  # of the loss, the least that an exchange must gain


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
        trial = _Tableau.build(model, at, support, budget, pool).exchanged(support, coupled, limit)
        if torch.equal(trial, support):
            break
        changed = (trial != support).any(0)
        new = descend(model, at, trial, _SETTLED, changed)
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


@dataclass(frozen=True, eq=False)
class _Tableau:
    table: Tensor  # [M, p+1, p+1]
    pool: Tensor  # [M, p], the inputs
    movable: Tensor  # [M, p], which of these may move
    group: Tensor  # [M, p], within which each may be exchanged
    worth: float  # what an exchange must gain

    @classmethod
    def build(cls, model: Model, at: Point, support: Tensor, budget: TopK | NM, pool: int) -> "_Tableau":
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
        return cls(table, chosen, movable, group[chosen], _WORTH * float(at.value.sum()) / max(1, M))

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
