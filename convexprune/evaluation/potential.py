"""How far a network can be pruned at no loss, and what it loses on other distributions (Liebenwein et al. 2021)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from convexprune.evaluation.bootstrap import Estimate, estimate, resampled_means

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
