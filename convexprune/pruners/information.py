"""What neurons are worth by the Fisher information, and what they cost in operations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from convexprune.costs import flops
from convexprune.layers.memory import Batch
from convexprune.network.links import Link
from convexprune.runs.run import Run


@dataclass(eq=False)
class Information:
    """Δ of neurons, ½·mean_n (Σ a·∂L_n/∂a)², gathered from backward passes over batches.

    Attributes:
        model: The network whose layers take the neurons.
        links: The neurons.
        widths: How many each link has.
        sums: Of each link ½·Σ_n (…)² over the samples so far [neurons].
        samples: How many these are.
    """

    model: nn.Module
    links: Mapping[str, Link]
    widths: Mapping[str, int]
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    _batch: dict[str, Tensor] = field(default_factory=dict)  # Σ a·∂L/∂a [samples, neurons] of the layers met so far

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, backward passes are listened to where layers take the neurons."""
        with ExitStack() as stack:
            for name, link in self.links.items():
                for consumer, repeat in zip(link.consumers, link.repeat, strict=True):
                    listen = partial(self._listen, name, repeat)
                    hook = self.model.get_submodule(consumer).register_forward_pre_hook(listen, with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def _listen(self, name: str, repeat: int, module: nn.Module, args: Batch, kwargs: Batch) -> Batch:
        taken = args[0] if args else kwargs["input"]
        a = taken.view_as(taken) if taken.requires_grad else taken.detach().requires_grad_()
        values = a.detach()  # a hook that held the tensor that it belongs to would never be freed

        def add(gradient: Tensor) -> None:
            product = values * gradient
            behind = product.flatten(2).sum(2) if not isinstance(module, nn.Linear) else _summed(product)
            of_neurons = behind.reshape(len(behind), -1, repeat).sum(2).double()
            self._batch[name] = self._batch.get(name, 0) + of_neurons

        if torch.is_grad_enabled():
            a.register_hook(add)
        return ((a, *args[1:]), kwargs) if args else (args, {**kwargs, "input": a})

    def add(self) -> None:
        """Count the batch that was listened to; its loss was the mean over its samples."""
        count = 0
        for name, g in self._batch.items():
            count = len(g)
            self.sums[name] = self.sums.get(name, 0) + (count * g).square().sum(0) / 2
        self.samples += count
        self._batch.clear()

    def mean(self) -> dict[str, Tensor]:
        """Δ [neurons] of each link; 0 of what no loss depends on."""
        zeros = {name: torch.zeros(self.widths[name], dtype=torch.float64) for name in self.links}
        return {name: self.sums.get(name, zeros[name]) / max(self.samples, 1) for name in self.links}

    def reset(self) -> None:
        """Forget all samples."""
        self.sums.clear()
        self.samples = 0


def _summed(product: Tensor) -> Tensor:
    """[samples, ..., features] summed over all positions."""
    return product.reshape(len(product), -1, product.shape[-1]).sum(1)


@dataclass(frozen=True, eq=False)
class OperationCosts:
    """Floating-point operations a sample that go with a neuron.

    Attributes:
        widths: How many neurons each link has.
        dense: Of each layer that has or takes neurons the operations of one sample, with all of them.
        along: The links whose neurons these operations are in proportion to, by layer.
    """

    widths: Mapping[str, int]
    dense: Mapping[str, float]
    along: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, run: Run) -> "OperationCosts":
        """Counted in one forward."""
        counted = flops(run.model, next(iter(run.data or ())), forward=run.forward)
        along: dict[str, list[str]] = {}
        for name, link in run.links.items():
            for layer in (*link.producers, *link.along, *link.consumers):
                along.setdefault(layer, []).append(name)
        rows = {row.name.removesuffix(".weight"): row.dense / counted.samples for row in counted.weights}
        return cls(run.widths(), {layer: rows[layer] for layer in along if layer in rows}, along)

    def of_neurons(self, stays: Mapping[str, Tensor]) -> dict[str, float]:
        """Those of one neuron of each link, where ``stays`` says which of a link's are there; nothing: all."""
        left = {**self.widths, **{name: int(kept.sum()) for name, kept in stays.items()}}
        total = self._total(left)
        return {name: total - self._total({**left, name: count - 1}) for name, count in left.items()}

    def _total(self, left: Mapping[str, int]) -> float:
        """Of all these layers, with so many neurons of each link."""
        parts = {name: count / self.widths[name] for name, count in left.items()}
        return sum(dense * math.prod(parts[name] for name in self.along[layer]) for layer, dense in self.dense.items())
