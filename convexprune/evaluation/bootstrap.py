"""Intervals by the bootstrap (Efron 1979): samples are drawn again, the same ones for all models and distributions."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**22  # counts that are held at a time


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that holds 95 % of what resampled samples give (percentiles 2.5 and 97.5)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def estimate(value: float, resampled: Tensor) -> Estimate:
    """A figure, with the percentiles of the same for each resampling [B]."""
    ends = torch.quantile(resampled.double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Estimate(value, *ends.tolist())


def resampled_means(outcomes: Tensor, resamples: int, seed: int) -> Tensor:
    """Means of outcomes [..., n] over n samples that are drawn with replacement, time and again.

    Args:
        outcomes: Truth values, or numbers in float64; the same samples along the last axis everywhere.
        resamples: B, how often they are drawn.
        seed: Of the draws.

    Returns:
        [..., B], float64.
    """
    n = outcomes.shape[-1]
    exact = outcomes.dtype == torch.bool and n < 2**24  # sums that float32 holds exactly
    figures = outcomes.reshape(-1, n).to(torch.float32 if exact else torch.float64)
    means = [figures @ counts.to(figures.dtype).T for counts in _counts(n, resamples, seed)]
    return (torch.cat(means, dim=1).double() / n).reshape(*outcomes.shape[:-1], resamples)


def _counts(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each sample is drawn, a row a resampling: blocks [·, n]."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _BLOCK // n)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = torch.randint(n, (rows, n), generator=generator) + n * torch.arange(rows)[:, None]
        yield torch.bincount(drawn.reshape(-1), minlength=rows * n).reshape(rows, n)
