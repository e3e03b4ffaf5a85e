"""One layer by hand: its program from its module and its inputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from convexprune.layers import input_matrices, input_positions, weight_matrices
from convexprune.network.padding import layouts, read_masks
from convexprune.options import Options
from convexprune.runs.fits import layer_fit
from convexprune.runs.layer import Fold, has_bias
from convexprune.runs.problem import Problem
from convexprune.solvers import LayerProgram
from convexprune.solvers.arrays import as_matrix, checked_radius, working_dtype
from convexprune.solvers.errors import EmptyInput, InvalidInput


def layer_program(
    layer: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    eps: float = 0.1,
    *,
    options: Options | None = None,
    group: int | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
) -> LayerProgram:
    """The program that sparsifies one layer: minimise ‖U‖₁ while X U stays within eps·‖Y‖_F of the layer's output.

    Args:
        layer: A Linear, Conv1d, Conv2d or Conv3d, a Conv1D of the Transformers library, or a MultiheadAttention.
        inputs: The module's own input tensor, or several of them.
        eps: Relative to ‖Y‖_F.
        options: As for ``prune_``: ``fit`` ("relu-ball" or "net-trim" where a ReLU follows, "ball" elsewhere, or a
            ``LayerFit``; None: "relu-ball"), ``penalty``, ``ceiling``, ``penalise_bias``.
        group: Which group of a grouped convolution; each is a program of its own.
        mask: One for each of ``inputs``, [samples, positions] with 1 where a position counts and 0 where not: rows at
            the others are left out. Where lengths of axes allow for several layouts, samples come first.

    Raises:
        UnsupportedModule, ShapeMismatch, NonFinite, EmptyInput: The layer or its inputs cannot be used.
        InvalidTolerance: eps is negative, NaN or infinite.
        InvalidInput: Unknown fit, a group that the layer does not have, or a mask that does not fit its inputs.
    """
    weights = weight_matrices(layer)
    if group is None and len(weights) > 1:
        raise InvalidInput(f"the layer has {len(weights)} groups, each a program of its own: choose one with group=")
    if not 0 <= (group or 0) < len(weights):
        raise InvalidInput(f"group: expected one of 0 to {len(weights) - 1}, found {group}")
    W = weights[group or 0]
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not tensors:
        raise EmptyInput("inputs: expected at least one tensor, found none")
    masks = [None] * len(tensors) if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(tensors):
        raise InvalidInput(f"mask: expected one for each of {len(tensors)} inputs, found {len(masks)}")
    parts = [_rows(layer, tensor, visible, group or 0) for tensor, visible in zip(tensors, masks, strict=True)]
    chosen = replace((options or Options()).checked(), mode="parallel")
    X, fit = torch.cat(parts).to(W.device), layer_fit(chosen.fit or "relu-ball")
    own = W.to(working_dtype(W.dtype))
    Y = fit.targets(as_matrix("inputs of the layer", X).to(own.dtype) @ own)
    problem = Problem("layer", X, Y, W, Fold(), has_bias(layer), fit, len(X))
    return problem.program(problem.within(checked_radius("eps", eps), chosen)[0], problem.penalty(chosen))


def _rows(layer: nn.Module, inputs: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """X [P, N] of a group, of the rows that a mask does not hide."""
    X = input_matrices(layer, inputs)[group]
    if mask is None:
        return X
    [visible], _, _ = read_masks(inputs, lambda _: mask)
    assert visible is not None  # noqa: S101 - what is no mask was refused
    axes = input_positions(layer, inputs)[group]
    layout = next(layouts(axes, visible.shape), None)
    if layout is None:
        raise InvalidInput(f"mask: expected samples and positions among rows {list(axes)}, found {list(visible.shape)}")
    return X[layout.spread(visible, axes).reshape(-1).to(X.device)]
