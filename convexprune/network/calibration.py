"""Calibration data as batches that can be gone through again and again, checked each time, never all in memory."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexprune.errors import EmptyCalibration
from convexprune.network.padding import Mask, Masks, check_mask, read_masks
from convexprune.network.watch import tensors_in
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, NonFinite


class Calibration:
    """Batches of calibration data; each ``for`` goes through them anew.

    A tensor or array [samples, ...] (a numpy.memmap, too) is cut into batches; a mapping is one batch. Of other
    iterables each pass asks for a new iterator, so that a DataLoader or a sequence read from disk need not fit into
    memory; an iterator, which can be gone through only once, is kept as a list. Batches without samples are left out.

    Args:
        data: A tensor, an array, or an iterable of batches (tensor, tuple of positional arguments, or mapping of
            keyword arguments); their lengths may differ. Arrays of numbers become tensors, in tuples, lists and
            mappings as well.
        batch_size: Samples at a time where ``data`` is one tensor.
        mask: Which positions of a batch count, as for ``prune_``.

    Raises:
        InvalidInput: Not a tensor, an array of numbers or an iterable of batches; or ``mask`` is of another type.
        InvalidTolerance: The batch size is not a whole number above 0.
        EmptyCalibration: There is no sample: raised at the end of a pass.
        NonFinite: A batch holds NaN or infinity: raised when it is reached; the message says which.
    """

    def __init__(self, data: Any, batch_size: int = 256, mask: Mask = None) -> None:
        self._size = checked_count("batch_size", batch_size)
        self._data, self.mask = data, check_mask(mask)
        if isinstance(data, Mapping) or (isinstance(data, Tensor | np.ndarray) and data.ndim > 0):
            return
        if isinstance(data, Tensor | np.ndarray | str) or not isinstance(data, Iterable):
            found = type(data).__name__
            raise InvalidInput(f"calibration data: expected a tensor [samples, ...] or batches, got {found}")
        if isinstance(data, Iterator):
            self._data = list(data)

    def __iter__(self) -> Iterator[Any]:
        found = False
        for number, batch in enumerate(self._cut()):
            if not samples_of(batch):
                continue
            where = f"batch {number} of the calibration data (the first is 0)"
            if any(tensor.is_meta for tensor in tensors_in(batch)):
                raise InvalidInput(f"{where} is on the device 'meta', which holds no values: give real samples")
            if not all(tensor.isfinite().all() for tensor in tensors_in(_without_masks(batch))):
                raise NonFinite(f"{where} holds NaN or infinity: remove it")
            found = True
            yield batch
        if not found:
            raise EmptyCalibration("the calibration data holds no sample: pass a tensor, an array or a list of batches")

    def masks_of(self, batch: Any) -> Masks:
        """Which positions of a batch count."""
        return read_masks(batch, self.mask)[0]

    def content(self) -> Iterator[Any]:
        """All that results depend on, for a fingerprint: the batches, with the masks that a function makes of them."""
        for batch in self:
            yield (batch, next(iter(self.masks_of(batch)), None)) if callable(self.mask) else batch

    def _cut(self) -> Iterator[Any]:
        if isinstance(self._data, Tensor | np.ndarray):
            for start in range(0, len(self._data), self._size):
                yield _as_tensors(self._data[start : start + self._size])
        elif isinstance(self._data, Mapping):
            yield _as_tensors(self._data)
        else:
            yield from map(_as_tensors, self._data)


def as_batches(calibration: Any, batch_size: int = 256) -> list[Any]:
    """All batches of a ``Calibration`` as a list.

    Raises:
        InvalidInput, InvalidTolerance, EmptyCalibration, NonFinite: As there.
    """
    return list(Calibration(calibration, batch_size))


def samples_of(batch: Any) -> int:
    """The length of the batch's first tensor; a batch without one is a sample."""
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else len(first)


def samples_at(batch: Any, chosen: slice | list[int]) -> Any:
    """The batch with some of its samples alone: of each tensor as long as ``samples_of`` says, these entries.

    What is no tensor, and no mapping, sequence or dataclass with tensors in it, stays as it is.
    """
    return _chosen(batch, samples_of(batch), chosen)


def _chosen(batch: Any, samples: int, chosen: slice | list[int]) -> Any:
    if isinstance(batch, Tensor):
        return batch[chosen] if batch.dim() and len(batch) == samples else batch
    if isinstance(batch, Mapping):
        return {key: _chosen(value, samples, chosen) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and not hasattr(batch, "to"):  # a PackedSequence has samples of many rows
        parts = [_chosen(value, samples, chosen) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        own = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(own, field.name, _chosen(getattr(batch, field.name), samples, chosen))  # frozen, too
        return own
    return batch


def _as_tensors(batch: Any) -> Any:
    """The batch with tensors in the place of arrays of numbers, alone or in mappings and sequences."""
    if isinstance(batch, np.ndarray):
        return _as_tensor(batch)
    if isinstance(batch, Mapping) and any(map(_is_array, batch.values())):
        return {key: _as_tensors(value) if _is_array(value) else value for key, value in batch.items()}
    if type(batch) in (tuple, list) and any(map(_is_array, batch)):
        return type(batch)(_as_tensors(part) if _is_array(part) else part for part in batch)
    return batch


def _without_masks(batch: Any) -> Any:
    """The batch without entries that are masks by their names: of these that are added −∞ hides a position."""
    if not isinstance(batch, Mapping):
        return batch
    return [value for key, value in batch.items() if not (str(key).endswith("mask") and _is_additive(value))]


def _is_additive(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool((value.isfinite() | (value < 0)).all())


def _is_array(part: Any) -> bool:
    """Whether it is an array of numbers."""
    return isinstance(part, np.ndarray) and part.dtype.kind in "biufc"


def _as_tensor(batch: Any) -> Any:
    try:
        return torch.tensor(batch)  # a copy: torch warns when it shares an array that is read-only
    except TypeError as error:
        raise InvalidInput(f"calibration data: expected an array of numbers, found one of {batch.dtype}") from error
