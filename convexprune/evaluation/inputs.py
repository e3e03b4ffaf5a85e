"""What networks are evaluated on: samples with their labels, and images as pixels from 0 to 1."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from convexprune.layers.memory import Batch, mapped, tensors_in
from convexprune.runs.data import Data, as_data
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch

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
