"""Corrupted images as in CIFAR-10-C, made as they are needed.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
with the parameters of CIFAR-10-C, which are for images of about 32 × 32 pixels and far milder than those of
ImageNet-C. Lengths are in pixels whatever the size of an image, but for ``elastic``, where they are parts of it.

The published files cannot be had bit by bit: their random numbers were not kept. Each corruption follows the published
procedure, with these differences. Values are rounded to multiples of 1/255 once, at the end, where the published code
cuts them off, in places more than once. ``motion_blur`` and ``snow`` blur along a line by the same weights as
ImageMagick, without it. ``spatter`` of water (severities 1 to 3) takes the outlines of drops where the published code
detects edges by Canny's method, and exact distances from them. ``elastic`` interpolates exactly, where OpenCV rounds
positions to 1/32 of a pixel. ``frost`` needs pictures of frost, ``textures``; the published code uses five, shrunk to
a fifth of their size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convexprune.evaluation.corruptions import blur, digital, noise, weather
from convexprune.evaluation.corruptions.noise import Array, generators
from convexprune.solvers.arrays import ArrayLike, as_real, blocks_of, check_finite, checked_count
from convexprune.solvers.errors import EmptyInput, InvalidInput, ShapeMismatch

_SMALLEST = 8


@dataclass(frozen=True)
class Corruption:
    """A corruption, and how strong it is; put one's own into ``CORRUPTIONS`` by its name.

    Attributes:
        name: What it is called.
        category: Noise, blur, weather or digital, as in the paper.
        parameters: That of severity 1, of severity 2, and so on.
        function: From images [n, channels, height, width], a float32 array of numbers in [0, 1], a parameter, and
            an iterator over a ``numpy.random.Generator`` for each image, to corrupted images. These are clipped and
            rounded afterwards. Nothing else may be random, and no image depend on others.
        colour: Whether it is for images of three channels only.
        textures: Whether ``function`` takes ``textures``, too.
    """

    name: str
    category: Literal["noise", "blur", "weather", "digital"]
    parameters: tuple[Any, ...]
    function: Callable[..., Array]
    colour: bool = False
    textures: bool = False


_SNOW = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
_SPATTER = (
    (0.62, 0.1, 0.7, 0.7, 0.5, False),
    (0.65, 0.1, 0.8, 0.7, 0.5, False),
    (0.65, 0.3, 1, 0.69, 0.5, False),
    (0.65, 0.1, 0.7, 0.69, 0.6, True),
    (0.65, 0.1, 0.5, 0.68, 0.6, True),
)
_ELASTIC = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))

CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption("gaussian_noise", "noise", (0.04, 0.06, 0.08, 0.09, 0.1), noise.gaussian_noise),
        Corruption("shot_noise", "noise", (500, 250, 100, 75, 50), noise.shot_noise),
        Corruption("impulse_noise", "noise", (0.01, 0.02, 0.03, 0.05, 0.07), noise.impulse_noise),
        Corruption("speckle_noise", "noise", (0.06, 0.1, 0.12, 0.16, 0.2), noise.speckle_noise),
        Corruption("gaussian_blur", "blur", (0.4, 0.6, 0.7, 0.8, 1.0), blur.gaussian_blur),
        Corruption(
            "defocus_blur", "blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), blur.defocus_blur
        ),
        Corruption("glass_blur", "blur", ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)), blur.glass_blur),
        Corruption("motion_blur", "blur", ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), blur.motion_blur),
        Corruption("zoom_blur", "blur", (1.06, 1.11, 1.16, 1.21, 1.26), blur.zoom_blur),
        Corruption("snow", "weather", _SNOW, weather.snow),
        Corruption(
            "frost",
            "weather",
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
            weather.frost,
            textures=True,
        ),
        Corruption("fog", "weather", ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), weather.fog),
        Corruption("spatter", "weather", _SPATTER, weather.spatter),
        Corruption("brightness", "weather", (0.05, 0.1, 0.15, 0.2, 0.3), weather.brightness),
        Corruption("contrast", "digital", (0.75, 0.5, 0.4, 0.3, 0.15), digital.contrast),
        Corruption(
            "saturate",
            "digital",
            ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
            digital.saturate,
            colour=True,
        ),
        Corruption("jpeg", "digital", (80, 65, 58, 50, 40), digital.jpeg),
        Corruption("pixelate", "digital", (0.95, 0.9, 0.85, 0.75, 0.65), digital.pixelate),
        Corruption("elastic", "digital", _ELASTIC, digital.elastic),
    )
}


def applicable(name: str, channels: int, textures: Sequence[Array] | None = None) -> bool:
    """Whether a corruption can be made: ``saturate`` needs three channels, ``frost`` needs textures.

    Raises:
        InvalidInput: No corruption has that name.
    """
    corruption = _named(name)
    given = textures is not None and len(textures) > 0
    return (channels == 3 or not corruption.colour) and (given or not corruption.textures)


def corrupted(
    images: ArrayLike,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    start: int = 0,
    textures: Sequence[Array] | None = None,
) -> Tensor:
    """Images with one of ``CORRUPTIONS``, rounded to 8 bits as those of CIFAR-10-C are.

    An image is corrupted by ``seed``, name, severity and its index alone, bit for bit, in whatever batch it comes:
    ``corrupted(x, ...)[a:b]`` is ``corrupted(x[a:b], ..., start=a)``.

    Args:
        images: [n, channels, height, width] of 1 or 3 channels and at least 8 × 8 pixels, values in [0, 1].
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5; 0 gives the images as they are, without rounding.
        seed: Another seed gives other random numbers.
        start: The index of the first image.
        textures: For ``frost``: pictures of frost, uint8 arrays [height, width, 3] no smaller than the images.

    Returns:
        Images of the same shape in float32, on their device, multiples of 1/255 in [0, 1].

    Raises:
        InvalidInput: An unknown name, another severity, values outside [0, 1], ``saturate`` of grey images, or
            ``frost`` without textures, or with some that are not uint8.
        ShapeMismatch: Another number of axes or channels, images or textures that are too small, or a corruption of
            one's own that changes the shape.
        EmptyInput: No image.
        NonFinite: NaN or infinity.
        InvalidTolerance: A seed or start that is not a whole number ≥ 0.
        MissingExtra: ``jpeg`` without Pillow.
    """
    corruption, clean = _named(name), _checked(images)
    strengths = len(corruption.parameters)
    if checked_count("severity", severity, 0) > strengths:
        raise InvalidInput(f"severity: expected a whole number from 0 (clean) to {strengths}, found {severity}")
    if corruption.colour and clean.shape[1] != 3:
        raise InvalidInput(f"{name}: expected images of 3 channels, found 1; leave it out where `applicable` is false")
    function = partial(corruption.function, textures=textures) if corruption.textures else corruption.function
    if not applicable(name, clean.shape[1], textures):
        raise InvalidInput(f"{name}: expected textures, found none; pass a list of pictures, or leave it out")
    seed, start = checked_count("seed", seed, 0), checked_count("start", start, 0)
    if not severity:
        return clean
    source, result = clean.cpu(), np.empty(clean.shape, np.float32)
    for rows in blocks_of(source.flatten(1)):
        block = source[rows].numpy()
        block.flags.writeable = False  # it may be the caller's memory
        chance = generators(seed, name, severity, range(start + rows.start, start + rows.stop))
        made = function(block, corruption.parameters[severity - 1], chance)
        if made.shape != block.shape:
            raise ShapeMismatch(f"{name}: expected shape {list(block.shape)} of its function, found {list(made.shape)}")
        result[rows] = np.rint(np.clip(made, 0, 1) * 255)
    return check_finite(name, torch.from_numpy(result / 255)).to(clean.device)


def _named(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise InvalidInput(f"no corruption named {name!r}. Known: {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[name]


def _checked(images: ArrayLike) -> Tensor:
    """Images as float32, or what is wrong with them."""
    tensor = as_real("images", images)
    shape = list(tensor.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        remedy = "images[:, None] adds channels, images[None] a batch, permute(0, 3, 1, 2) puts channels second"
        raise ShapeMismatch(f"images: expected [images, 1 or 3 channels, height, width], found shape {shape}; {remedy}")
    if min(shape[2:]) < _SMALLEST:
        raise ShapeMismatch(f"images: expected at least {_SMALLEST} × {_SMALLEST} pixels, found shape {shape}")
    if not shape[0]:
        raise EmptyInput(f"images: expected at least one, found shape {shape}")
    lowest, highest = (float(value) for value in check_finite("images", tensor).aminmax())
    if lowest < 0 or highest > 1:
        remedy = "undo their normalisation" if lowest < 0 else "divide them by 255"
        raise InvalidInput(f"images: expected values in [0, 1], found {lowest:g} to {highest:g}; {remedy} first")
    return tensor.to(torch.float32).contiguous()
