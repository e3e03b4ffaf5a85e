"""The places in a model where weights are pruned: read as a program's matrices, written back exactly."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from convexprune.layers import input_matrices, weight_matrices, write_back_
from convexprune.nettrim.folding import Fold, folds
from convexprune.network.padding import rows_that_count
from convexprune.network.taps import Received, Tap
from convexprune.solvers.errors import NonFinite


@dataclass(frozen=True, eq=False)
class Site:
    """A weight, the modules that use it, and what follows them.

    Attributes:
        name: Of the first module that uses the weight.
        layer: That module.
        taps: Where inputs are received, one for each module that uses the weight.
        activation: What consumes the outputs, as in ``Observed``.
        norm_name: The BatchNorm that is part of the program, or None.
        norm: The module.
        fit: Name of the fit.
        calls: Calls of a forward, or None where they differ.
        notes: What was found to be otherwise than it seemed.
    """

    name: str
    layer: nn.Module
    taps: tuple[Tap, ...]
    activation: str | None
    norm_name: str | None
    norm: nn.Module | None
    fit: str
    calls: int | None
    notes: tuple[str, ...] = ()

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """One for each group. The norm's scale and statistics never change."""
        bias = getattr(self.layer, "bias", None)
        return folds(self.norm, bias, len(weight_matrices(self.layer)) if self.norm else self.groups)

    @cached_property
    def groups(self) -> int:
        """How many programs the layer is."""
        return len(weight_matrices(self.layer))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's weight; of attention's projections all that are stored."""
        weight = getattr(self.layer, "weight", None)
        if isinstance(weight, Tensor):
            return tuple(weight.shape)
        first, *rest = (W.shape for W in weight_matrices(self.layer))
        return (first[1] + sum(shape[1] for shape in rest), first[0] - has_bias(self.layer))

    @property
    def weights(self) -> int:
        """How many there are, biases not counted."""
        return sum((len(W) - has_bias(self.layer)) * W.shape[1] for W in weight_matrices(self.layer))

    @property
    def fan_in(self) -> tuple[int, ...]:
        """How many inputs a neuron of each group has, the bias not counted."""
        return tuple(len(W) - has_bias(self.layer) for W in weight_matrices(self.layer))

    @property
    def biased(self) -> bool:
        """Whether the last row of the weights is a bias."""
        return self.norm is not None or has_bias(self.layer)

    def read(self) -> tuple[Tensor, ...]:
        """The stored weights of each group [N, M]; with a norm its shift β is the last row."""
        stored = weight_matrices(self.layer)
        if self.norm is None:
            return stored
        shifts = self.norm.get_parameter("bias").detach().chunk(len(stored))
        kept = (W[:-1] if has_bias(self.layer) else W for W in stored)
        return tuple(torch.cat([W, beta[None].to(W)]) for W, beta in zip(kept, shifts, strict=True))

    def write_(self, stored: Sequence[Tensor]) -> None:
        """Put weights as ``read`` gives them into the model.

        Raises:
            NonFinite: NaN, infinity, or a value beyond the range of the module's dtype. Nothing was changed.
        """
        if self.norm is None:
            write_back_(self.layer, list(stored))
            return
        shift = torch.cat([U[-1] for U in stored])
        if not bool(shift.isfinite().all()):
            raise NonFinite(f"NaN or infinity as shift of {self.norm_name!r}: {self.name!r} keeps its weights")
        weights = [U[:-1] for U in stored]
        if has_bias(self.layer):
            weights = [torch.cat([W, old[-1:]]) for W, old in zip(weights, weight_matrices(self.layer), strict=True)]
        write_back_(self.layer, weights)
        with torch.no_grad():
            self.norm.get_parameter("bias").copy_(shift)

    def inputs(self, raw: Received, counts: Sequence[Tensor | None] = ()) -> tuple[Tensor, ...]:
        """X [P, N] of each group from a module's raw input, with a last column of ones where there is a bias.

        Args:
            raw: The module's raw input.
            counts: For each group which rows count, Boolean; None, and none at all: all of them.
        """
        matrices = rows_that_count(input_matrices(self.layer, raw), counts)
        if self.norm is None or has_bias(self.layer):
            return matrices
        return tuple(torch.cat([X, X.new_ones(len(X), 1)], dim=1) for X in matrices)

    def parameters(self) -> list[nn.Parameter]:
        """All that ``write_`` may change."""
        own = list(self.layer.parameters(recurse=False))
        return own if self.norm is None else [*own, self.norm.get_parameter("bias")]


def has_bias(layer: nn.Module) -> bool:
    """Whether the layer adds a bias of its own."""
    return getattr(layer, "bias", None) is not None or getattr(layer, "in_proj_bias", None) is not None


@dataclass(frozen=True, eq=False)
class Versions:
    """The parameters of the sites as they were when this was made, beside what they are now."""

    sites: Mapping[str, Site]
    trained: list[tuple[nn.Parameter, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        own = {id(p): p for site in self.sites.values() for p in site.parameters()}
        object.__setattr__(self, "trained", [(p, p.detach().clone()) for p in own.values()])

    def restore_(self) -> None:
        """Put the trained values back."""
        with torch.no_grad():
            for parameter, value in self.trained:
                parameter.copy_(value)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """If the body raises, everything is as trained."""
        try:
            yield
        except BaseException:
            self.restore_()
            raise

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Inside, the model is as it was trained; afterwards as it is now."""
        now = [parameter.detach().clone() for parameter, _ in self.trained]
        self.restore_()
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(self.trained, now, strict=True):
                    parameter.copy_(value)
