"""Magnitude pruning: the largest weights stay (Han et al., Learning both weights and connections, NIPS 2015)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.pruners.views import incoming_of
from convexprune.runs.problem import Problem
from convexprune.runs.run import Run


@register_pruner("magnitude")
@dataclass(frozen=True)
class Magnitude(Scoring):
    """The largest |w| of each layer, or of the network; needs no data.

    Neurons are ranked by the length of their incoming weights, bias and norms included, times that of their outgoing
    ones, which no rescaling between two layers changes.
    """

    def score(self, problem: Problem, options: Options) -> Tensor:
        """|W| as stored: a norm behind the layer does not count."""
        return problem.stored[: problem.rows].abs()

    def worth(self, run: Run, link: Link, scores: Callable[[str], Tensor]) -> Tensor:
        """‖(w_i, b_i)‖·‖outgoing_i‖ of each neuron."""
        incoming = incoming_of(run.model, link)
        outgoing = [scores(name).reshape(len(incoming), -1) for name in link.consumers]
        worth: Tensor = incoming.norm(dim=1) * torch.cat(outgoing, 1).norm(dim=1)
        return worth
