"""Uniform noise on inputs, the same for all networks (Liebenwein et al. 2021, section 4)."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convexprune.evaluation.inputs import with_tensor
from convexprune.layers.memory import Batch, samples_at, samples_of, tensors_in
from convexprune.solvers.arrays import checked_count, checked_radius
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

_RADII = tuple(round(0.05 * step, 2) for step in range(15))


@dataclass(frozen=True)
class Noise:
    """x + ε·u with u uniform in [−1, 1]ᵈ, drawn for each image and draw once and scaled by each radius.

    By default there are 60,000 forwards a network, as many as six passes over 10,000 images: 15 radii from 0 to 0.7 as
    in the paper, 1,000 images, and 4 draws each, where the paper has 100.

    Attributes:
        radii: ε, in the units of the inputs as networks are given them, behind any normalisation.
        images: How many samples, chosen at random; all, if there are fewer.
        draws: Of noise for each.

    Raises:
        InvalidTolerance: A radius is negative or not finite, or there is none; or the others are no counts above 0.
    """

    radii: Sequence[float] = _RADII
    images: int = 1000
    draws: int = 4

    def __post_init__(self) -> None:
        given = self.radii if isinstance(self.radii, Iterable) else ()
        radii = tuple(dict.fromkeys(checked_radius("noise radii", radius) for radius in given))
        if not radii:
            raise InvalidTolerance(f"noise radii: expected one number ≥ 0 or more, found {self.radii!r}")
        vars(self).update(radii=radii)
        checked_count("noise images", self.images)
        checked_count("noise draws", self.draws)

    def chosen(self, samples: int, seed: int) -> frozenset[int]:
        """The numbers of the samples that get noise."""
        order = np.random.default_rng(seed).permutation(samples)
        return frozenset(order[: self.images].tolist())

    def versions(
        self, batch: Batch, start: int, chosen: Collection[int], seed: int
    ) -> Iterator[tuple[float, list[int], Batch]]:
        """Each radius with the chosen samples of a batch, whose first is number ``start``, so many times with noise.

        The numbers within the batch are those of the samples that were taken.

        No more of them at a time than the batch holds, or than the draws of one.

        Raises:
            InvalidInput: The batch holds no floating-point tensor.
        """
        count = samples_of(batch)
        places = [place for place in range(count) if start + place in chosen]
        step = max(1, count // self.draws)
        for first in range(0, len(places), step):
            some = places[first : first + step]
            taken = [place for place in some for _ in range(self.draws)]
            few = samples_at(batch, taken)
            inputs = next((tensor for tensor in tensors_in(few) if tensor.is_floating_point()), None)
            if inputs is None:
                raise InvalidInput("noise: expected inputs of floating-point numbers, found none: leave noise= out")
            shape = (self.draws, *inputs.shape[1:])
            unit = torch.cat([_unit(shape, seed, start + place) for place in some]).to(inputs)
            for radius in self.radii:
                yield radius, taken, with_tensor(few, inputs, inputs + radius * unit)


def _unit(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Uniform in [−1, 1], the same for a sample in whatever batch it comes."""
    return torch.from_numpy(2 * np.random.default_rng((seed, number)).random(shape, np.float32) - 1)
