"""How much of an output a weight, or a neuron, makes up at most on a sample of inputs, for CoreNet, SiPP and PFP.

An output's positive weights and its negative ones are two sums z± = Σ_k w_k a_k of terms of one sign, and a weight's
share of its sum is g_k = w_k a_k/z±, a number in [0, 1]. Inputs of both signs are two inputs of one sign each, a⁺ and
−a⁻, as in the authors' code (torchprune). There a sum |z| of at most the precision of float32 counts as none; here only
a sum of 0 does, so that no scale of weights or inputs changes a share.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from convexprune.pruners.views import by_sign
from convexprune.report.report import Assumption
from convexprune.solvers.arrays import blocks_of
from convexprune.solvers.errors import ShapeMismatch

Share = Literal["largest", "sum"]
"""A neuron's share of an output: that of its largest weight, or of all its weights together."""

_CACHED = 16  # blocks so much smaller than those of a single pass stay in a cache while every output reads them
_CANCELLED = 1e-12  # |Σwa|/Σ|wa|: a sum of some thousand terms that is smaller may be rounding


def edge_sensitivities(U: Tensor, X: Tensor, patches: int = 1, mean_over_patches: bool = False) -> Tensor:
    """s [2M, N], in float64: the largest share of each weight of U [N, M] over inputs X [P, N]; rows as ``by_sign``.

    O(PNM) time; X is read in blocks of rows, so that memory does not grow with P.

    Args:
        U: Weights, without the bias.
        X: Inputs.
        patches: Rows of X that one sample has, one after another.
        mean_over_patches: Whether a share of a sample is the mean over its rows (0 in one where the sum is 0);
            otherwise it is the largest.

    Raises:
        ShapeMismatch: X has not a column for each row of U, or its rows are no whole samples.
    """
    _check_shapes(U, X, patches)
    W = by_sign(U.to(X.device, torch.float64))
    ratios = torch.zeros_like(W)  # the largest a_k/z
    means = mean_over_patches and patches > 1
    unit, columns = (patches, max(patches, len(W))) if means else (1, _CACHED)
    for x in _blocks(X, unit, columns * X.shape[1]):
        inverse = _inverse(x @ W.T)
        if means:  # one matrix product for each sample
            shares = inverse.reshape(-1, patches, len(W)).mT @ x.reshape(-1, patches, x.shape[1]) / patches
            torch.maximum(ratios, shares.amax(0), out=ratios)
        else:  # one output and sign at a time
            scaled = torch.empty_like(x)
            for row, factors in zip(ratios, inverse.T.contiguous(), strict=True):
                torch.mul(x, factors[:, None], out=scaled)
                torch.maximum(row, scaled.amax(0), out=row)
    return torch.where(W > 0, (W * ratios).clamp(max=1), 0.0)


def neuron_sensitivities(U: Tensor, X: Tensor, neurons: int, share: Share) -> Tensor:
    """s [neurons], in float64: the largest share of each neuron in any output, on either side, over inputs X [P, N].

    Args:
        U: [N, M]; rows i·N/neurons to (i + 1)·N/neurons − 1 belong to neuron i.
        X: Inputs.
        neurons: How many.
        share: Of the largest of a neuron's weights, or the sum over its weights.

    Raises:
        ShapeMismatch: X has not a column for each row of U, or rows are not the same number for each neuron.
    """
    _check_shapes(U, X, 1)
    if len(U) % neurons:
        raise ShapeMismatch(f"weights: expected the same number of rows for each of {neurons} neurons, found {len(U)}")
    if share == "largest" or len(U) == neurons:  # the same for neurons of a single weight
        return edge_sensitivities(U, X).amax(0).reshape(neurons, -1).amax(1)
    W = by_sign(U.to(X.device, torch.float64)).T
    s = W.new_zeros(neurons)
    for x in _blocks(X, 1, _CACHED * W.shape[1]):
        inverse = _inverse(x @ W)
        parts = zip(x.chunk(neurons, 1), W.chunk(neurons), strict=True)
        s = torch.maximum(s, torch.stack([((a @ w) * inverse).max() for a, w in parts]))
    return s.clamp(max=1)


def cancellation(U: Tensor, X: Tensor) -> tuple[float, int]:
    """The largest mean over the sample of Σ|wa|/|Σwa| among outputs, at least 1, and how often Σwa vanished.

    Where it vanished and Σ|wa| did not, the ratio is undefined and left out, as it is where all terms are 0.

    Raises:
        ShapeMismatch: X has not a column for each row of U.
    """
    _check_shapes(U, X, 1)
    weights = U.to(X.device, torch.float64)
    total = weights.new_zeros(weights.shape[1])
    counted, cancelled = torch.zeros_like(total), 0
    for rows in blocks_of(X, sum(U.shape)):
        x = X[rows].to(torch.float64)
        value, size = (x @ weights).abs(), x.abs() @ weights.abs()
        alive = value > _CANCELLED * size
        total += torch.where(alive, size / torch.where(alive, value, 1.0), 0.0).sum(0)
        counted += alive.sum(0)
        cancelled += int(((size > 0) & ~alive).sum())
    return max(1.0, float((total / counted.clamp(min=1)).max())), cancelled


def coefficients(sums: Tensor, positions: int, kernel: int, delta: float) -> Tensor:
    """α = 6·S·log(8(P + 1)κ/δ): S sums of sensitivities, P positions of a sample, κ of the kernel (SiPP, PFP)."""
    return 6 * sums * math.log(8 * (positions + 1) * kernel / delta)


def samples_needed(outputs: int, delta: float) -> int:
    """|S| = ⌈3·log(8η*η/δ)⌉ for a layer alone: η = η* its outputs (SiPP, PFP)."""
    return math.ceil(3 * math.log(8 * outputs**2 / delta))


def enough_samples(found: int, needed: int, delta: float) -> Assumption:
    """That the sample is as large as a theorem needs."""
    text = f"at least {needed} independent samples (for delta = {delta:g}; {found} were given)"
    return Assumption(text, found >= needed)


def _check_shapes(U: Tensor, X: Tensor, patches: int) -> None:
    if X.ndim != 2 or X.shape[1] != len(U) or not len(X):
        raise ShapeMismatch(f"inputs: expected [P, {len(U)}], a column for each row of U, found {list(X.shape)}")
    if len(X) % patches:
        raise ShapeMismatch(f"inputs: expected {patches} rows for each sample, found {len(X)} rows")


def _blocks(X: Tensor, unit: int, columns: int) -> Iterator[Tensor]:
    """Blocks of whole units of rows in float64, and −x⁻ of a block apart from its x⁺ where there are both."""
    for part in blocks_of(X[::unit], columns):
        x = X[unit * part.start : unit * part.stop].to(torch.float64)
        yield x.clamp(min=0)
        if bool((x < 0).any()):
            yield (-x).clamp(min=0)


def _inverse(z: Tensor) -> Tensor:
    """1/z, and 0 where z is 0: terms of a sum that is 0 are 0 themselves."""
    alive = z > torch.finfo(z.dtype).tiny
    return torch.where(alive, 1 / torch.where(alive, z, 1.0), 0.0)
