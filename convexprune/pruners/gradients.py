"""Pruners that score weights by gradients of a function of the whole network, such as its loss.

A new one is a class with ``objective``, or ``scored`` where scores are another function of weights and gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from convexprune.layers import gradient_matrices, weight_matrices, write_back_
from convexprune.layers.kinds import NORMS
from convexprune.layers.memory import Batch, mapped, samples_at, samples_of
from convexprune.network.calibration import Fitting
from convexprune.network.forwards import call_model, copy_for, evaluating
from convexprune.options import Options
from convexprune.pruners.scoring import Scores, Scoring, largest, masked
from convexprune.pruners.sizes import compared_counts
from convexprune.runs.data import Data
from convexprune.runs.run import Run
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.targets import Target

Schedule = Literal["exponential", "linear"]
Statistics = Literal["running", "batch"]


class GradientScoring(Scoring):
    """Base of pruners that score weights by |w·∂R/∂w| in float64, R any function of the whole network.

    In each of the rounds the weights of the smallest scores go from a copy of the model, and those that stay are scored
    anew. Neurons and patterns are chosen by the scores of the whole network, in one round.

    Attributes:
        rounds: How often weights are scored.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
    """

    rounds: int = 1
    schedule: Schedule = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count("rounds", self.rounds)

    def default_mode(self, target: Target, options: Options) -> str | None:
        """All layers are scored at once, from the network as it is."""
        return None if options.refit else "parallel"

    def prepare_(self, model: nn.Module) -> None:
        """Change the copy of the model that is scored."""

    def objective(self, model: nn.Module, run: Run) -> Tensor | Iterator[Tensor]:
        """R, a number, or numbers one by one that sum to it; gradients are taken of each before the next is made."""
        raise NotImplementedError

    def differentiate_(self, model: nn.Module, run: Run) -> None:
        """Leave in the ``grad`` of the copy's parameters what ``scored`` takes: the gradients of R.

        Raises:
            NonFinite: R is not finite.
        """
        found = self.objective(model, run)
        for R in [found] if isinstance(found, Tensor) else found:
            if not bool(R.isfinite()):
                raise NonFinite(f"{type(self).__name__}: R, whose gradients score weights, is {float(R.detach())}")
            R.backward()  # type: ignore[no-untyped-call]

    def scored(self, W: Tensor, G: Tensor) -> Tensor:
        """Scores [N, M] from weights W and their gradients G [N, M]: |W∘G|."""
        return (W * G).abs()

    def outputs(self, model: nn.Module, run: Run, batch: Batch) -> Batch:
        """What the copy, which computes in float64, returns for a batch."""
        forward = replace(run.forward, dtype=None) if isinstance(run.forward, Fitting) else run.forward
        batch = mapped(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return call_model(model, copy_for(model, batch), forward)

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores]:
        """Scores of the last round; −∞ for weights that went before."""
        counts, fan_in = compared_counts(run.layers, target), {name: layer.fan_in for name, layer in run.layers.items()}
        with evaluating(run.model):
            model = deepcopy(run.model).double()
            self.prepare_(model)
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            scores = self._scored(model, run, fan_in)
            for e in range(1, self.rounds if counts else 1):
                keep = dict[str, Scores]()
                for names, count in counts.items():
                    keep |= largest(pool := {name: scores[name] for name in names}, self._count(pool, count, e))
                for name, masks in keep.items():
                    layer = model.get_submodule(name)
                    write_back_(layer, [masked(W, mask) for W, mask in zip(weight_matrices(layer), masks, strict=True)])
                scores = self._scored(model, run, fan_in)
                for name, masks in keep.items():
                    pairs = zip(scores[name], masks, strict=True)
                    scores[name] = tuple(S.where(mask, -torch.inf) for S, mask in pairs)
        return scores

    def _scored(self, model: nn.Module, run: Run, fan_in: Mapping[str, Sequence[int]]) -> dict[str, Scores]:
        model.zero_grad()
        with torch.enable_grad():
            self.differentiate_(model, run)
        found, zeros = dict[str, Scores](), run.options.keep_zeros
        for name, inputs in fan_in.items():
            layer = model.get_submodule(name)
            groups = zip(weight_matrices(layer), gradient_matrices(layer), inputs, strict=True)
            scores = [(W[:rows], self.scored(W[:rows], G[:rows])) for W, G, rows in groups]
            found[name] = tuple((S.where(W != 0, -torch.inf) if zeros else S).cpu() for W, S in scores)
        return found

    def _count(self, pool: Mapping[str, Scores], final: int, e: int) -> int:
        """How many weights stay after round e."""
        total = sum(S.numel() for scores in pool.values() for S in scores)
        rho, part = final / total, e / self.rounds
        return max(final, round(total * (rho**part if self.schedule == "exponential" else 1 - (1 - rho) * part)))


class LossScoring(GradientScoring):
    """Base of pruners that score weights by a loss on labelled data.

    Attributes:
        per_class: Samples of each class that are looked at, the first ones; 0: all samples.
        statistics: Of batch norms: "running", those of the trained network, or "batch", those of the samples looked at,
            as at initialisation, where the running ones say nothing yet.
    """

    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    per_class: int = 0
    statistics: Statistics = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count("per_class", self.per_class, least=0)

    def prepare_(self, model: nn.Module) -> None:
        """Batch norms in train mode, if the statistics are those of the batch."""
        for norm in (module for module in model.modules() if isinstance(module, NORMS)):
            norm.train(self.statistics == "batch")

    def losses(self, model: nn.Module, run: Run, divisor: float = 1.0) -> Iterator[Tensor]:
        """Of each batch the sum of its samples' losses, of outputs divided by ``divisor``."""
        for batch, labels in self.samples(run):
            outputs = mapped(self.outputs(model, run, batch), lambda t: t / divisor if t.is_floating_point() else t)
            yield samples_of(batch) * source(run).loss_of(outputs, labels)

    def samples(self, run: Run) -> Iterator[tuple[Batch, Tensor]]:
        """Labelled batches: of all samples, or of the first ones of each class.

        Raises:
            InvalidInput: Labels are no classes, and samples of each were wanted.
        """
        found: dict[object, int] = {}
        for batch, labels in source(run).labelled():
            if not self.per_class:
                yield batch, labels
                continue
            if labels.dim() != 1 or labels.is_floating_point():
                raise InvalidInput(
                    f"per_class: expected a class for each sample, found labels {labels.dtype} {list(labels.shape)}; "
                    "give per_class=0 to look at all samples"
                )
            chosen = []
            for place, label in enumerate(labels.tolist()):
                found[label] = found.get(label, 0) + 1
                if found[label] <= self.per_class:
                    chosen.append(place)
            if chosen:
                yield samples_at(batch, chosen), labels[chosen]


def source(run: Run) -> Data:
    """The data as they were given, with labels: a method that needs them is not called without."""
    assert run.source is not None  # noqa: S101 - ``Request`` has checked it
    return run.source
