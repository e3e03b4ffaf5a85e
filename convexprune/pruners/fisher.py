"""Fisher pruning: neurons and weights by the increase of the loss that a second-order expansion predicts.

Theis, Korshunova, Tejani and Huszár, Faster gaze prediction with dense networks and Fisher pruning, 2018, equations 8
and 11; Crowley, Turner, Storkey and O'Boyle, Pruning neural networks: is it time to nip it in the bud?, 2018. For
single weights it is the diagonal Fisher information of LeCun, Denker and Solla, Optimal brain damage, 1990.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from convexprune.layers.memory import samples_at
from convexprune.network.forwards import evaluating
from convexprune.options import Options
from convexprune.pruners.finetuning import FineTuning, crop_and_flip
from convexprune.pruners.gradients import LossScoring, source
from convexprune.pruners.information import Information, OperationCosts
from convexprune.pruners.neurons import Worth
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scores
from convexprune.runs.run import Run
from convexprune.solvers.arrays import as_number, checked_count, checked_positive, checked_radius
from convexprune.solvers.errors import InvalidTolerance
from convexprune.targets import Neurons, Target

Augmentation = Literal["none", "crop and flip"]


@register_pruner("fisher")
@dataclass(frozen=True)
class Fisher(LossScoring):
    """Fisher pruning: the neuron of the least Δ = ½·mean_n (Σ a·∂L_n/∂a)² goes, time after time while fine-tuning.

    a are the neuron's outputs for sample n, summed over positions, L_n the sample's loss. In training mode Δ is
    gathered over ``steps`` steps of stochastic gradient descent; then the neuron of the least Δ − beta·C goes, and all
    Δ are gathered anew, until as many stay as the target says. A layer may lose all its neurons where the outputs still
    depend on the inputs without it, as in a residual block, of which the shortcut stays. Single weights go at once, by
    ½·w²·mean_n (∂L_n/∂w)².

    Args:
        steps: Of fine-tuning between two removals of a neuron; 0: all go at once, by one pass without fine-tuning.
        learning_rate: Of stochastic gradient descent, the same in all steps.
        momentum: Its momentum.
        weight_decay: Its ℓ2 penalty.
        beta: What one floating-point operation a sample counts, in units of the loss: C are those that go with the
            neuron. 0 as in the second paper.
        augment: "crop and flip": each training image [samples, channels, height, width] is moved by up to 4 pixels,
            with zeros beyond its border, and mirrored half of the time.
    """

    steps: int = 100
    learning_rate: float = 8e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    beta: float = 0.0
    augment: Augmentation = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count("steps", self.steps, least=0)
        checked_positive("learning_rate", self.learning_rate)
        checked_radius("weight_decay", self.weight_decay)
        checked_radius("beta", self.beta)
        if not 0 <= as_number("momentum", self.momentum) < 1:
            raise InvalidTolerance(f"momentum: expected a number from 0 to below 1, found {self.momentum}")

    def tunes(self, target: Target) -> bool:
        """Whether the network is fine-tuned while neurons go."""
        return self.steps > 0 and isinstance(target, Neurons)

    def refuses(self, target: Target, options: Options) -> str | None:
        """A refit would take fine-tuned weights back to what the trained network computed."""
        if self.tunes(target) and options.refit:
            return "refit: weights are fine-tuned, and not fitted again to what the trained network computes; steps=0"
        return super().refuses(target, options)

    def prune(self, run: Run, target: Target) -> None:
        """Fine-tune and remove, or score, choose and write."""
        if not self.tunes(target):
            super().prune(run, target)
            return
        assert isinstance(target, Neurons)  # noqa: S101 - what ``tunes`` has said
        make = partial(SGD, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)
        augment = crop_and_flip if self.augment != "none" else None
        with torch.inference_mode(False):  # what is made in it could not be used with autograd
            FineTuning(run, target, self.steps, make, augment, self.beta).run_()

    # At once

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores]:
        """Of weights; neurons have scores of their own."""
        return {} if isinstance(target, Neurons) else super().score_network(run, target)

    def differentiate_(self, model: nn.Module, run: Run) -> None:
        """mean_n (∂L_n/∂w)², sample by sample, in the place of gradients."""
        squares, count = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
        for batch, labels in self.samples(run):
            for place in range(len(labels)):
                model.zero_grad()
                outputs = self.outputs(model, run, samples_at(batch, [place]))
                source(run).loss_of(outputs, labels[place : place + 1]).backward()  # type: ignore[no-untyped-call]
                count += 1
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        squares[name] += parameter.grad.square()
        for name, parameter in model.named_parameters():
            parameter.grad = squares[name] / count

    def scored(self, W: Tensor, G: Tensor) -> Tensor:
        """½·W²∘G, the increase of the loss by the diagonal of the Fisher information."""
        return W.square() * G / 2

    def worths(self, run: Run, found: Mapping[str, Scores]) -> dict[str, Worth]:
        """Δ − beta·C of all neurons, from one pass in evaluation mode."""
        with evaluating(run.model):
            model = deepcopy(run.model).double()
            information = Information(model, run.links, run.widths())
            with torch.enable_grad(), information.gathered():
                for batch, labels in self.samples(run):
                    source(run).loss_of(self.outputs(model, run, batch), labels).backward()  # type: ignore[no-untyped-call]
                    information.add()
        costs = OperationCosts.of(run).of_neurons({}) if self.beta else dict.fromkeys(run.links, 0.0)
        deltas = {name: delta - self.beta * costs[name] for name, delta in information.mean().items()}
        return {name: [(value, 0.0) for value in delta.tolist()] for name, delta in deltas.items()}
