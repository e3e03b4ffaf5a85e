"""Blurs, and the filters that other corruptions need, too."""

import numpy as np

from convexprune.evaluation.corruptions.noise import Array, Generators


def gaussian(images: Array, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """A Gaussian filter along the last two axes; the edge continues as ``mode`` says in scipy."""
    from scipy.ndimage import gaussian_filter

    blurred: Array = gaussian_filter(images, sigma, mode=mode, truncate=truncate, axes=(-2, -1))
    return blurred


def zoomed(images: Array, factor: float) -> Array:
    """The middle of [..., height, width], enlarged to that size: linear interpolation, corner pixel to corner pixel."""
    height, width = images.shape[-2:]
    larger: Array = _enlarging(height, factor) @ images @ _enlarging(width, factor).T
    return larger


def _enlarging(size: int, factor: float) -> Array:
    """What ``scipy.ndimage.zoom`` of order 1 does to the middle of a row, as a matrix [size, size]."""
    kept = int(np.ceil(size / factor))
    enlarged = round(kept * factor)
    positions = (size - kept) // 2 + (np.arange(size) + (enlarged - size) // 2) * (kept - 1) / (enlarged - 1)
    left = np.minimum(positions.astype(int), size - 2)
    matrix, rows = np.zeros((size, size), np.float32), np.arange(size)
    matrix[rows, left], matrix[rows, left + 1] = 1 - (positions - left), positions - left
    return matrix


def line_blur(images: Array, radius: int, sigma: float, angles: Array) -> Array:
    """Mean along a line from each pixel, in the direction of its image's angle [n] in radians.

    The weights are a half Gaussian over 2·radius + 1 pixels, the nearest ones to the line; edge pixels are repeated.
    """
    steps, (height, width) = np.arange(2 * radius + 1), images.shape[2:]
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    padded = np.pad(images, [(0, 0), (0, 0), (2 * radius,) * 2, (2 * radius,) * 2], mode="edge")
    result = np.zeros_like(images)
    for image, source, angle in zip(result, padded, angles, strict=True):
        downwards = 2 * radius + np.rint(steps * np.sin(angle)).astype(int)
        sideways = 2 * radius + np.rint(steps * np.cos(angle)).astype(int)
        for weight, y, x in zip(weights, downwards.tolist(), sideways.tolist(), strict=True):
            image += weight * source[:, y : y + height, x : x + width]
    return result


def gaussian_blur(images: Array, sigma: float, chance: Generators) -> Array:
    """A Gaussian filter, of sigma pixels."""
    return gaussian(images, sigma)


def defocus_blur(images: Array, parameter: tuple[float, float], chance: Generators) -> Array:
    """A disk of (radius, ·) pixels, smoothed by a Gaussian of 3 × 3 pixels of (·, sigma); edges are mirrored."""
    from scipy.ndimage import correlate, correlate1d

    radius, sigma = parameter
    line = np.arange(-int(radius) - 1, int(radius) + 2)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float32)
    smooth = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * sigma**2))
    for axis in (0, 1):
        disk = correlate1d(disk, smooth / smooth.sum(), axis, mode="constant")
    unsharp: Array = correlate(images, (disk / disk.sum())[None, None], mode="mirror")
    return unsharp


def glass_blur(images: Array, parameter: tuple[float, int], chance: Generators) -> Array:
    """Pixels become their neighbours', (·, times) over, between two Gaussian filters of (sigma, ·) pixels.

    Each pixel but those of the first two rows and columns takes the value of itself, or of the one above, to the
    left, or both, with equal probability. The published code means to exchange the two, but the first of its
    two assignments has overwritten what the second reads.
    """
    sigma, times = parameter
    count, channels, height, width = images.shape
    blurred = gaussian(images, sigma)
    here = np.arange(height)[2:, None] * width + np.arange(width)[2:]
    drawn = np.stack([one.integers(0, 2, (times, 2, *here.shape)) for one in chance])
    for step in range(times):
        source = here - drawn[:, step, 0] * width - drawn[:, step, 1]
        taken = np.take_along_axis(blurred.reshape(count, channels, -1), source.reshape(count, 1, -1), 2)
        blurred[:, :, 2:, 2:] = taken.reshape(count, channels, *here.shape)
    return gaussian(blurred, sigma)


def motion_blur(images: Array, parameter: tuple[int, float], chance: Generators) -> Array:
    """A line of (radius, sigma) pixels, within 45° of the horizontal."""
    angles = np.array([one.uniform(-np.pi / 4, np.pi / 4) for one in chance])
    return line_blur(images, *parameter, angles)


def zoom_blur(images: Array, end: float, chance: Generators) -> Array:
    """The mean of the image and of its enlargements by 1, 1.01, ..., as ``numpy.arange(1, end, 0.01)`` has them."""
    factors = np.arange(1, end, 0.01)
    total = images.copy()
    for factor in factors:
        total += zoomed(images, factor)
    return total / np.float32(len(factors) + 1)
