"""Noise, and the random numbers that corruptions draw.

All corruptions take images [n, channels, height, width] in float32, the parameter of a severity, and a generator of
random numbers for each image; what they return may leave [0, 1].
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Generators: TypeAlias = Iterator[np.random.Generator]


def generators(seed: int, name: str, severity: int, indices: range) -> Generators:
    """A generator for each image, which depends on nothing else: one counter of Philox 4x64 for an index.

    The key is a digest of the rest, so that no two corruptions share random numbers.
    """
    key = np.frombuffer(blake2b(f"{seed} {name} {severity}".encode(), digest_size=16).digest(), "<u8")
    for index in indices:
        yield np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64)))


def gaussian_noise(images: Array, deviation: float, chance: Generators) -> Array:
    """x + N(0, deviation²)."""
    return images + np.float32(deviation) * _normal(images, chance)


def shot_noise(images: Array, photons: float, chance: Generators) -> Array:
    """Poisson(photons·x) / photons: the variance is x / photons."""
    return np.stack([one.poisson(photons * x) / photons for x, one in zip(images, chance, strict=True)])


def impulse_noise(images: Array, amount: float, chance: Generators) -> Array:
    """Each value becomes 0 or 1 with probability amount/2 each."""
    drawn = np.stack([one.random(images.shape[1:], np.float32) for one in chance])
    return np.where(drawn < amount / 2, 0.0, np.where(drawn < amount, 1.0, images))


def speckle_noise(images: Array, deviation: float, chance: Generators) -> Array:
    """x + x·N(0, deviation²)."""
    return images + images * np.float32(deviation) * _normal(images, chance)


def _normal(images: Array, chance: Generators) -> Array:
    return np.stack([one.standard_normal(images.shape[1:], np.float32) for one in chance])
