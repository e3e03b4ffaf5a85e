"""Neurons by the Löwner ellipsoid of their weights, without data.

Source: M. Tukan, L. Mualem and A. Maalouf, Pruning neural networks via coresets and convex geometry: towards no
assumptions, NeurIPS 2022. Neither its full text nor its authors' code could be read; what is called published here
follows the abstract, the authors' code for other problems, and a third party's reimplementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convexprune.pruners.draws import Scheme, bernstein
from convexprune.pruners.mussay import below_identity, is_bounded, reach_of, sizes_of, within_reach
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.report.report import Assumption
from convexprune.solvers.arrays import checked_positive
from convexprune.solvers.geometry import lewis_weights, max_norm_coreset


@register_pruner("lowner")
@dataclass(frozen=True)
class Lowner(Sampling):
    """Coreset of neurons from ellipsoids around their weight vectors (after Tukan et al. 2022).

    The sensitivity of a point a_i is the largest of |a_iᵀx|/Σ|a_jᵀx| over all x. "lewis" bounds it by ℓ1 Lewis weights,
    with sum r, the rank, and keeps the contact points of the central Löwner ellipsoid for certain where they are fewer
    than the size; "peeling" is the published bound 2r^{3/2}/i in the i-th round of taking away an L∞ coreset, which is
    uniform sampling if there are fewer than 2r² points.

    Args:
        construction: "lewis" or "peeling".
        points: "outgoing": a_i = c_i·(weights with which neuron i goes on), c_i ≥ |φ| its largest size; whatever the
            activation is. "incoming": a_i = |W_ji|(w_i, b_i) for the next layer's unit j, and the largest over j; for
            |φ(z)| ≤ |z|. A ReLU is not linear: sums of ReLUs are kept relative to the same sums of absolute values.
            Incoming vectors are mostly linearly independent, and then every one has sensitivity 1: hence the default.
        beta: As for ``Mussay``, for "outgoing".
        sampling: See ``Scheme``.
    """

    construction: Literal["lewis", "peeling"] = "lewis"
    points: Literal["outgoing", "incoming"] = "outgoing"
    beta: float | None = None
    items: ClassVar[Items] = "neurons"
    sampling: Scheme = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None:
            checked_positive("beta", self.beta)

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of a layer's neurons; β, or more of the activation, may have to be known."""
        view.check(self.items)
        clouds, outputs = self._clouds(view), view.outputs
        found = [self._sensitivities(points) for points in clouds]
        s = torch.stack([sensitivities for sensitivities, _ in found]).amax(0)
        rank, live = max(rank for _, rank in found), int((s > 0).sum())
        note = _regime(len(s), live, rank, self.construction)
        one = self.construction == "lewis" and self.points == "outgoing" and rank < live
        return Sensitivities(
            s[None],
            None if view.guarantee is None else bernstein(s.sum()[None].cpu(), view.guarantee, outputs),
            f"each of {outputs} outputs within eps·{self._scale(view)}, for every one input x, "
            "with probability 1 − delta",
            self._assumptions(view),
            () if note is None else (note,),
            kept=_contact(clouds[0]) if one else None,
            terms={"t": float(s.sum()), "rank": float(rank)},
        )

    def _clouds(self, view: View) -> Sequence[Tensor]:
        outgoing = view.outgoing.to(torch.float64)
        if self.points == "outgoing":
            return [sizes_of(view, reach_of(view, self.beta))[:, None] * outgoing]
        incoming = view.incoming.to(torch.float64)
        return [incoming * column[:, None].abs() for column in outgoing.T if bool(column.any())] or [0 * incoming]

    def _sensitivities(self, points: Tensor) -> tuple[Tensor, int]:
        if self.construction == "peeling":
            s, rank = peeled(points)
            return s.masked_fill(~points.any(1), 0), rank  # a point 0 has no share of any sum
        w = lewis_weights(points).clamp(max=1)
        return w, round(float(w.sum()))

    def _scale(self, view: View) -> str:
        if self.points == "incoming":
            return "Σ|W_ji p_iᵀ(x, 1)|"
        return "Σ c_i|W_ji|" if is_bounded(view, self.beta) else "√(‖x‖² + 1)·Σ c_i|W_ji|"

    def _assumptions(self, view: View) -> tuple[Assumption, ...]:
        if self.points == "incoming":
            return (Assumption("|φ(z)| ≤ |z| for the activation φ", below_identity(view.activation)),)
        return within_reach(view, self.beta)


def peeled(points: Tensor) -> tuple[Tensor, int]:
    """The published sensitivities [n] of points [n, d], and their rank r.

    Round i takes an L∞ coreset S of what is left, with s = 2r^{3/2}/i for its points, until fewer than 2r² are left;
    these get the last i. Each coreset has a term within a factor of r^{3/2} of any that it leaves, so that after i
    rounds there are i such terms in the sum.
    """
    left = torch.arange(len(points), device=points.device)
    s = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    rank, i = int(torch.linalg.matrix_rank(points)), 1
    while len(left) >= 2 * rank**2 and rank:
        chosen = max_norm_coreset(points[left], "caratheodory").indices
        s[left[chosen]] = 2 * rank**1.5 / i
        left = left[~torch.isin(torch.arange(len(left), device=left.device), chosen)]
        i += 1
    s[left] = 2 * max(1, rank) ** 1.5 / i
    return s, rank


def _regime(n: int, live: int, rank: int, construction: str) -> str | None:
    """Why, here, the published method, or this one too, is no more than uniform sampling."""
    if construction == "lewis" and rank >= live > 0:
        return f"the {live} points are linearly independent: each has sensitivity 1, and sampling is uniform"
    if n >= 2 * rank**2:
        return None
    few = f"{n} points are fewer than 2r² = {2 * rank**2}: no round of peeling runs"
    return f"{few}, and the published method {'is' if construction == 'peeling' else 'would be'} uniform sampling"


def _contact(points: Tensor) -> Tensor:
    """[n] whether a point is on the central Löwner ellipsoid: these stand for all in max |aᵀx|, up to √(r(1 + ε))."""
    kept = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    kept[max_norm_coreset(points, "support").indices] = True
    return kept
