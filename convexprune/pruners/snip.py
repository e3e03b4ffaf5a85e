"""SNIP: weights by how much the loss changes with each, before the network is trained.

Lee, Ajanthan and Torr, SNIP: Single-shot network pruning based on connection sensitivity, ICLR 2019, equation 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from convexprune.pruners.gradients import LossScoring, Schedule, Statistics
from convexprune.pruners.pruner import register_pruner
from convexprune.runs.run import Run


@register_pruner("snip")
@dataclass(frozen=True)
class Snip(LossScoring):
    """Connection sensitivity: |w·∂L/∂w| of the loss L on labelled data, which is |∂L/∂c| of a factor c of the weight.

    Args:
        per_class: Samples of each class that are looked at, the first ones; 0: all.
        statistics: Of batch norms: "running", or "batch", as for a network at initialisation.
        rounds: How often weights are scored; once as published.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
    """

    per_class: int = 10
    statistics: Statistics = "running"
    rounds: int = 1
    schedule: Schedule = "exponential"

    def objective(self, model: nn.Module, run: Run) -> Iterator[Tensor]:
        """L, batch by batch."""
        return self.losses(model, run)
