"""Constants of moves, averages, sums and max pools: how many outputs an entry counts in, and how much."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from convexprune.bounds.calls import Call
from convexprune.bounds.norms import overlap
from convexprune.network.memory import tensors_in


def nonnegative(call: Call, operand: fx.Node) -> float | None:
    """√(largest row sum · largest column sum) of an affine map with entries ≥ 0 (Schur's test)."""
    x = call.run.env[operand]
    if not isinstance(x, Tensor):
        return 1.0  # a part of several tensors
    with torch.enable_grad():
        ones = torch.ones(x.shape, dtype=torch.float64, device=x.device, requires_grad=True)
        images = list(tensors_in(call.recomputed(operand, ones * 1)))
        shifts = list(tensors_in(call.recomputed(operand, torch.zeros_like(ones))))
        if any(image.dtype != torch.float64 for image in images):
            return None
        (columns,) = torch.autograd.grad(torch.stack([image.sum() for image in images]).sum(), ones)
    rows = max(float((image - shift).max()) for image, shift in zip(images, shifts, strict=True))
    return math.sqrt(rows * float(columns.max()))


def max_pool(call: Call, operand: fx.Node) -> float | None:
    """√ of how many windows an entry lies in: a maximum moves no more than the entry that moves most."""
    axes = int(call.operation[-2])
    if not isinstance(call.value, Tensor):
        return None  # with indices, which jump
    x = call.run.env[operand]
    if call.operation.startswith("adaptive"):
        return math.sqrt(math.prod(map(_adaptive_uses, x.shape[-axes:], call.value.shape[-axes:])))
    size = _each(call.given("kernel_size", 1), axes)
    stride = _each(call.given("stride", 2) or size, axes)
    return math.sqrt(math.prod(map(overlap, size, stride, _each(call.given("dilation", 4, 1), axes))))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    listed = (value,) if isinstance(value, int) else tuple(value)
    return listed * (axes // len(listed))


def _adaptive_uses(inputs: int, outputs: int) -> int:
    """Likewise, of windows from ⌊i·n/o⌋ to ⌈(i + 1)·n/o⌉."""
    windows = [range(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]
    return max(sum(entry in window for window in windows) for entry in range(inputs))
