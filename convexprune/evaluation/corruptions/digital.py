"""What processing of digital images does to them."""

from io import BytesIO

import numpy as np

from convexprune.evaluation.corruptions.blur import gaussian
from convexprune.evaluation.corruptions.noise import Array, Generators
from convexprune.solvers.errors import MissingExtra


def contrast(images: Array, kept: float, chance: Generators) -> Array:
    """mean + kept·(x − mean), with the mean of each channel of each image."""
    means = images.mean((2, 3), np.float64, keepdims=True)
    flatter: Array = (images - means) * kept + means
    return flatter


def saturate(images: Array, parameter: tuple[float, float], chance: Generators) -> Array:
    """The saturation of HSV times (scale, ·) plus (·, shift), within [0, 1]; hue and value stay.

    The hue of a grey pixel is that of red, as is usual: a shift makes it reddish.
    """
    scale, shift = parameter
    value = images.max(1, keepdims=True)
    spread = value - images.min(1, keepdims=True)
    saturation = np.clip(spread / np.where(value > 0, value, 1) * scale + shift, 0, 1)
    red = np.array([0, 1, 1], np.float32)[None, :, None, None]
    hue = np.where(spread > 0, (value - images) / np.where(spread > 0, spread, 1), red)
    coloured: Array = value * (1 - saturation * hue)
    return coloured


def jpeg(images: Array, quality: int, chance: Generators) -> Array:
    """Compressed as JPEG and read again, colours at half the resolution, as Pillow does it."""
    try:
        from PIL import Image
    except ImportError as error:
        message = 'the corruption "jpeg" needs Pillow, which is not installed: pip install "convexprune[evaluation]"'
        raise MissingExtra(message) from error
    grey = images.shape[1] == 1
    pixels = np.rint(images * 255).astype(np.uint8)
    result = np.empty_like(images)
    for image, found in zip(pixels, result, strict=True):
        with BytesIO() as file:
            Image.fromarray(image[0] if grey else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
            read = np.asarray(Image.open(file))
        found[:] = read if grey else read.transpose(2, 0, 1)
    return result / 255


def pixelate(images: Array, share: float, chance: Generators) -> Array:
    """Reduced to so much of its height and width, each pixel a mean, and enlarged again by repeating pixels."""
    for axis in (2, 3):
        size = images.shape[axis]
        coarse = int(size * share)
        starts = (np.arange(coarse) * size / coarse + 0.5).astype(int)
        lengths = np.diff(starts, append=size).astype(np.float32)
        means = np.add.reduceat(images, starts, axis) / np.expand_dims(lengths, tuple(range(1, 4 - axis)))
        images = np.take(means, ((np.arange(size) + 0.5) * coarse / size).astype(int), axis)
    return images


def elastic(images: Array, parameter: tuple[float, float, float], chance: Generators) -> Array:
    """A random affine map, then displacements that are smooth; between pixels both interpolate linearly.

    The parameter, in shorter sides of the image: how far pixels are displaced, the sigma of the Gaussian filter
    over uniform numbers that smooths displacements, and how far three points move that fix the affine map.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    strength, sigma, reach = (side * part for part in parameter)
    drawn = [(one.uniform(-reach, reach, (3, 2)), one.uniform(-1, 1, (2, height, width))) for one in chance]
    corners = np.array([width // 2, height // 2]) + side // 3 * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + np.stack([points for points, _ in drawn])
    back = np.linalg.solve(np.pad(moved, [(0, 0), (0, 0), (0, 1)], constant_values=1), corners[None])[..., None, None]
    rows, columns = np.mgrid[:height, :width]
    sources = columns * back[:, 0] + rows * back[:, 1] + back[:, 2]
    images = _interpolated(images, sources[:, 1], sources[:, 0], "mirror")
    shifts = strength * gaussian(np.stack([field for _, field in drawn]), sigma, "reflect", 3.0)
    return _interpolated(images, rows + shifts[:, 1], columns + shifts[:, 0], "reflect")


def _interpolated(images: Array, rows: Array, columns: Array, mode: str) -> Array:
    """Images [n, channels, height, width] at positions [n, height, width], linear between pixels."""
    from scipy.ndimage import map_coordinates

    places = np.broadcast_arrays(np.arange(len(images))[:, None, None], rows, columns)
    return np.stack([map_coordinates(channel, places, order=1, mode=mode) for channel in images.swapaxes(0, 1)], 1)
