"""Weather: what lies between the camera and the scene, or on the lens."""

from collections.abc import Sequence

import numpy as np

from convexprune.evaluation.corruptions.blur import gaussian, line_blur, zoomed
from convexprune.evaluation.corruptions.noise import Array, Generators
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # of red, green and blue, ITU-R BT.601
_WATER, _MUD = (175, 238, 238), (63, 42, 20)
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
_FAR = 20  # pixels from an edge; further ones count as so far


def grey(images: Array) -> Array:
    """Luma [n, 1, height, width] of colours; grey images as they are."""
    return images if images.shape[1] == 1 else (images * _LUMA).sum(1, keepdims=True)


def brightness(images: Array, added: float, chance: Generators) -> Array:
    """The value of HSV, the largest channel, grows by ``added`` to at most 1; hue and saturation stay.

    Black becomes grey, and a grey image of one channel is its own value.
    """
    value = images.max(1, keepdims=True)
    brighter = np.minimum(value + np.float32(added), 1)
    lit: Array = np.where(value > 0, images * (brighter / np.where(value > 0, value, 1)), brighter)
    return lit


def snow(images: Array, parameter: tuple[float, ...], chance: Generators) -> Array:
    """Flakes that have moved, drawn twice, the second time turned by 180°, over an image that is paler.

    The parameter: mean and standard deviation of noise, by how much it is enlarged, the level above which it is
    flakes, radius and sigma of their path, within 45° of the vertical, the share of x against max(x, 1.5·grey + 0.5).
    """
    mean, deviation, factor, least, radius, sigma, share = parameter
    drawn = [(one.normal(mean, deviation, images.shape[2:]), one.uniform(-3, -1)) for one in chance]
    flakes = zoomed(np.stack([noise for noise, _ in drawn]).astype(np.float32)[:, None], factor)
    flakes = np.where(flakes < least, 0, np.minimum(flakes, 1))
    flakes = line_blur(flakes, int(radius), sigma, np.pi / 4 * np.array([turn for _, turn in drawn]))
    paler = np.maximum(images, np.float32(1.5) * grey(images) + np.float32(0.5))
    snowy: Array = np.float32(share) * images + np.float32(1 - share) * paler + flakes + flakes[..., ::-1, ::-1]
    return snowy


def frost(images: Array, parameter: tuple[float, float], chance: Generators, textures: Sequence[Array]) -> Array:
    """(image's share)·x + (texture's share)·a random part of a random texture."""
    size = np.array(images.shape[2:])
    pictures = [np.asarray(texture) for texture in textures]
    for texture in pictures:
        if texture.ndim != 3 or texture.shape[2] != 3 or (texture.shape[:2] < size).any():
            expected = f"[height, width, 3] of at least {size[0]} × {size[1]} pixels"
            raise ShapeMismatch(f"textures: expected {expected}, found shape {list(texture.shape)}")
        if texture.dtype != np.uint8:
            raise InvalidInput(f"textures: expected uint8, found {texture.dtype}; multiply by 255 and convert")
    parts = []
    for one in chance:
        texture = pictures[one.integers(len(pictures))]
        top, left = one.integers(np.array(texture.shape[:2]) - size + 1)
        parts.append(texture[top : top + size[0], left : left + size[1]])
    ice = np.stack(parts).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return np.float32(parameter[0]) * images + np.float32(parameter[1]) * (grey(ice) if images.shape[1] == 1 else ice)


def fog(images: Array, parameter: tuple[float, float], chance: Generators) -> Array:
    """(x + thickness·cloud)·m / (m + thickness), where m is the image's largest value; a cloud is between 0 and 1."""
    thickness, decay = np.float32(parameter[0]), parameter[1]
    height, width = images.shape[2:]
    size = 1 << (max(height, width) - 1).bit_length()
    largest = images.max((1, 2, 3), keepdims=True)
    cloud = _plasma(np.stack([one.random((size, size), np.float32) for one in chance]), decay)
    foggy: Array = (images + thickness * cloud[:, None, :height, :width]) * (largest / (largest + thickness))
    return foggy


def _plasma(drawn: Array, decay: float) -> Array:
    """A fractal by the diamond-square algorithm from uniform numbers [n, size, size], on a torus, scaled to [0, 1].

    Each point is the mean of four that are known, ``half`` away, plus what was drawn for it, within ± a reach
    that falls to 1/decay² of itself each time the grid is halved.
    """
    heights = np.zeros_like(drawn)
    drawn, reach, half = 2 * drawn - 1, 100.0**2, drawn.shape[1] // 2
    while half:
        step, noise = 2 * half, np.float32(reach) * drawn
        known = heights[:, ::step, ::step]
        sides = known + np.roll(known, -1, 1)
        middle = (sides + np.roll(sides, -1, 2)) / 4 + noise[:, half::step, half::step]
        heights[:, half::step, half::step] = middle
        across = known + np.roll(known, -1, 2) + middle + np.roll(middle, 1, 1)
        heights[:, ::step, half::step] = across / 4 + noise[:, ::step, half::step]
        down = sides + middle + np.roll(middle, 1, 2)
        heights[:, half::step, ::step] = down / 4 + noise[:, half::step, ::step]
        reach, half = reach / decay**2, half // 2
    heights -= heights.min((1, 2), keepdims=True)
    scaled: Array = heights / heights.max((1, 2), keepdims=True)
    return scaled


def spatter(images: Array, parameter: tuple[float, ...], chance: Generators) -> Array:
    """Drops on the lens: those of water shine, those of mud cover.

    The parameter: mean and standard deviation of noise, sigma of the Gaussian filter that makes drops of it, the level
    above which it is drops, how much water shines or the sigma by which mud is smoothed, and whether it is mud.
    """
    mean, deviation, sigma, least, strength, mud = parameter
    drops = gaussian(np.stack([one.normal(mean, deviation, images.shape[2:]) for one in chance]), sigma)
    colour = np.array(_MUD if mud else _WATER, np.float32)[None, :, None, None] / 255
    colour = grey(colour) if images.shape[1] == 1 else colour
    if mud:
        cover = gaussian((drops > least).astype(np.float32), strength)[:, None]
        cover = np.where(cover < 0.8, 0, cover)
        muddy: Array = images * (1 - cover) + cover * colour
        return muddy
    shine = np.where(drops < least, 0, drops * _relief(drops >= least)).astype(np.float32)
    shine /= np.maximum(shine.max((1, 2), keepdims=True), np.float32(1e-9))  # there may be no drop
    return images + np.float32(strength) * shine[:, None] * colour


def _relief(drops: Array) -> Array:
    """How drops [n, height, width] shine, 0 to 255: distances from their outlines, equalised, lit from above left."""
    from scipy.ndimage import binary_erosion, correlate, distance_transform_edt, uniform_filter

    outlines = drops & ~binary_erosion(drops, np.ones((1, 3, 3)), border_value=1)
    far = np.full(drops.shape[1:], _FAR)
    distances = np.stack([distance_transform_edt(~one) if one.any() else far for one in outlines])
    # Cut off, not rounded, as published; running means come out a hair below whole numbers.
    levels = (uniform_filter(np.minimum(distances, _FAR), (1, 3, 3), mode="mirror") + 1e-6).astype(int)
    lit = np.clip(correlate(_equalised(levels), _EMBOSS[None], mode="mirror"), 0, 255)
    relief: Array = uniform_filter(lit, (1, 3, 3), mode="mirror")
    return relief


def _equalised(levels: Array) -> Array:
    """Levels 0 to ``_FAR`` as 0 for an image's lowest to 255 for its highest, by how many pixels are below."""
    below = np.stack([(levels <= level).sum((1, 2)) for level in range(_FAR + 1)], 1)
    first = np.where(below > 0, below, levels[0].size).min(1, keepdims=True)
    table = np.maximum(below - first, 0) * (255 / np.maximum(levels[0].size - first, 1))
    equal = np.take_along_axis(table, levels.reshape(len(levels), -1), 1)
    return equal.reshape(levels.shape).astype(np.float32)
