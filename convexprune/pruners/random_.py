"""Random pruning: what a layer's density alone is worth, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.runs.problem import Problem
from convexprune.runs.run import Run


@register_pruner("random")
@dataclass(frozen=True)
class Random(Scoring):
    """Weights, or neurons, at random, the same for the same seed; needs no data."""

    def score(self, problem: Problem, options: Options) -> Tensor:
        """Uniform numbers that depend on the seed, the layer's name and the group's place in it."""
        place = f"{problem.name} {problem.part[0]:.17g}"
        return torch.rand(problem.rows, problem.stored.shape[1], generator=_generator(place, options.seed))

    def worth(self, run: Run, link: Link, scores: Callable[[str], Tensor]) -> Tensor:
        """Of neurons uniform numbers of their own: sums over weights would favour layers whose neurons have many."""
        return torch.rand(run.widths()[link.producer], generator=_generator(link.producer, run.options.seed)).double()


def _generator(place: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + crc32(place.encode("utf-8", "surrogatepass")))
