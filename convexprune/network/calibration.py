"""Calibration data as batches that can be gone through again and again, and fitted to what the model takes.

Batches are checked each time, and never all in memory.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.errors import EmptyCalibration
from convexprune.files.texts import visible
from convexprune.layers.memory import Batch, mapped, samples_of, tensors_in
from convexprune.network.forwards import Forward, call_model, evaluating, run_model
from convexprune.network.padding import Mask, Masks, check_mask, read_masks
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, NonFinite

_log = logging.getLogger(__name__)


class Calibration:
    """Batches of calibration data; each ``for`` goes through them anew.

    A tensor or array [samples, ...] (a numpy.memmap, too) is cut into batches; a mapping is one batch. Of other
    iterables each pass asks for a new iterator, so that a DataLoader or a sequence read from disk need not fit into
    memory; an iterator, which can be gone through only once, is kept as a list. Batches without samples are left out.

    Args:
        data: A tensor, an array, or an iterable of batches (tensor, tuple of positional arguments, or mapping of
            keyword arguments) of any lengths. Arrays of numbers become tensors, in these, too.
        batch_size: Samples at a time where ``data`` is one tensor.
        mask: Which positions of a batch count, as for ``prune_``.

    Raises:
        InvalidInput: Not a tensor, an array of numbers or an iterable of batches; or ``mask`` is of another type.
        InvalidTolerance: The batch size is not a whole number above 0.
        EmptyCalibration, NonFinite: There is no sample, or a batch holds NaN or infinity: during a pass.
    """

    def __init__(self, data: Batch, batch_size: int = 256, mask: Mask = None) -> None:
        self._size = checked_count("batch_size", batch_size)
        self._data, self.mask = data, check_mask(mask)
        if isinstance(data, Mapping) or (isinstance(data, Tensor | np.ndarray) and data.ndim > 0):
            return
        if isinstance(data, Tensor | np.ndarray | str) or not isinstance(data, Iterable):
            found = type(data).__name__
            raise InvalidInput(f"calibration data: expected a tensor [samples, ...] or batches, got {found}")
        if isinstance(data, Iterator):
            self._data = list(data)

    def __iter__(self) -> Iterator[Batch]:
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

    def masks_of(self, batch: Batch) -> Masks:
        """Which positions of a batch count."""
        return read_masks(batch, self.mask)[0]

    def content(self) -> Iterator[Batch]:
        """All that results depend on, for a fingerprint: the batches, with the masks that a function makes of them."""
        for batch in self:
            yield (batch, next(iter(self.masks_of(batch)), None)) if callable(self.mask) else batch

    def _cut(self) -> Iterator[Batch]:
        if isinstance(self._data, Tensor | np.ndarray):
            for start in range(0, len(self._data), self._size):
                yield _as_tensors(self._data[start : start + self._size])
        elif isinstance(self._data, Mapping):
            yield _as_tensors(self._data)
        else:
            yield from map(_as_tensors, self._data)


def as_batches(calibration: Batch, batch_size: int = 256) -> list[Batch]:
    """All batches of a ``Calibration`` as a list; raises what it does."""
    return list(Calibration(calibration, batch_size))


def _as_tensors(batch: Batch) -> Batch:
    """The batch with tensors in the place of arrays of numbers, alone or in mappings and sequences."""
    if isinstance(batch, np.ndarray):
        try:
            return torch.tensor(batch)  # a copy: torch warns when it shares an array that is read-only
        except TypeError as error:
            raise InvalidInput(f"calibration data: expected an array of numbers, found one of {batch.dtype}") from error
    if isinstance(batch, Mapping) and any(map(_is_array, batch.values())):
        return {key: _as_tensors(value) if _is_array(value) else value for key, value in batch.items()}
    if type(batch) in (tuple, list) and any(map(_is_array, batch)):
        return type(batch)(_as_tensors(part) if _is_array(part) else part for part in batch)
    return batch


def _without_masks(batch: Batch) -> Batch:
    """The batch without entries that are masks by their names: of these that are added −∞ hides a position."""

    def adds(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and bool((value.isfinite() | (value < 0)).all())

    if not isinstance(batch, Mapping):
        return batch
    return [value for key, value in batch.items() if not (str(key).endswith("mask") and adds(value))]


def _is_array(part: object) -> bool:
    """Whether it is an array of numbers."""
    return isinstance(part, np.ndarray) and part.dtype.kind in "biufc"


@dataclass(frozen=True)
class Fitting:
    """What is done to each batch before the model is called on it."""

    parts: int | None = None  # how many of a tuple's or list's first entries the model takes; None: the whole batch
    left: tuple[str, ...] = ()  # keys of a mapping that the model does not take
    dtype: torch.dtype | None = None  # what floating-point tensors are cast to; None: they stay

    def __call__(self, model: nn.Module, batch: Batch) -> Batch:
        """A ``Forward``."""
        return call_model(model, self.applied(batch), None)

    def applied(self, batch: Batch) -> Batch:
        """The batch that the model is called on."""
        if self.parts is not None and _is_sequence(batch):
            batch = batch[0] if self.parts == 1 else tuple(batch[: self.parts])
        if self.left and isinstance(batch, Mapping):
            batch = {key: value for key, value in batch.items() if key not in self.left}
        dtype = self.dtype
        if dtype is None:
            return batch
        return mapped(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def notices(self, batch: Batch) -> Iterator[str]:
        """What is done to batches such as this one, as sentences."""
        if self.parts is not None:
            which = "the first part" if self.parts == 1 else f"the first {self.parts} parts"
            yield f"the model is called on {which} of each batch: of the {len(batch)} it does not take the rest"
        if self.left:
            yield f"of each batch the model is not given {', '.join(map(repr, self.left))}, which it does not take"
        if self.dtype is not None:
            given = tensors_in(Fitting(self.parts, self.left).applied(batch))
            others = {tensor.dtype for tensor in given if tensor.is_floating_point()} - {self.dtype}
            names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, *others)]
            yield f"inputs are cast from {' and '.join(sorted(names[1:]))} to {names[0]}, in which the model computes"


def fitted(
    model: nn.Module, batches: Iterable[Batch], forward: Forward | None
) -> tuple[Forward | None, tuple[str, ...]]:
    """How the model is to be called on such batches, and what is thereby done to them, as sentences.

    Decided on the first batch, by the signature of the model's forward and by calling it. Of a tuple or list that the
    model does not take whole, such as (inputs, labels) of a data loader, it is given the first entries that it takes,
    of a mapping the entries that are arguments of its forward. Floating-point tensors are cast to the model's type
    where it cannot be called without. With a ``forward`` of the caller's nothing is done. Raises as ``Calibration``,
    and InvalidInput where the model cannot be called, whatever is done: with its error on the batch as it is.
    """
    if forward is not None:
        return forward, ()
    batch = next(iter(batches))
    fittings = list(_fittings(model, batch))
    if fittings == [Fitting()]:
        return None, ()
    failures: list[InvalidInput] = []
    with evaluating(model):
        for fitting in fittings:
            if failures and fitting.parts != fittings[0].parts and not _may_drop(batch, failures[0]):
                break
            try:
                run_model(model, batch, fitting)
            except InvalidInput as error:
                failures.append(error)
                continue
            notices = tuple(fitting.notices(batch))
            for notice in notices:
                _log.info("%s", visible(notice))
            return (None if fitting == Fitting() else fitting), notices
    raise failures[0]


def _fittings(model: nn.Module, batch: Batch) -> Iterator[Fitting]:
    """What may be done, the least first."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        signature = None
    for parts in _parts(signature, batch):
        left = _strange_keys(signature, Fitting(parts).applied(batch))
        given = Fitting(parts, left).applied(batch)
        yield Fitting(parts, left)
        if dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors_in(given)):
            yield Fitting(parts, left, dtype)


def _parts(signature: inspect.Signature | None, batch: Batch) -> list[int | None]:
    """Numbers of first entries that the signature of forward allows, the most first; None for all of them."""
    found: list[int | None] = []
    if signature is None or not _is_sequence(batch) or len(batch) < 2:
        return [None]
    for parts in range(len(batch), 0, -1):
        with suppress(TypeError):
            if parts > 1 or not isinstance(batch[0], Mapping):
                signature.bind(*batch[:parts])
            found.append(None if parts == len(batch) else parts)
    return found or [None]


def _strange_keys(signature: inspect.Signature | None, batch: Batch) -> tuple[str, ...]:
    """Keys of a mapping that are no arguments of forward, such as labels; none where forward takes any."""
    if not isinstance(batch, Mapping) or signature is None:
        return ()
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return ()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name for name, kind in kinds.items() if kind in by_name}
    return tuple(key for key in batch if key not in named) if named.intersection(batch) else ()


def _may_drop(batch: Sequence[Batch], error: InvalidInput) -> bool:
    """Whether the model failed on what it need not take: labels, or more arguments than something inside takes."""
    labels = isinstance(batch[-1], Tensor) and not batch[-1].is_floating_point()
    return labels or (isinstance(error.__cause__, TypeError) and "positional argument" in str(error.__cause__))


def _is_sequence(batch: Batch) -> bool:
    """Whether entries of the batch are arguments; a PackedSequence, which moves as a whole, is one argument."""
    return isinstance(batch, tuple | list) and not hasattr(batch, "to")
