"""SynFlow: weights by what flows through them from all inputs to all outputs, without data.

Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving synaptic flow,
NeurIPS 2020, algorithm 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from convexprune.layers.kinds import NORMS
from convexprune.layers.memory import mapped, samples_at, tensors_in
from convexprune.pruners.gradients import GradientScoring, Schedule
from convexprune.pruners.pruner import register_pruner
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput


@register_pruner("synflow")
@dataclass(frozen=True)
class SynFlow(GradientScoring):
    """Iterative synaptic flow: w·∂R/∂w for R = Σf(1) with all weights |w|, scored anew in each round; needs no data.

    Args:
        rounds: How often weights are scored.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
        norms_as: What batch norms become: "scale", |γ|/σ without a shift, or "identity".
        shape: Of one input, without the samples; () takes it from the calibration data.
    """

    rounds: int = 100
    schedule: Schedule = "exponential"
    norms_as: Literal["scale", "identity"] = "scale"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shape, tuple | list) or not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise InvalidInput(f"shape: expected that of one input, such as (3, 32, 32), found {self.shape!r}")

    def prepare_(self, model: nn.Module) -> None:
        """|w| for all parameters and buffers, and batch norms without a shift."""
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.abs().where(tensor.isfinite(), tensor))  # -inf hides positions
        for norm in (module for module in model.modules() if isinstance(module, NORMS)):
            values = {"bias": 0.0, "running_mean": 0.0}
            if self.norms_as == "identity":
                values |= {"weight": 1.0, "running_var": 1.0 - norm.eps}
            for name, value in values.items():
                if (tensor := getattr(norm, name)) is not None:
                    tensor.fill_(value)

    def objective(self, model: nn.Module, run: Run) -> Tensor:
        """R, the sum of all outputs for one input of ones; whole numbers such as tokens stay as they are."""
        if self.shape:
            ones: object = torch.ones(1, *self.shape)
        elif run.data is not None:
            sample = samples_at(next(iter(run.data)), slice(1))
            ones = mapped(sample, lambda t: torch.ones_like(t) if t.is_floating_point() else t)
        else:
            raise InvalidInput("synflow: give calibration data, or the shape of an input: SynFlow(shape=(3, 32, 32))")
        outputs = tensors_in(self.outputs(model, run, ones))
        return torch.stack([tensor.sum() for tensor in outputs if tensor.is_floating_point()]).sum()
