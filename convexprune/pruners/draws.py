"""Unbiased samples of items by their sensitivities, and budgets split over groups and layers.

Items come in groups (rows) that are sampled apart from each other. Every way of sampling but "top" is unbiased: the
factor of an item, 0 if it is not kept, has mean 1. Randomness is numpy's, so that a seed means the same on any device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from convexprune.pruners.views import Sensitivities
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Guarantee

Scheme = Literal["fixed", "draws", "top"]
"""How items are sampled.

fixed: exactly as many as wanted: inclusion probabilities min(1, c·s), so that large sensitivities are kept for certain
and the rest is sampled; factors 1/probability. draws: independent draws with replacement, as published; factors
count/(draws·probability). top: the largest sensitivities; factors 1, biased, and no guarantee.
"""

_MOST = 2**40  # draws of a group: totals fit an int64, and no layer has so many items


def sample(s: Tensor, sizes: Tensor, scheme: Scheme, rng: np.random.Generator) -> Tensor:
    """Factors [G, n] of items of sensitivities s [G, n] ≥ 0, 0 where one is not kept, as all of sensitivity 0.

    Args:
        s: Sensitivities; only their ratios within a group matter.
        sizes: [G] whole numbers: items to keep; for "draws", draws.
        scheme: See ``Scheme``.
        rng: Where randomness comes from.
    """
    flat = s.detach().to("cpu", torch.float64)
    sizes = sizes.to("cpu", torch.int64)
    if scheme == "fixed":
        pi = inclusion(flat, sizes)
        factors = torch.where(_systematic(pi, rng), 1 / pi.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    elif scheme == "draws":
        factors = _drawn(flat, sizes, rng)
    else:
        ranks = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        factors = ((ranks < sizes[:, None]) & (flat > 0)).to(flat.dtype)
    return factors.to(s.device)


def inclusion(s: Tensor, sizes: Tensor) -> Tensor:
    """π [G, n] = min(1, c·s) with Σπ = size in each group, or 1 for every s > 0 where there are no more than that."""
    ordered, order = s.sort(dim=1, descending=True)
    n = s.shape[1]
    tails = ordered.flip(1).cumsum(1).flip(1)  # Σ of this and all smaller ones
    certain = torch.arange(n)  # so many of the largest have probability 1
    c = (sizes[:, None] - certain) / tails.clamp(min=torch.finfo(s.dtype).tiny)
    enough = (c * ordered <= 1) | (ordered == 0)
    first = torch.where(enough.any(1), enough.to(torch.int8).argmax(1), n)  # the least number that is enough
    scale = torch.gather(c, 1, first.clamp(max=n - 1)[:, None])
    pi = torch.where(certain < first[:, None], 1.0, (scale * ordered).clamp(min=0, max=1))
    pi = torch.where(sizes[:, None] >= (ordered > 0).sum(1, keepdim=True), 1.0, pi)  # not up to rounding
    pi = torch.where(ordered > 0, pi, 0.0)
    return torch.empty_like(pi).scatter_(1, order, pi)


def expected_distinct(q: Tensor, draws: Tensor) -> Tensor:
    """Expected number of distinct items [G] in so many draws [G] with probabilities q [G, n]: Σ 1 − (1 − q)^N."""
    return -torch.expm1(draws[:, None] * torch.log1p(-q.clamp(max=1 - 1e-16))).sum(1)


def draws_for(s: Tensor, distinct: Tensor, most: int = _MOST) -> Tensor:
    """The fewest draws [G] after which at least so many distinct items [G] are expected; ``most`` if none suffice."""
    q = normalised(s.detach().to("cpu", torch.float64))
    low, high = torch.zeros(len(s), dtype=torch.int64), torch.full((len(s),), most, dtype=torch.int64)
    wanted = distinct.to("cpu", torch.float64) - 1e-9
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        enough = expected_distinct(q, middle.to(torch.float64)) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(wanted > 0, high, 0)


def normalised(s: Tensor) -> Tensor:
    """Probabilities of a draw."""
    return s / s.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)


def _drawn(s: Tensor, sizes: Tensor, rng: np.random.Generator) -> Tensor:
    q = normalised(s)
    # numpy wants sums of at most 1 in its own arithmetic; what rounding leaves over goes to the last entry, a dummy.
    padded = np.concatenate([q.numpy() * (1 - 1e-15), np.zeros((len(q), 1))], axis=1)
    padded[:, -1] = np.maximum(0, 1 - padded[:, :-1].sum(1))
    empty = (q.sum(1) == 0).numpy()
    counts = torch.from_numpy(rng.multinomial(np.where(empty, 0, sizes.numpy()), padded)[:, :-1]).to(torch.float64)
    return torch.where(counts > 0, counts / (sizes[:, None] * q), 0.0)


def _systematic(pi: Tensor, rng: np.random.Generator) -> Tensor:
    """Each item with its probability, exactly Σπ (a whole number) of them: systematic sampling in a random order."""
    open_ = torch.where(pi < 1, pi, 0.0)
    order = torch.from_numpy(rng.random(tuple(pi.shape))).argsort(dim=1)
    steps = open_.gather(1, order).cumsum(1)
    whole = steps[:, -1:].round()
    steps = steps * (whole / steps[:, -1:].clamp(min=0.5))  # without the rounding of the sum
    passed = (steps + torch.from_numpy(rng.random((len(pi), 1)))).floor().clamp(max=whole)
    before = torch.cat([torch.zeros_like(whole), passed[:, :-1]], dim=1)
    chosen = torch.zeros_like(pi, dtype=torch.bool).scatter_(1, order, passed > before)
    return (chosen & (pi > 0)) | (pi == 1)


def whole_draws(m: Tensor) -> Tensor:
    """⌈m⌉ [G], but no more than 2^40 each."""
    return m.ceil().clamp(max=_MOST).to("cpu", torch.int64)


def bernstein(total: Tensor, guarantee: Guarantee, queries: int) -> Tensor:
    """Draws for errors of at most eps·F in so many fixed sums, all at once: ⌈2t(1 + 2ε/3)/ε²·log(2K/δ)⌉.

    For a sum of terms with |f_i| ≤ s_iF, drawn with probabilities s_i/t, a reweighted term is at most tF and its second
    moment at most tF² (Bernstein's inequality, and a union over the K queries).
    """
    eps = guarantee.eps
    factor = 2 * (1 + 2 * eps / 3) / eps**2 * math.log(2 * queries / guarantee.delta)
    return whole_draws(factor * total)


def hoeffding(guarantee: Guarantee, queries: int) -> Tensor:
    """[1] draws for errors of at most eps·t in so many fixed sums of terms |f_i| ≤ s_i, t = Σs: ⌈2·log(2K/δ)/ε²⌉."""
    m = 2 * math.log(2 * queries / guarantee.delta) / guarantee.eps**2
    return whole_draws(torch.tensor([m], dtype=torch.float64))


def among_largest(layers: Sequence[Sensitivities]) -> Callable[[float], list[Tensor]]:
    """From a scale k to how many of each group [G] are among the k largest of all layers."""
    values = [found.values.detach().cpu() for found in layers]
    groups = [len(s) for s in values]
    s = torch.cat([s.flatten() for s in values])
    lengths = [each.shape[1] for each in values for _ in each]
    owners = torch.arange(sum(groups)).repeat_interleave(torch.tensor(lengths))
    owners = owners[s.argsort(descending=True, stable=True)[: int((s > 0).sum())]]
    return lambda scale: list(torch.split(torch.bincount(owners[: int(scale)], minlength=sum(groups)), groups))


def largest_scale(fits: Callable[[float], bool]) -> float:
    """The largest scale that fits, to 12 digits, where smaller ones than a fitting one fit too; 0 if none does."""
    high = 1.0
    while fits(high) and high < 1e18:
        high *= 2
    low = 0.0
    while high - low > 1e-12 * high and high > 1e-300:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def rounded(sizes: Tensor) -> Tensor:
    """Whole numbers with the rounded sum, at least 1: the largest fractions are rounded up."""
    whole = sizes.floor()
    extra = max(int(sizes.sum().round()), 1) - int(whole.sum())
    whole[(sizes - whole).argsort(descending=True, stable=True)[:extra]] += 1
    return whole.to(torch.int64)


@dataclass(frozen=True, eq=False)
class Choice:
    """What became of a layer's items.

    Attributes:
        factors: [G, n], 0 for those that go.
        scheme: Of the sample; "draws" for a guarantee.
        draws: [G] draws, or items, that were wanted.
        whole: [G] groups that are kept as they are, because a guarantee would need at least as many draws.
    """

    factors: Tensor
    scheme: Scheme
    draws: Tensor
    whole: Tensor


def choose(found: Sensitivities, size: Guarantee | Tensor, scheme: Scheme, rng: np.random.Generator) -> Choice:
    """Sample a layer's items: so many [G] of each group, or by as many draws as a guarantee needs.

    Raises:
        InvalidInput: A guarantee of a method that proves nothing, or of one that keeps the largest.
    """
    s, candidates = found.values, found.candidates
    if isinstance(size, Guarantee):
        if scheme == "top":
            raise InvalidInput("keeping the largest guarantees nothing: give a count or a part, or sampling='draws'")
        if found.draws is None:
            raise InvalidInput(f"the method proves nothing, so {size} means nothing to it: give a count or a part")
        whole = found.draws >= candidates
        factors = sample(s, found.draws, "draws", rng)
        return Choice(torch.where(whole.to(s.device)[:, None], 1.0, factors), "draws", found.draws, whole)
    draws, kept = size, found.kept
    if scheme == "draws":
        every = size >= candidates  # no number of draws is sure to find them all
        draws = torch.where(every, size, draws_for(s, torch.minimum(size, candidates)))
        factors = torch.where(every.to(s.device)[:, None], (s > 0).double(), sample(s, draws, "draws", rng))
    elif scheme == "fixed" and kept is not None and int(kept.sum()) < int(size[0]):
        rest = sample(s.masked_fill(kept, 0), size - int(kept.sum()), "fixed", rng)
        factors = torch.where(kept, 1.0, rest)
    else:
        factors = sample(s, size, scheme, rng)
    if found.top is not None:
        top = found.top(size)
        factors = torch.where(top.to(s.device)[:, None], sample(s, size, "top", rng), factors)
        draws = torch.where(top, size, draws)
    return Choice(factors, scheme, draws, torch.zeros(len(size), dtype=torch.bool))
