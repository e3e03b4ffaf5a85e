"""What a model, and what calibration data are: a short text that changes with any of their values."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.files.arrays import Array
from convexprune.layers.memory import place_of
from convexprune.network.choosing import find_ties
from convexprune.solvers.errors import InvalidInput


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: the same wherever it is computed, on any device.

    It covers the names and kinds of all modules, their settings (stride, eps: the public attributes that are numbers,
    texts or sequences of these), and the names, dtypes, shapes and values of all parameters and buffers, those that a
    state dict leaves out too, and which of them lie in the same memory. Code and other attributes are not covered.
    """
    digest, first = hashlib.sha256(), dict[Hashable, str]()
    _feed(digest.update, sorted(find_ties(model).refused))  # what overlaps without being the same
    for name, module in model.named_modules(remove_duplicate=False):
        _feed(digest.update, [name, type(module).__qualname__, _settings(module)])
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            known = first.setdefault(place_of(tensor), f"{name}.{key}")
            _feed(digest.update, [key, tensor if known == f"{name}.{key}" else known])
    return digest.hexdigest()


def data_fingerprint(batches: Iterable[object]) -> str:
    """SHA-256 of all that the batches hold, in their order: tensors and arrays, numbers and texts, keys and types.

    Raises:
        InvalidInput: A batch holds something else, whose content is not known.
    """
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        try:
            _feed(digest.update, batch)
        except _Opaque as error:
            raise InvalidInput(
                f"batch {number} of the calibration data holds a {error}, and a run that is resumed could not tell "
                "whether it is the same: keep to tensors, arrays, numbers and texts in mappings, sequences and "
                "dataclasses, or leave out run="
            ) from None
    return digest.hexdigest()


class _Opaque(Exception):
    """Something whose content is not known; its type."""


Add: TypeAlias = Callable[[bytes | memoryview], object]
"""Takes the next bytes."""

_ATOMS = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype)


def _feed(add: Add, value: object) -> None:
    """Add a value such that no two different ones add the same bytes."""
    if isinstance(value, Tensor):
        _feed_tensor(add, value)
    elif isinstance(value, np.ndarray | np.generic):
        _feed_array(add, np.asarray(value))
    elif isinstance(value, _ATOMS):
        kind = next(kind.__name__ for kind in _ATOMS if isinstance(value, kind))
        _feed_bytes(add, kind, value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping | list | tuple):
        kind, items = ("mapping", value.items()) if isinstance(value, Mapping) else (type(value).__name__, value)
        _feed_bytes(add, kind, str(len(value)).encode())
        for item in items:
            _feed(add, item)
    elif is_dataclass(value) and not isinstance(value, type):
        _feed_bytes(add, "dataclass", type(value).__qualname__.encode())
        _feed(add, {field.name: getattr(value, field.name) for field in fields(value)})
    else:
        raise _Opaque(type(value).__name__)


def _feed_bytes(add: Add, kind: str, content: bytes) -> None:
    add(f"{kind}:{len(content)}:".encode())
    add(content)


def _feed_array(add: Add, array: Array) -> None:
    if array.dtype.hasobject:
        _feed(add, ["objects", array.shape, array.ravel().tolist()])
        return
    _feed_bytes(add, "array", f"{array.dtype.str}{list(array.shape)}".encode())
    add(np.ascontiguousarray(array).tobytes())


def _feed_tensor(add: Add, tensor: Tensor) -> None:
    _feed_bytes(add, "tensor", f"{tensor.dtype}{list(tensor.shape)}{tensor.layout}".encode())
    strided = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = strided.cpu().resolve_conj().resolve_neg().contiguous()
    if plain.numel():
        add(plain.reshape(-1).view(torch.uint8).numpy().data)


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module computes with besides tensors, as far as it is plain."""
    own = {name: value for name, value in vars(module).items() if name != "training" and not name.startswith("_")}
    return {name: own[name] for name in sorted(own) if _is_setting(own[name])}


def _is_setting(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_setting(item) for item in value)
    return isinstance(value, bool | int | float | complex | str | None | np.generic | torch.dtype)
