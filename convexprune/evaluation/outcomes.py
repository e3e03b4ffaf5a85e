"""A figure for each sample, in little room: in memory one bit for right or wrong, compressed in files."""

import base64
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convexprune.files.texts import Json

_MOST = 2**28  # bytes that the samples of one row of a file may unpack to


@dataclass(frozen=True)
class Outcomes:
    """Of each sample whether the network is right, or what a metric says.

    Attributes:
        samples: How many.
        right: Whether each is a truth value.
        packed: Truth values at eight a byte, or numbers in float64.
    """

    samples: int
    right: bool
    packed: bytes

    @classmethod
    def of(cls, values: Tensor) -> "Outcomes":
        """Those in a vector of truth values, or of numbers."""
        array = values.cpu().numpy()
        if array.dtype == np.bool_:
            return cls(len(array), True, np.packbits(array).tobytes())
        return cls(len(array), False, array.astype("<f8").tobytes())

    def tensor(self) -> Tensor:
        """As a vector [samples], bool or float64."""
        if self.right:
            bits = np.unpackbits(np.frombuffer(self.packed, np.uint8), count=self.samples)
            return torch.from_numpy(bits.astype(np.bool_))
        return torch.from_numpy(np.frombuffer(self.packed, "<f8").astype(np.float64))

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        text = base64.b64encode(zlib.compress(self.packed, 9)).decode("ascii")
        return {"samples": self.samples, "right": self.right, "packed": text}

    @classmethod
    def from_dict(cls, data: Json) -> "Outcomes":
        """What ``to_dict`` described; ValueError is raised where it holds something else."""
        size = -(-data["samples"] // 8) if data["right"] else 8 * data["samples"]
        if not 0 <= size <= _MOST:
            raise ValueError(f"outcomes of {data['samples']} samples")
        packed = zlib.decompressobj().decompress(base64.b64decode(data["packed"], validate=True), size + 1)
        if len(packed) != size:
            raise ValueError(f"outcomes of {data['samples']} samples, in {len(packed)} bytes")
        return cls(data["samples"], data["right"], packed)
