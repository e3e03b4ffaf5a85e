"""Weights read from disk as state dicts, and how every file is written.

Nothing is ever unpickled: weights come from safetensors or from ``torch.load(weights_only=True)``. A few kilobytes can
hold gigabytes of zeros, so a file that unpacks to more than a number of times its size is refused. Every write goes to
a temporary file first, so the old file survives a crash.
"""

import errno
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.texts import utf8
from convexprune.solvers.arrays import as_number
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

StrPath = str | os.PathLike[str]
T = TypeVar("T")

MAX_RATIO = 100.0
"""How many times its size a file may unpack to; deflate reaches 1032."""

_HARMLESS = 2**28  # bytes that any file may unpack to
KEYS = "convexprune.keys"  # the metadata entry with the state dict's order, which the format does not keep
_SAVE_WEIGHTS = "save the state dict with safetensors.torch.save_file(model.state_dict(), path)"


def load_weights(path: StrPath, *, max_ratio: float = MAX_RATIO) -> dict[str, Tensor]:
    """Read a state dict onto the CPU: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` without running any code.

    Args:
        path: The file.
        max_ratio: How many times its size it may unpack to; 256 MiB always pass.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        InvalidInput: ``path`` is a folder, has another suffix, or unpacks to more than the limit.
        InvalidTolerance: a limit below 1.
        DamagedFile: the file is cut short, is not what its suffix says, needs unpickling, or is not a state dict.
    """
    check_ratio(max_ratio)
    path, suffix = existing(path, (".safetensors", ".pt", ".pth", ".bin"))
    reader = _read_safetensors if suffix == ".safetensors" else partial(_read_torch, max_ratio=max_ratio)
    found = read(path, reader, "a state dict of tensors", _SAVE_WEIGHTS)
    if not isinstance(found, Mapping):
        raise DamagedFile(f"{path} holds a {type(found).__name__}, expected a dict of tensors; {_SAVE_WEIGHTS}.")
    others = [f"{key!r}: {type(value).__name__}" for key, value in found.items() if not isinstance(value, Tensor)]
    if others or not all(isinstance(key, str) for key in found):
        held = listed(others or [repr(key) for key in found])
        raise DamagedFile(f"{path} is not a flat dict of named tensors: it holds {held}; {_SAVE_WEIGHTS}.")
    check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in found.values()), max_ratio)
    return dict(found)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file: the same bytes for the same tensors and metadata, in every process.

    The package writes metadata in the order of a hash that is seeded anew each time, so the header is written again,
    with the metadata in the order of their keys; the format lets it end in spaces, up to a multiple of 8 bytes. A name
    that UTF-8 cannot express (a lone surrogate) is InvalidInput.
    """
    try:
        content = save(dict(tensors), None if metadata is None else dict(metadata))
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{error.object!r} is a name that no file can hold: {error}; rename the module") from error
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def save_json(data: object, path: StrPath) -> Path:
    """Write ``data`` as JSON, as ``write_atomically`` does; what has no JSON form is InvalidInput.

    Arrays, tensors and numpy scalars become lists and numbers, NaN and infinity, which JSON cannot express, ``null``.
    """
    path = Path(path)
    try:
        text = json.dumps(plain(data), allow_nan=False, ensure_ascii=False, indent=2)
        encoded = utf8(f"{text}\n")
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: the data cannot be written as JSON: {error}.") from error
    return write_atomically(encoded, path)


def write_atomically(content: bytes, path: StrPath) -> Path:
    """Write to a temporary file in the same folder, which is made if need be, flush it to disk, then rename it.

    Raises:
        InvalidInput: a device or a pipe is at ``path``, which a rename would replace, or its folder cannot be made.
        OSError: the file could not be written; what was at ``path`` before is still there.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{path} is a device or a pipe, where a file is to be written; choose another name")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - named as the call whose atomicity this rests on
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # so that the new name survives a power failure too, where the system flushes folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def as_path(path: StrPath) -> Path:
    """The path; InvalidInput is raised for a null character, or one that the file system has no bytes for."""
    with suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return Path(path)
    raise InvalidInput(f"{path!r}: no file can have this name, for it has no bytes; choose another")


def make_folder(folder: StrPath) -> Path:
    """Make a folder, and those that it lies in, unless they are there; raises as ``check_folder``, or OSError."""
    check_folder(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def check_folder(folder: StrPath) -> Path:
    """The folder; InvalidInput is raised where a file, or a symbolic link that leads nowhere, is in its way."""
    path = as_path(folder)
    place = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if place.is_symlink() and not place.exists():
        raise InvalidInput(f"{place}: a symbolic link that leads nowhere, or in a circle; mend it, or choose another")
    if place.exists() and not place.is_dir():
        raise InvalidInput(f"{place}: a file, where a folder is to be; choose another")
    return path


def existing(path: StrPath, suffixes: tuple[str, ...]) -> tuple[Path, str]:
    """The path of a file, and its suffix; raises FileNotFoundError, or InvalidInput for a folder or another suffix."""
    path = as_path(path)
    if not path.exists():
        links = [place for place in (path, *path.parents) if place.is_symlink() and not place.exists()]
        why = f"{links[0]} is a symbolic link that leads nowhere, or in a circle" if links else "check the path"
        raise FileNotFoundError(f"No file at {path}; {why} (relative paths start at {Path.cwd()}).")
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in suffixes:
        found = "is a folder" if path.is_dir() else f"has the suffix {suffix!r}"
        raise InvalidInput(f"{path} {found}; expected a file ending in {', '.join(suffixes)}.")
    return path, suffix


def read(path: Path, reader: Callable[[Path], T], expected: str, remedy: str) -> T:
    """What ``reader`` gives; damaged bytes make parsers raise nearly anything, so most of it is DamagedFile."""
    try:
        return reader(path)
    except (InvalidInput, PermissionError):
        raise
    except Exception as error:
        size = path.stat().st_size if path.is_file() else 0
        found = f"{size:,} bytes that do not load" if size else "an empty file" if path.is_file() else "no file"
        reason = str(error).strip().split("\n")[0][:200]
        message = f"{path} is damaged or would need unpickling: found {found}, expected {expected}; {remedy}."
        raise DamagedFile(f"{message} ({type(error).__name__}: {reason})") from error


def check_ratio(max_ratio: float) -> None:
    """Raise InvalidTolerance if the limit is below 1, or NaN."""
    if not as_number("max_ratio", max_ratio) >= 1:
        raise InvalidTolerance(f"max_ratio: expected a number ≥ 1, found {max_ratio}")


def check_size(path: Path, unpacked: int, max_ratio: float) -> None:
    """Raise InvalidInput if the file unpacks to more bytes than it may."""
    size = path.stat().st_size
    if unpacked > max(_HARMLESS, max_ratio * size):
        raise InvalidInput(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}, more than {max_ratio:g} times its size: it may be "
            f"made to fill the memory. If you trust it, give max_ratio={math.ceil(unpacked / size)} (--max-ratio)"
        )


def _read_safetensors(path: Path) -> object:
    with safe_open(path, framework="pt", device="cpu") as file:
        keys, order = list(file.keys()), json.loads((file.metadata() or {}).get(KEYS, "[]"))
        return {key: file.get_tensor(key) for key in (order if sorted(order) == sorted(keys) else keys)}


def _read_torch(path: Path, max_ratio: float) -> object:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_size(path, sum(member.file_size for member in archive.infolist()), max_ratio)
    return torch.load(path, map_location="cpu", weights_only=True)


def plain(value: Any) -> Any:
    """Nested data with lists and numbers for arrays and tensors, and None for NaN and infinity."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def listed(items: Sequence[str], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
