"""Weights as small pictures."""

import base64
import struct
import zlib

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 160
"""The most cells that a picture has along either side."""


def pooled(weight: Tensor, peak: float, cell: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """The largest |w| of each cell of a weight [M, ...] as a matrix with a row an output, in 255 steps of the peak.

    A cell is 0 where all its weights are, and only there.

    Args:
        weight: The weight.
        peak: What 255 stands for.
        cell: (rows, columns) of a cell; None: the least for which the picture has at most SIDE cells a side.

    Returns:
        The picture, uint8, and the cell.
    """
    matrix = weight.detach().abs().reshape(len(weight), -1).to(torch.float32)
    rows, columns = matrix.shape
    cell = cell or (max(1, -(-rows // SIDE)), max(1, -(-columns // SIDE)))
    if not matrix.numel():
        return torch.zeros(1, 1, dtype=torch.uint8), cell
    largest = functional.max_pool2d(matrix[None, None], cell, ceil_mode=True)[0, 0]
    steps = (largest / (peak or 1.0) * 255).clamp_(max=255)
    return torch.where(largest > 0, steps.clamp_(min=1), 0.0).to(torch.uint8), cell


def picture(steps: Tensor) -> str:
    """A PNG as a data URI: black where a step is 255, transparent where it is 0."""
    height, width = steps.shape
    rows = b"".join(b"\0" + bytes(row) for row in steps.contiguous().numpy())
    # |w| spreads over decades: by the square root small weights can be told from zeros, which stay empty.
    alphas = bytes([0] + [round(40 + 215 * (step / 255) ** 0.5) for step in range(1, 256)])
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", bytes(3 * 256)),
        _chunk(b"tRNS", alphas),
        _chunk(b"IDAT", zlib.compress(rows, 9)),
        _chunk(b"IEND", b""),
    ]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
