"""A layer as it is pruned: a weight, the modules that use it, what follows them, and the way to matrices and back.

A BatchNorm behind a layer may be part of the layer's program. In eval mode BN(XW + b) = X(W∘s) + (b − μ)∘s + β with
s = γ/σ, so the program of the layer with its norm has the weights W∘s and the shift (b − μ)∘s + β as its bias. In the
model W keeps the zeros and the shift goes into β; b, γ and the running statistics stay.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from convexprune.layers import weight_matrices, write_back_
from convexprune.network.taps import Tap
from convexprune.runs.fits import LayerFit
from convexprune.solvers.errors import NonFinite


@dataclass(frozen=True, eq=False)
class Fold:
    """The way between weights as they are stored and those of the program; nothing to do without a norm.

    Attributes:
        scale: s [M], or None without a norm.
        offset: (b − μ)∘s [M].
    """

    scale: Tensor | None = None
    offset: Tensor | None = None

    def apply(self, stored: Tensor) -> Tensor:
        """The program's weights [N, M]: W∘s, and in the last row β + (b − μ)∘s for a stored β."""
        if self.scale is None or self.offset is None:
            return stored
        W = stored * self.scale.to(stored)
        W[-1] = stored[-1] + self.offset.to(stored)
        return W

    def undo(self, U: Tensor) -> Tensor:
        """The weights to store; those behind a scale of 0 have no effect, and are 0."""
        if self.scale is None or self.offset is None:
            return U
        s = self.scale.to(U)
        stored = torch.where(s == 0, 0.0, U / torch.where(s == 0, 1.0, s))
        stored[-1] = U[-1] - self.offset.to(U)
        return stored


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, the modules that use it, and what follows them.

    Attributes:
        name: Of the first module that uses the weight.
        module: That module.
        taps: Where inputs are received, one for each module that uses the weight.
        activation: What consumes the outputs, as in ``Observed``; None where nothing is known.
        norm_name, norm: The BatchNorm that is part of the program, and the module; or None.
        fit: How its errors are measured.
        calls: Calls of a forward, or None where they differ or are not known.
        notes: What was found to be otherwise than it seemed.
    """

    name: str
    module: nn.Module
    taps: tuple[Tap, ...]
    activation: str | None
    norm_name: str | None
    norm: nn.Module | None
    fit: LayerFit
    calls: int | None
    notes: tuple[str, ...] = ()

    @cached_property
    def norm_scale(self) -> Tensor:
        """s = γ/σ [M] of the norm, in float64; it never changes, nor do the statistics."""
        assert self.norm is not None  # noqa: S101 - who asks has looked
        gamma, variance = self.norm.get_parameter("weight").detach().double(), self.norm.get_buffer("running_var")
        scale: Tensor = gamma / (variance.double() + float(self.norm.eps)).sqrt()  # type: ignore[arg-type]
        return scale

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """One for each group, computed in float64."""
        if self.norm is None:
            return (Fold(),) * self.groups
        mean, bias = self.norm.get_buffer("running_mean").double(), getattr(self.module, "bias", None)
        offset, scale = ((0.0 if bias is None else bias.detach().double()) - mean) * self.norm_scale, self.norm_scale
        return tuple(Fold(s, c) for s, c in zip(scale.chunk(self.groups), offset.chunk(self.groups), strict=True))

    @cached_property
    def groups(self) -> int:
        """How many programs the layer is: groups of a convolution, projections of attention."""
        return len(weight_matrices(self.module))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's weight; of attention's projections all that are stored."""
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor):
            return tuple(weight.shape)
        first, *rest = (W.shape for W in weight_matrices(self.module))
        return (first[1] + sum(shape[1] for shape in rest), first[0] - has_bias(self.module))

    @cached_property
    def weights(self) -> int:
        """How many there are, biases not counted."""
        return sum((len(W) - has_bias(self.module)) * W.shape[1] for W in weight_matrices(self.module))

    @cached_property
    def fan_in(self) -> tuple[int, ...]:
        """How many inputs a neuron of each group has, the bias not counted."""
        return tuple(len(W) - has_bias(self.module) for W in weight_matrices(self.module))

    @property
    def kernel(self) -> int:
        """How many weights one neuron has for one channel of its inputs: a convolution's positions, else 1."""
        weight = getattr(self.module, "weight", None)
        return weight[0, 0].numel() if isinstance(weight, Tensor) and weight.dim() > 2 else 1

    @property
    def biased(self) -> bool:
        """Whether the last row of the weights is a bias."""
        return self.norm is not None or has_bias(self.module)

    def read(self) -> tuple[Tensor, ...]:
        """The stored weights of each group [N, M]; with a norm its shift β is the last row."""
        stored = weight_matrices(self.module)
        if self.norm is None:
            return stored
        shifts = self.norm.get_parameter("bias").detach().chunk(len(stored))
        kept = (W[:-1] if has_bias(self.module) else W for W in stored)
        return tuple(torch.cat([W, beta[None].to(W)]) for W, beta in zip(kept, shifts, strict=True))

    def write_(self, stored: Sequence[Tensor]) -> None:
        """Put weights as ``read`` gives them into the model.

        Raises:
            NonFinite: NaN, infinity, or a value beyond the range of the module's dtype. Nothing was changed.
        """
        if self.norm is None:
            write_back_(self.module, list(stored))
            return
        shift = torch.cat([U[-1] for U in stored])
        if not bool(shift.isfinite().all()):
            raise NonFinite(f"NaN or infinity as shift of {self.norm_name!r}: {self.name!r} keeps its weights")
        weights = [U[:-1] for U in stored]
        if has_bias(self.module):
            weights = [torch.cat([W, old[-1:]]) for W, old in zip(weights, weight_matrices(self.module), strict=True)]
        write_back_(self.module, weights)
        with torch.no_grad():
            self.norm.get_parameter("bias").copy_(shift)

    def inputs(self, matrices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """X [P, N] of each group from the module's matrices, with a column of ones for the shift of a norm, too."""
        if self.norm is None or has_bias(self.module):
            return matrices
        return tuple(torch.cat([X, X.new_ones(len(X), 1)], dim=1) for X in matrices)

    def parameters(self) -> list[nn.Parameter]:
        """All that ``write_`` may change."""
        own = list(self.module.parameters(recurse=False))
        return own if self.norm is None else [*own, self.norm.get_parameter("bias")]


def has_bias(module: nn.Module) -> bool:
    """Whether the module adds a bias of its own."""
    return getattr(module, "bias", None) is not None or getattr(module, "in_proj_bias", None) is not None


class Versions:
    """The parameters of layers as they were when this was made, beside what they are now."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._tensors, self._trained = dict[int, Tensor](), list[Tensor]()
        self.watch(parameter for layer in layers.values() for parameter in layer.parameters())

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Remember other tensors, too, as they are now."""
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in self._tensors}
        self._tensors |= new
        self._trained += [tensor.detach().clone() for tensor in new.values()]

    def _now(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors.values()]

    def _put_(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors.values(), values, strict=True):
                tensor.copy_(value)

    def restore_(self) -> None:
        """Put the trained values back."""
        self._put_(self._trained)

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
        now = self._now()
        self.restore_()
        try:
            yield
        finally:
            self._put_(now)
