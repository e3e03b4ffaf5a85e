"""Modules as matrices, samples first, and back; the only place where weights change."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from convexprune.layers.support import supported
from convexprune.solvers.errors import NonFinite, ShapeMismatch


def weight_matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Weights U [N, M] of each group: detached copies, in the module's dtype.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        NonFinite: the weights hold NaN or infinity.
    """
    matrices = tuple(_matrix(weight, bias) for weight, bias in supported(layer).groups(layer))
    if not all(U.isfinite().all() for U in matrices):
        raise NonFinite(f"the weights of this {type(layer).__name__} hold NaN or infinity: load or train it again")
    return matrices


def gradient_matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Gradients by U [N, M] of each group, from the parameters' ``grad``; zeros where there is none.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
    """
    held = {name: p if p is None else p.grad for name, p in layer._parameters.items()}
    zeros = {name: torch.zeros_like(p) for name, p in layer._parameters.items() if p is not None and p.grad is None}
    gradients = SimpleNamespace(**vars(layer) | held | zeros)
    return tuple(_matrix(weight, bias) for weight, bias in supported(layer).groups(gradients))


def input_matrices(layer: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs X [P, N] of each group, from the module's input tensor; may share memory with it.

    Rows run over the leading dimensions of a Linear's ``inputs`` [..., features], and over the samples and positions of
    the output of a convolution, whose ``inputs`` are [samples, channels, height, width] or [channels, height, width],
    with as many axes behind the channels as it has. ``inputs`` of a MultiheadAttention are (query, key, value), each
    [..., features].

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the module could not have taken these inputs.
    """
    kind = supported(layer)
    groups = zip(kind.inputs(layer, inputs), kind.groups(layer), strict=True)
    return tuple(_rows(received, weight.shape[1:], bias is not None) for received, (weight, bias) in groups)


def input_positions(layer: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[torch.Size, ...]:
    """The lengths of the axes that the rows of each group's X run over, the last the fastest: P is their product.

    Raises:
        UnsupportedModule, ShapeMismatch: As ``input_matrices``.
    """
    kind = supported(layer)
    groups = zip(kind.inputs(layer, inputs), kind.groups(layer), strict=True)
    return tuple(received.shape[: received.dim() - weight.dim() + 1] for received, (weight, _) in groups)


def output_matrices(layer: nn.Module, outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The module's own output Y [P, M] of each group, rows as in ``input_matrices``; may share memory with ``outputs``.

    ``outputs`` of a MultiheadAttention are its three projections, each [..., features], which it does not return.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the module could not have returned these outputs.
    """
    computed = supported(layer).outputs(layer, outputs)
    return tuple(Y.reshape(Y.shape[:-1].numel(), Y.shape[-1]) for Y in computed)


def write_back_(layer: nn.Module, weights: Tensor | Sequence[Tensor]) -> None:
    """Put weights U [N, M], one matrix for each group, into the module; the inverse of ``weight_matrices``.

    Values are rounded to the module's dtype. The Parameter objects, their ``requires_grad`` and ``grad`` stay.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the number or the shapes of the matrices differ from ``weight_matrices(layer)``.
        NonFinite: NaN, infinity, or a value beyond the range of the module's dtype. Nothing was changed.
    """
    groups = supported(layer).groups(layer)
    expected = [(weight.shape[1:].numel() + (bias is not None), len(weight)) for weight, bias in groups]
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    found = [tuple(matrix.shape) for matrix in matrices]
    if found != expected:
        shapes = expected[0] if len(set(expected)) == 1 else expected
        takes = f"{len(expected)} weight matrices of shape {shapes}"
        raise ShapeMismatch(f"{type(layer).__name__} takes {takes}; got {found}")
    # Copies: the matrices may be views of the very weights that are written.
    new = [U.detach().to(weight, copy=True) for U, (weight, _) in zip(matrices, groups, strict=True)]
    if not all(U.isfinite().all() for U in new):
        raise NonFinite(f"NaN or infinity as {groups[0][0].dtype}: the {type(layer).__name__} keeps its weights")
    for U, (weight, bias) in zip(new, groups, strict=True):
        weight.copy_(U[: weight.shape[1:].numel()].mT.reshape(weight.shape))
        if bias is not None:
            bias.copy_(U[-1])


def _matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    U = weight.flatten(1).mT
    return U.clone(memory_format=torch.contiguous_format) if bias is None else torch.cat([U, bias[None]])


def _rows(inputs: Tensor, fan_in: torch.Size, biased: bool) -> Tensor:
    """[*positions, *fan-in] as [P, N], with a last column of ones for the bias."""
    positions = inputs.shape[: inputs.dim() - len(fan_in)]
    if not biased:
        return inputs.reshape(positions.numel(), fan_in.numel())
    X = inputs.new_ones(*positions, fan_in.numel() + 1)
    X[..., :-1].view(inputs.shape).copy_(inputs)
    return X.reshape(positions.numel(), fan_in.numel() + 1)
