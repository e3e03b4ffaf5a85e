"""What networks are evaluated on: labelled samples, images as pixels from 0 to 1, and what corruptions make of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convexprune.evaluation.corruptions import CORRUPTIONS, corrupted
from convexprune.evaluation.rows import NOMINAL, title_of
from convexprune.layers.memory import Batch, mapped, tensors_in
from convexprune.runs.data import Data, as_data
from convexprune.solvers.arrays import checked_count, working_dtype
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, MissingExtra, ShapeMismatch

_IMAGES = "images [n, 1 or 3, height, width]"
_ROUNDING = 1e-4  # by which pixels may leave the range, beside that of a half precision


def as_samples(data: object, batch_size: int | None) -> Data:
    """Anything that ``evaluate`` takes as ``Data``."""
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray | Mapping)
    found = Data(data[0], labels=data[1]) if pair and isinstance(data, tuple) else as_data(data)
    if found is None:
        raise InvalidInput("data: expected inputs, with labels or, where there is a parent, without; found none")
    return found if batch_size is None else replace(found, batch_size=batch_size)


def labelled(data: Data, any_kind: bool) -> Iterator[tuple[Batch, Tensor | None]]:
    """Each batch with its labels, if there are any.

    Args:
        data: The samples.
        any_kind: Whether the last part of a batch that is a tuple holds labels whatever it is: else they are whole
            numbers, one a sample, and all other parts are inputs.

    Raises:
        InvalidInput: Some batches have labels and others none; and as ``Data.labelled``.
    """
    known: bool | None = None
    for batch, labels in data.samples():
        if labels is not None and data.labels is None and not any_kind and not are_classes(labels):
            labels = None
        if known not in (None, labels is not None):
            raise InvalidInput("data: some batches have labels and others none; give labels with all of them, or none")
        known = labels is not None
        yield batch, labels


def are_classes(labels: Tensor) -> bool:
    """Whether labels are whole numbers, one a sample."""
    return labels.dim() == 1 and not labels.is_floating_point() and not labels.is_complex()


@dataclass(frozen=True)
class Normalisation:
    """inputs = (pixels − mean)/std, with a number for all channels or one for each.

    Attributes:
        mean, std: As in the formula.
        shape: (channels, height, width) of flattened images; () where images are no such.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, mean: object, std: object, shape: Sequence[int] | None = None) -> "Normalisation":
        """That of the arguments; None for 0 and 1.

        Raises:
            InvalidInput: No numbers, or no shape. InvalidTolerance: A deviation is not positive, or one of them not
                finite.
        """
        lengths = () if shape is None else tuple(shape)
        whole = all(isinstance(length, int) and length > 0 for length in lengths)
        if shape is not None and (len(lengths) != 3 or lengths[0] not in (1, 3) or not whole):
            raise InvalidInput(f"shape: expected (1 or 3 channels, height, width) of an image, found {shape!r}")
        found = cls(_numbers("mean", mean, 0.0), _numbers("std", std, 1.0), lengths)
        if not all(value > 0 for value in found.std):
            raise InvalidTolerance(f"std: expected positive numbers, found {list(found.std)}")
        return found

    def image_in(self, batch: Batch) -> Tensor | None:
        """The first tensor of a batch that holds images, flattened or not; None if there is none."""
        if not self.shape:
            return image_in(batch)
        flat = (tensor for tensor in tensors_in(batch) if tensor.is_floating_point() and tensor.dim() == 2)
        return next((tensor for tensor in flat if tensor.shape[1] == prod(self.shape)), None)

    def pixels(self, images: Tensor) -> Tensor:
        """inputs·std + mean [n, channels, height, width]."""
        images = (images.reshape(-1, *self.shape) if self.shape else images).detach().to(working_dtype(images.dtype))
        return images * _spread("std", self.std, images) + _spread("mean", self.mean, images)

    def inputs(self, pixels: Tensor, like: Tensor) -> Tensor:
        """(pixels − mean)/std, of the shape and the type and on the device of other inputs."""
        found = (pixels - _spread("mean", self.mean, pixels)) / _spread("std", self.std, pixels)
        return found.reshape(like.shape).to(like)


def image_in(batch: Batch) -> Tensor | None:
    """The first tensor of a batch that holds images [n, 1 or 3, height, width] of floating-point numbers."""
    return next((t for t in tensors_in(batch) if t.is_floating_point() and t.dim() == 4 and t.shape[1] in (1, 3)), None)


def pixels_of(batch: Batch, normalisation: Normalisation) -> Tensor | str:
    """The images of a batch in [0, 1]; or why there are none, and what to give."""
    image = normalisation.image_in(batch)
    if image is None:
        found = ", ".join(f"{list(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in tensors_in(batch))
        size = f"flattened images [n, {prod(normalisation.shape)}]" if normalisation.shape else _IMAGES
        return f"expected {size} of floating-point numbers, found {found or 'no tensor'}"
    pixels = normalisation.pixels(image)
    low, high = (float(end) for end in torch.aminmax(pixels))
    room = max(_ROUNDING, 2 * torch.finfo(image.dtype).eps)
    if -room <= low and high <= 1 + room:
        return pixels.clamp_(0, 1)
    known = replace(normalisation, shape=()) != Normalisation.of(None, None)
    advice = "check mean= and std=" if known else "give mean= and std=, as inputs were normalised, or pixels / 255"
    return f"expected pixels from 0 to 1, found {low:.4g} to {high:.4g}: {advice}"


def with_tensor(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """The batch with one tensor in the place of another."""
    return mapped(batch, lambda tensor: new if tensor is old else tensor)


def _numbers(name: str, value: object, default: float) -> tuple[float, ...]:
    try:
        found = torch.as_tensor(default if value is None else value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name}: expected a number, or one a channel, found {value!r}") from error
    if found.dim() > 1 or not found.numel() or not bool(found.isfinite().all()):
        raise InvalidTolerance(f"{name}: expected a finite number, or one a channel, found {value!r}")
    return tuple(found.reshape(-1).tolist())


def _spread(name: str, values: tuple[float, ...], images: Tensor) -> Tensor:
    if len(values) not in (1, images.shape[1]):
        raise ShapeMismatch(
            f"{name}: expected a number, or one for each of the {images.shape[1]} channels, found {len(values)}"
        )
    return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]


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
            InvalidInput, MissingExtra: Corruptions were named, and the batch holds no images, pixels that
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
