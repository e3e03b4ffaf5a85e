"""Which distributions a network is evaluated on: the data as they are, and each corruption at each severity."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy.typing as npt
from torch import Tensor

from convexprune.evaluation.corruptions import CORRUPTIONS, corrupted
from convexprune.evaluation.inputs import Normalisation, pixels_of, with_tensor
from convexprune.evaluation.rows import NOMINAL, title_of
from convexprune.layers.memory import Batch
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, MissingExtra


@dataclass(frozen=True)
class Distribution:
    """The data as they are, or a corruption of a severity."""

    name: str = NOMINAL
    severity: int | None = None

    @property
    def category(self) -> str:
        """Of the corruption."""
        return "" if self.severity is None else str(CORRUPTIONS[self.name].category)

    @property
    def title(self) -> str:
        """The name with the severity."""
        return title_of(self.name, self.severity)


_NOMINAL_ALONE = (Distribution(),)


class Distributions:
    """Those that are wanted, and what they make of batches.

    Args:
        corruptions: Names; None for all that are defined for the images, or none if there are no images.
        severities: Of each corruption, 1 to 5.
        normalisation: That of the inputs.
        seed: Of what is random in corruptions.
        textures: Pictures of frost, or None.

    Raises:
        InvalidInput: There is no such corruption, or no severity. InvalidTolerance: A severity is none of 1 to 5.
    """

    def __init__(
        self,
        corruptions: Iterable[str] | None,
        severities: Iterable[int] | int,
        normalisation: Normalisation,
        seed: int,
        textures: Sequence[npt.NDArray[Any]] | None,
    ) -> None:
        wanted = CORRUPTIONS if corruptions is None else corruptions
        self._names = list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
        if strange := [name for name in self._names if name not in CORRUPTIONS]:
            raise InvalidInput(f"corruptions: found {strange[0]!r}, expected some of {', '.join(CORRUPTIONS)}")
        degrees = severities if isinstance(severities, Iterable) else [severities]
        self._severities = list(dict.fromkeys(checked_count("severities", value) for value in degrees))
        most = min((len(CORRUPTIONS[name].parameters) for name in self._names), default=1)
        if not self._severities or (self._names and max(self._severities) > most):
            raise InvalidTolerance(f"severities: expected whole numbers from 1 to {most}, found {self._severities}")
        self._named, self._normalisation = corruptions is not None, normalisation
        self._seed, self._textures = seed, textures
        self.found: tuple[Distribution, ...] = () if self._names else _NOMINAL_ALONE
        self.notices: list[str] = []

    def versions(self, batch: Batch, start: int) -> Iterator[tuple[Distribution, Batch]]:
        """Each distribution, with what it makes of a batch whose first sample is number ``start``.

        Raises:
            InvalidInput, MissingExtra: Corruptions were asked for by name, and the batch holds no images, pixels that
                are not from 0 to 1, or images that one of them cannot be applied to; or a package is missing.
        """
        image = self._normalisation.image_in(batch)
        pixels: Tensor | str = ""
        if self.found != _NOMINAL_ALONE:
            pixels = pixels_of(batch, self._normalisation)
            self.found = self._defined(pixels)
        for distribution in self.found:
            shown = batch
            if distribution.severity is not None and image is not None and isinstance(pixels, Tensor):
                name, severity, pictures = distribution.name, distribution.severity, self._textures
                other = corrupted(pixels, name, severity, seed=self._seed, start=start, textures=pictures)
                shown = with_tensor(batch, image, self._normalisation.inputs(other, image))
            yield distribution, shown

    def _defined(self, pixels: Tensor | str) -> tuple[Distribution, ...]:
        """Those that there are for such pixels, or for none, with the reason; what is left out is said."""
        if isinstance(pixels, str):
            if self._named:
                raise InvalidInput(f"corruptions: {pixels}")
            self.notices.append(f"corruptions are left out: {pixels}")
            return _NOMINAL_ALONE
        if self.found:
            return self.found
        lacking: dict[str, list[str]] = {}
        for name in self._names:
            try:
                corrupted(pixels[:1], name, self._severities[0], seed=self._seed, textures=self._textures)
            except (InvalidInput, MissingExtra) as error:
                if self._named:
                    raise
                lacking.setdefault(str(error).removeprefix(f"{name}: "), []).append(name)
        self.notices += [f"left out: {', '.join(names)} ({why})" for why, names in lacking.items()]
        names = [name for name in self._names if name not in chain.from_iterable(lacking.values())]
        return (Distribution(), *(Distribution(name, severity) for name in names for severity in self._severities))
