"""How a budget is split over groups and layers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from convexprune.coresets.base import Scores

Allowed = Callable[[Sequence[Tensor]], bool]
"""Whether a budget allows sizes [G] of each layer."""


def proportional(layers: Sequence["Scores"], allowed: Allowed) -> list[Tensor]:
    """Sizes min(candidates, λ·shares), rounded, with the largest λ that is allowed; at least one in each layer."""
    shares = [_shares(scores) for scores in layers]

    def sizes(scale: float) -> list[Tensor]:
        return [rounded(torch.minimum(scale * a, s.candidates.to(a))) for a, s in zip(shares, layers, strict=True)]

    scale = largest_scale(lambda scale: allowed(sizes(scale)))
    found = sizes(scale)
    for number, more in enumerate(sizes(scale * (1 + 1e-9))):  # layers that would all grow here grow one by one
        larger = [*found[:number], more, *found[number + 1 :]]
        found = larger if allowed(larger) else found
    return found


def largest_of_all(layers: Sequence["Scores"], allowed: Allowed) -> list[Tensor]:
    """How many of each group are among the k largest of all, for the most k that is allowed."""
    groups = [len(scores.sensitivities) for scores in layers]
    s = torch.cat([scores.sensitivities.detach().cpu().flatten() for scores in layers])
    lengths = [scores.sensitivities.shape[1] for scores in layers for _ in range(len(scores.sensitivities))]
    owners = torch.arange(sum(groups)).repeat_interleave(torch.tensor(lengths))
    owners = owners[s.argsort(descending=True, stable=True)[: int((s > 0).sum())]]

    def sizes(scale: float) -> list[Tensor]:
        return list(torch.split(torch.bincount(owners[: int(scale)], minlength=sum(groups)), groups))

    return sizes(largest_scale(lambda scale: allowed(sizes(scale))))


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


def _shares(scores: "Scores") -> Tensor:
    shares = scores.candidates if scores.shares is None else scores.shares
    return shares.detach().to("cpu", torch.float64)


def rounded(sizes: Tensor) -> Tensor:
    """Whole numbers with the rounded sum, at least 1: the largest fractions are rounded up."""
    whole = sizes.floor()
    extra = max(int(sizes.sum().round()), 1) - int(whole.sum())
    whole[(sizes - whole).argsort(descending=True, stable=True)[:extra]] += 1
    return whole.to(torch.int64)
