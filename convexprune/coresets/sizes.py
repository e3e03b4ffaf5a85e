"""How much to keep: a ratio, a count or a guarantee, for each layer or for the whole network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from convexprune.coresets.base import Guarantee, Method, Scores
from convexprune.coresets.sampling import Sample, Sampling, draws_for, sample
from convexprune.network.patterns import looked_up, unmatched
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

Size = float | int | Guarantee
"""A float keeps that part of the items, an int so many of them, a ``Guarantee`` as many as it takes."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What became of a layer's items.

    Attributes:
        factors: [G, n], 0 for those that go.
        sampling: How they were chosen.
        asked: [G] draws, or items, that were asked for.
        whole: [G] groups that are kept as they are, because a guarantee would ask for at least as many draws.
    """

    factors: Tensor
    sampling: str
    asked: Tensor
    whole: Tensor


def layer_sizes(size: Size | Mapping[str, Size], names: Sequence[str]) -> dict[str, Size]:
    """The size of each layer from one for all, or from a mapping of name patterns.

    Raises:
        InvalidTolerance: A ratio outside (0, 1], or a count below 1.
        InvalidInput: A layer that no pattern matches, a pattern that matches no layer, or something else than a size.
    """
    if not isinstance(size, Mapping):
        return {name: checked_size(name, size) for name in names}
    found = {name: looked_up(size, name) for name in names}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise InvalidInput(f"size: no pattern among {list(size)} matches {', '.join(missing)}; add one, or '*'")
    if idle := unmatched(size, names):
        raise InvalidInput(f"size: no layer that is to be pruned matches {idle}; there are {', '.join(names)}")
    return {name: checked_size(name, value) for name, value in found.items()}


def checked_size(name: str, size: object) -> Size:
    """The size itself, with Python's numbers for numpy's.

    Raises:
        InvalidTolerance: A ratio outside (0, 1], or a count below 1.
        InvalidInput: Something else than a size.
    """
    if isinstance(size, Guarantee):
        return size
    if isinstance(size, bool) or not isinstance(size, Real):
        raise InvalidInput(f"size of {name}: expected a ratio, a count or a Guarantee(eps, delta), found {size!r}")
    size = int(size) if isinstance(size, Integral) else float(size)  # numpy's numbers, too
    if isinstance(size, int) and size < 1:
        raise InvalidTolerance(f"size of {name}: expected a count ≥ 1, found {size}")
    if isinstance(size, float) and not (math.isfinite(size) and 0 < size <= 1):
        raise InvalidTolerance(f"size of {name}: expected a ratio in (0, 1], or a whole number to keep, found {size}")
    return size


def items_kept(size: float | int, items: int) -> int:
    """How many of so many items a ratio or a count means: at least 1, at most all."""
    return min(items, size) if isinstance(size, int) else max(1, round(size * items))


def choose(
    method: Method, scores: Scores, size: Size | Tensor, rng: np.random.Generator, items: int | None = None
) -> Choice:
    """Sample a layer's items.

    Args:
        method: Its ``sampling``, and how it splits a number of items over groups.
        scores: Of the layer's items.
        size: What to keep, or [G] how many of each group.
        rng: Where randomness comes from.
        items: What a ratio is of; None: the items with a sensitivity.

    Raises:
        InvalidInput: A guarantee of a method that proves nothing, or of one that keeps the largest.
    """
    if isinstance(size, Guarantee):
        return _guaranteed(method, scores, size, rng)
    if not isinstance(size, Tensor):
        budget = items_kept(size, int(scores.candidates.sum()) if items is None else items)
        [size] = method.allocate([scores], lambda sizes: int(sizes[0].sum()) <= budget)
    none = torch.zeros(len(size), dtype=torch.bool)
    s, asked = scores.sensitivities, size
    if method.sampling == "draws":
        every = size >= scores.candidates.cpu()  # no number of draws is sure to find them all
        asked = torch.where(every, size, draws_for(s, torch.minimum(size, scores.candidates.cpu())))
        factors = torch.where(every.to(s.device)[:, None], (s > 0).double(), sample(s, asked, "draws", rng).factors)
    else:
        factors = _fixed(scores, size, method.sampling, rng)
    if scores.top is not None:
        top = scores.top(size)
        factors = torch.where(top.to(s.device)[:, None], sample(s, size, "top", rng).factors, factors)
        asked = torch.where(top, size, asked)
    return Choice(factors, method.sampling, asked, none)


def _fixed(scores: Scores, size: Tensor, how: Sampling, rng: np.random.Generator) -> Tensor:
    s, kept = scores.sensitivities, scores.kept
    if kept is None or how != "fixed" or int(kept.sum()) >= int(size[0]):  # nothing left for the rest
        return sample(s, size, how, rng).factors
    rest = sample(s.masked_fill(kept, 0), size - int(kept.sum()), how, rng).factors
    return torch.where(kept, 1.0, rest)


def _guaranteed(method: Method, scores: Scores, guarantee: Guarantee, rng: np.random.Generator) -> Choice:
    if method.sampling == "top":
        raise InvalidInput("keeping the largest guarantees nothing: give a count or a ratio, or sampling='draws'")
    draws = scores.draws(guarantee).to("cpu", torch.int64)
    whole = draws >= scores.candidates.cpu()
    found: Sample = sample(scores.sensitivities, draws, "draws", rng)
    factors = torch.where(whole.to(found.factors.device)[:, None], 1.0, found.factors)
    return Choice(factors, "draws", draws, whole)


def shared_sizes(
    method: Method, layers: Sequence[Scores], cost: Callable[[Sequence[Tensor]], int], budget: int
) -> list[Tensor]:
    """Sizes [G] of each layer whose cost in weights is within a budget of the whole network.

    Raises:
        InvalidInput: One item a layer is too many already.
    """
    sizes = method.allocate(layers, lambda sizes: cost(sizes) <= budget)
    if cost(sizes) > budget:
        raise InvalidInput(f"size: {cost(sizes):,} weights are the fewest that can be left, {budget:,} were asked for")
    return sizes
