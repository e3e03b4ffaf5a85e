"""Magnitude pruning: the largest weights stay (Han et al., Learning both weights and connections, NIPS 2015)."""

from dataclasses import dataclass

from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.runs.problem import Problem


@register_pruner("magnitude")
@dataclass(frozen=True)
class Magnitude(Scoring):
    """The largest |w| of each layer, or of the network; needs no data."""

    def score(self, problem: Problem, options: Options) -> Tensor:
        """|W| as stored: a norm behind the layer does not count."""
        return problem.stored[: problem.rows].abs()
