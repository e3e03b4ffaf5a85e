"""GraSP: weights by what their removal would do to the flow of gradients, before the network is trained.

Wang, Zhang and Grosse, Picking winning tickets before training by preserving gradient flow, ICLR 2020, algorithm 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from convexprune.pruners.gradients import LossScoring, Schedule, Statistics
from convexprune.pruners.pruner import register_pruner
from convexprune.runs.run import Run
from convexprune.solvers.arrays import checked_positive


@register_pruner("grasp")
@dataclass(frozen=True)
class GraSP(LossScoring):
    """Gradient signal preservation: the largest w·(Hg) stay, H the Hessian and g the gradient of the loss.

    To first order the removal of w changes gᵀg by −2w·(Hg): where w·(Hg) is positive the weight carries gradients, and
    where it is negative its removal makes them larger, so the sign counts. H and g are those of the weights of the
    layers that are pruned.

    Args:
        per_class: Samples of each class that are looked at, the first ones; 0: all.
        temperature: What outputs are divided by before the loss, so that a softmax is not saturated.
        statistics: Of batch norms: "running", or "batch", as for a network at initialisation.
        rounds: How often weights are scored; once as published.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
    """

    per_class: int = 10
    temperature: float = 200.0
    statistics: Statistics = "running"
    rounds: int = 1
    schedule: Schedule = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_positive("temperature", self.temperature)

    def differentiate_(self, model: nn.Module, run: Run) -> None:
        """With attention by plain products, for its fused kernels cannot be differentiated twice."""
        with sdpa_kernel(SDPBackend.MATH):
            super().differentiate_(model, run)

    def objective(self, model: nn.Module, run: Run) -> Iterator[Tensor]:
        """ḡᵀg(w), batch by batch, with ḡ the gradient of all batches, a constant: its gradient is Hḡ."""
        layers = [model.get_submodule(name) for name in run.layers]
        own = [named for layer in layers for named in layer.named_parameters(recurse=False)]
        weights = [parameter for name, parameter in own if name.endswith("weight")]
        fixed = [torch.zeros_like(weight) for weight in weights]
        for loss in self.losses(model, run, self.temperature):
            for so_far, each in zip(fixed, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
                so_far += each
        for loss in self.losses(model, run, self.temperature):
            g = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            yield torch.stack([(each * now).sum() for each, now in zip(fixed, g, strict=True)]).sum()

    def scored(self, W: Tensor, G: Tensor) -> Tensor:
        """W∘(Hg), signs included."""
        return W * G
