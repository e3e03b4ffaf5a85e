"""Random pruning: what a layer's density alone is worth, for comparison."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.runs.problem import Problem


@register_pruner("random")
@dataclass(frozen=True)
class Random(Scoring):
    """Weights at random, the same for the same seed; needs no data."""

    def score(self, problem: Problem, options: Options) -> Tensor:
        """Uniform numbers that depend on the seed, the layer's name and the group's place in it."""
        place = f"{problem.name} {problem.part[0]:.17g}"
        generator = torch.Generator().manual_seed(options.seed + crc32(place.encode("utf-8", "surrogatepass")))
        return torch.rand(problem.rows, problem.stored.shape[1], generator=generator)
