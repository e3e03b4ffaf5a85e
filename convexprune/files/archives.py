"""What a file unpacks to, found out from its headers before anything is unpacked.

A few kilobytes can hold gigabytes of zeros, so a file that unpacks to more than a number of times its size is refused.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from convexprune.solvers.arrays import as_number
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

MAX_RATIO = 100.0
"""How many times its size a file may unpack to; deflate reaches 1032."""

_HARMLESS = 2**28  # bytes that any file may unpack to


def checked_ratio(max_ratio: float) -> float:
    """The limit itself.

    Raises:
        InvalidTolerance: It is below 1, or NaN.
    """
    if not as_number("max_ratio", max_ratio) >= 1:
        raise InvalidTolerance(f"max_ratio: expected a number ≥ 1, found {max_ratio}")
    return max_ratio


def check_zip(path: Path, max_ratio: float) -> None:
    """Of a zip archive, whether all its members together are within the limit; anything else passes.

    Raises:
        InvalidInput: They are not.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()), max_ratio)


def check_tensors(path: Path, tensors: Iterable[Tensor], max_ratio: float) -> None:
    """Whether tensors that were read take no more than the limit; those that are expanded took less so far.

    Raises:
        InvalidInput: They do.
    """
    _check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors), max_ratio)


def check_member(path: Path, name: str, max_ratio: float) -> None:
    """Whether one array of an ``.npz`` is within the limit, and not larger than its member is said to be.

    Raises:
        InvalidInput: It is beyond the limit. ValueError: It is larger than what holds it.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
        _check_size(path, member.file_size, max_ratio)
        with archive.open(member) as file:
            check_array(file, member.file_size)


def check_array(file: IO[bytes], size: int) -> None:
    """Whether the array that the header of an ``.npy`` tells of is no larger than the ``size`` of what holds it.

    Raises:
        ValueError: It is larger.
    """
    magic = file.read(6)
    file.seek(0)
    if magic != b"\x93NUMPY":
        return
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header tells of {math.prod(shape) * dtype.itemsize:,} bytes, and it has {size:,}")


def _check_size(path: Path, unpacked: int, max_ratio: float) -> None:
    size = path.stat().st_size
    if unpacked > max(_HARMLESS, max_ratio * size):
        raise InvalidInput(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}, more than {max_ratio:g} times its size: it may be "
            f"made to fill the memory. If you trust it, give max_ratio={math.ceil(unpacked / size)} (--max-ratio)"
        )
