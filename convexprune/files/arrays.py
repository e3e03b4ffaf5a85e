"""Arrays of samples read from files, without unpickling anything."""

import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.weights import (
    MAX_RATIO,
    StrPath,
    check_ratio,
    check_size,
    existing,
    listed,
    load_weights,
    read,
)
from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite

Array = np.ndarray[Any, Any]
_Parts = Mapping[str, Callable[[], object]]  # what is in a file by name, to be read when it is called

INPUT_NAMES = ("x_train", "x", "images", "inputs")
LABEL_NAMES = ("y_test", "y_train", "y", "labels")

_ARRAYS, _TENSORS = (".npz", ".npy"), (".safetensors", ".pt", ".pth", ".bin")
_REMEDY = "save it again with numpy.savez(path, x=..., y=...), numbers only"


def load_array(
    path: StrPath,
    key: str | None = None,
    names: Sequence[str] = INPUT_NAMES,
    *,
    max_ratio: float = MAX_RATIO,
) -> Array:
    """Read one array: the one called ``key``, else the only one, else the first of ``names``.

    Args:
        path: ``.npy``, ``.npz``, or a file of named tensors: ``.safetensors``, ``.pt``, ``.pth``, ``.bin``.
        key: The array's name.
        names: Those that are conventional, the first that is there counts.
        max_ratio: How many times the file's size the array may have; 256 MiB always pass.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        InvalidInput: another suffix, no such key, no conventional name among several, no array of numbers, or one
            beyond the limit.
        InvalidTolerance: a limit below 1.
        DamagedFile: the file is cut short, is not what its suffix says, or holds pickled objects.
        EmptyInput: the array has no elements.
        NonFinite: the array holds NaN or infinity.
    """
    path, parts = _parts(path, max_ratio)
    if "" in parts and key is not None:
        raise InvalidInput(f"{path} holds one array without a name, not {key!r}; leave the key out.")
    if not parts:
        raise EmptyInput(f"{path} holds no array; {_REMEDY}.")
    wanted = [key] if key is not None else list(parts) if len(parts) == 1 else names
    chosen = next((name for name in wanted if name in parts), None)
    if chosen is None:
        raise InvalidInput(
            f"{path} holds {listed(list(parts))}, not {' or '.join(wanted)}; name one of them as the key."
        )
    return _numbers(path, parts[chosen])


def load_arrays(path: StrPath, names: Iterable[str], *, max_ratio: float = MAX_RATIO) -> dict[str, Array]:
    """Those of the named arrays that a file has; none of an ``.npy``, whose array has no name."""
    path, parts = _parts(path, max_ratio)
    return {name: _numbers(path, parts[name]) for name in dict.fromkeys(names) if name and name in parts}


def _parts(path: StrPath, max_ratio: float) -> tuple[Path, _Parts]:
    check_ratio(max_ratio)
    path, suffix = existing(path, (*_ARRAYS, *_TENSORS))
    if suffix in _TENSORS:
        tensors = load_weights(path, max_ratio=max_ratio)
        return path, {name: partial(_as_array, tensor) for name, tensor in tensors.items()}
    return path, read(path, partial(_members, max_ratio=max_ratio), "arrays of numbers", _REMEDY)


def _as_array(tensor: Tensor) -> Array:
    """numpy has no bfloat16."""
    found: Array = (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
    return found


def _members(path: Path, max_ratio: float) -> _Parts:
    """Those of an archive by name; an array alone has none."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            array = _array(file, path.stat().st_size)
        return {"": lambda: array}
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy"): partial(_member, path, name, max_ratio) for name in archive.namelist()}


def _member(path: Path, name: str, max_ratio: float) -> object:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        size = archive.getinfo(name).file_size
        check_size(path, size, max_ratio)
        return _array(file, size)


def _array(file: IO[bytes], size: int) -> object:
    """An ``.npy`` of so many bytes; ValueError if its header tells of more, before anything is allocated."""
    version = np.lib.format.read_magic(file)
    read_header = getattr(np.lib.format, f"read_array_header_{1 if version == (1, 0) else 2}_0")
    shape, _, dtype = read_header(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header tells of {math.prod(shape) * dtype.itemsize:,} bytes, and it has {size:,}")
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _numbers(path: Path, part: Callable[[], object]) -> Array:
    array = read(path, lambda _: part(), "an array of numbers", _REMEDY)
    if not isinstance(array, np.ndarray):  # numpy hands back the bytes of an archive's member that is no array
        raise DamagedFile(f"{path} holds something that is not an array; {_REMEDY}.")
    if array.dtype.kind not in "biufc":
        raise InvalidInput(f"{path} holds an array of {array.dtype}, expected numbers; {_REMEDY}.")
    if array.ndim == 0:
        raise InvalidInput(f"{path} holds a single number, expected an array of samples; {_REMEDY}.")
    if array.size == 0:
        raise EmptyInput(f"{path} holds an empty array of shape {array.shape}; expected at least one sample.")
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        raise NonFinite(f"{path} holds NaN or infinity; remove or repair those samples.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # torch takes native byte order only
