"""How far a network can be pruned at no loss, and what it loses on other distributions (Liebenwein et al. 2021)."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

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


_ROUNDING = 1e-9  # so that a score that is lower by delta itself is not taken for a higher one


@dataclass(frozen=True)
class PrunePotential:
    """The largest ratio at which a network scores no less than its parent less delta (Liebenwein et al. 2021).

    Attributes:
        delta: The loss that counts as none.
        distributions: By title, over all ratios of a series: the largest at which score > parent's score − delta,
            wherever it fails before; 0 where it does at none.
        average: The mean over the distributions.
        minimum: The least of them.
        noise: The same under uniform noise, by radius; not in the average and the minimum.
    """

    delta: float
    distributions: Mapping[str, Estimate]
    average: Estimate
    minimum: Estimate
    noise: Mapping[float, Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class ExcessError:
    """e = [err(pruned, D') − err(pruned, D)] − [err(parent, D') − err(parent, D)] (Liebenwein et al. 2021).

    D is the nominal distribution, D' the mean over the corruptions, err = 1 − score: what corruptions cost a pruned
    network beyond what they cost its parent.

    Attributes:
        ratios: ρ, of the networks of a series.
        errors: e, of each.
        slope: Σ ρ e/Σ ρ², of the regression of e on ρ through the origin.
    """

    ratios: tuple[float, ...]
    errors: tuple[float, ...]
    slope: Estimate

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def potentials(scores: Tensor, parent: Tensor, ratios: Tensor, delta: float) -> Tensor:
    """The prune potential on each distribution, [D, ...].

    Args:
        scores: Of the networks [M, D, ...].
        parent: Of their parent [D, ...].
        ratios: [M].
        delta: The loss that counts as none.
    """
    commensurate = scores - parent + delta > _ROUNDING
    ratios = ratios.reshape(-1, *[1] * (scores.dim() - 1))
    return torch.where(commensurate, ratios, 0.0).amax(0)


def excess(scores: Tensor, parent: Tensor) -> Tensor:
    """The excess error of each network, [M, ...], by scores [M, D, ...] and [D, ...], the nominal ones first."""
    lost, lost_by_parent = scores[:, 0] - scores[:, 1:].mean(1), parent[0] - parent[1:].mean(0)
    return lost - lost_by_parent


def slope_through_origin(ratios: Tensor, errors: Tensor) -> Tensor:
    """Σ ρ e/Σ ρ², of errors [M, ...] on ratios [M]."""
    return (ratios @ errors) / ratios.square().sum()


def prune_potential(
    outcomes: Tensor, ratios: Tensor, titles: list[str], delta: float, resamples: int, seed: int
) -> PrunePotential:
    """The prune potential, by the outcomes [1 + M, D, n] of the parent and of the networks with these ratios."""
    found = potentials(*_split(outcomes.double().mean(2)), ratios, delta)
    drawn = potentials(*_split(resampled_means(outcomes, resamples, seed)), ratios, delta)
    by_title = {title: estimate(float(found[i]), drawn[i]) for i, title in enumerate(titles)}
    average, least = estimate(float(found.mean()), drawn.mean(0)), estimate(float(found.min()), drawn.amin(0))
    return PrunePotential(delta, by_title, average, least)


def excess_error(outcomes: Tensor, ratios: Tensor, resamples: int, seed: int) -> ExcessError:
    """The excess error, likewise, of which the first distribution is the nominal one."""
    errors = excess(*_split(outcomes.double().mean(2)))
    drawn = slope_through_origin(ratios, excess(*_split(resampled_means(outcomes, resamples, seed))))
    slope = estimate(float(slope_through_origin(ratios, errors)), drawn)
    return ExcessError(tuple(ratios.tolist()), tuple(errors.tolist()), slope)


def _split(figures: Tensor) -> tuple[Tensor, Tensor]:
    return figures[1:], figures[0]
