"""Operator norms of weights: of matrices, and of convolutions in the Fourier basis (docs/networks.md)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_DENSE = 4096  # the smaller dimension of the largest matrix to decompose
_OVERSAMPLING = 16  # frequencies for each degree of a convolution's symbol
_EFFORT = 3e10  # frequencies times size³: half a minute


def spectral_norm(A: Tensor) -> float:
    """The largest ‖A‖₂ of matrices [..., m, n]; ‖A‖_F if they are too large to decompose."""
    A = A.detach().to(torch.complex128 if A.is_complex() else torch.float64)
    if min(A.shape[-2:]) > _DENSE:
        return float(torch.linalg.matrix_norm(A).max())
    gram = A @ A.mH if A.shape[-2] <= A.shape[-1] else A.mH @ A
    return float(torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0).sqrt())


def convolution_norm(conv: Convolution, x: Tensor) -> float:
    """A bound on the operator norm: that of the periodic convolution of which it is a part.

    A stride makes channels of the phases. Of an axis with period n and taps 0 to d, N < n frequencies miss at most
    √(1/cos(πd/N)) of the maximum. Too large ones are bounded by √overlap·‖U‖₂ (docs/networks.md).
    """
    weight = conv.weight.detach().double()
    W = weight.reshape(conv.groups, -1, *weight.shape[1:])  # [groups, outputs, inputs, *kernel]
    grid: list[int] = []
    missed = 1.0
    for axis, (stride, dilation) in enumerate(zip(conv.stride, conv.dilation, strict=True)):
        W = W if stride == 1 else _phases(W, 3 + axis, stride, dilation)
        padded = x.shape[axis - len(conv.kernel_size)] + sum(_padding(conv, axis))
        period, degree = -(-padded // stride), W.shape[3 + axis] - 1
        grid.append(min(period, max(1, _OVERSAMPLING * degree)))
        if degree and grid[-1] < period:
            missed /= math.cos(math.pi * degree / grid[-1])
    if math.prod(grid) * conv.groups * min(W.shape[1:3]) ** 3 > _EFFORT:
        uses = math.prod(map(overlap, conv.kernel_size, conv.stride, conv.dilation))
        return math.sqrt(uses * _copies(conv, x)) * spectral_norm(W.flatten(2))
    return math.sqrt(missed * _copies(conv, x)) * _symbol_norm(W, grid)


def _symbol_norm(W: Tensor, grid: list[int]) -> float:
    """max ‖Σ_j W_j e^{−iωj}‖₂ over a grid of frequencies, for W [groups, outputs, inputs, *taps]."""
    halved = (n // 2 + 1 if axis == 0 else n for axis, n in enumerate(grid))  # −ω gives the conjugate
    scaled = [2 * math.pi / n * torch.arange(count) for n, count in zip(grid, halved, strict=True)]
    frequencies = torch.cartesian_prod(*(angles.double() for angles in scaled)).reshape(-1, len(grid))
    taps = torch.cartesian_prod(*(torch.arange(size).double() for size in W.shape[3:])).reshape(-1, len(grid))
    waves = torch.exp(-1j * (frequencies @ taps.T)).to(W.device)
    flat = W.flatten(3).to(waves.dtype)
    step = max(1, 2**22 // math.prod(W.shape[:3]))
    parts = (waves[first : first + step] for first in range(0, len(waves), step))
    return max(spectral_norm((flat @ part.T).movedim(-1, 0)) for part in parts)


def _phases(W: Tensor, axis: int, stride: int, dilation: int) -> Tensor:
    """Taps by their remainder modulo the stride, as channels."""
    shape, taps = list(W.shape), W.shape[axis]
    length = -(-((taps - 1) * dilation + 1) // stride)
    shape[axis] = length * stride
    places = torch.arange(taps, device=W.device) * dilation
    spread = W.new_zeros(shape).index_copy(axis, places, W)
    return spread.reshape(*shape[:axis], length, stride, *shape[axis + 1 :]).movedim(axis + 1, 3).flatten(2, 3)


def _padding(conv: Convolution, axis: int) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
        return total // 2, total - total // 2
    return conv.padding[axis], conv.padding[axis]


def _copies(conv: Convolution, x: Tensor) -> int:
    """How often padding that is not zero repeats an entry, at most."""
    if conv.padding_mode == "zeros":
        return 1
    copies = 1
    for axis, size in enumerate(x.shape[-len(conv.kernel_size) :]):
        entries = torch.arange(size, dtype=torch.float64)[None, None]
        padded = functional.pad(entries, _padding(conv, axis), mode=conv.padding_mode)
        copies *= int(padded.long().flatten().bincount().max())
    return copies


def overlap(size: int, stride: int, dilation: int) -> int:
    """The most windows that an entry can lie in: its places in them differ by multiples of stride/gcd."""
    return -(-size * math.gcd(stride, dilation) // stride)
